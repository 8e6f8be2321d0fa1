// NumPy arrays as the emulated device's memory.
#pragma once

#include <pybind11/numpy.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace emulator {

namespace py = pybind11;

// A copy of exactly the array's size, aligned as a CUDA allocation is: one element too far is seen by the sanitizer.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(const py::array& array) : DeviceBuffer(static_cast<std::size_t>(array.nbytes())) {
    if (size_ > 0) std::memcpy(data_, array.data(), size_);
  }
  explicit DeviceBuffer(std::size_t size) : size_(size) {
    if (size > 0 && posix_memalign(&data_, 256, size) != 0) throw std::bad_alloc();
    if (size > 0) std::memset(data_, kPoison, size);
  }
  ~DeviceBuffer() {
    std::free(data_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  template <typename T>
  T* as() {
    return static_cast<T*>(data_);
  }
  void copy_to(py::array& array) const {
    if (size_ > 0) std::memcpy(array.mutable_data(), data_, size_);
  }

 private:
  void* data_ = nullptr;
  std::size_t size_;
};

// Copies of arrays on the emulated device, which live as long as this.
class Device {
 public:
  template <typename T>
  T* add(const py::array& array) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(array));
    return buffers_.back()->as<T>();
  }
  // Memory for `count` of T, filled with a pattern.
  template <typename T>
  T* room(std::int64_t count) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(sizeof(T) * static_cast<std::size_t>(count)));
    return buffers_.back()->as<T>();
  }

 private:
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

// A NumPy array for elements of a storage type; those of halves are bit patterns.
template <typename S>
py::array empty_array(py::ssize_t elements) {
  if constexpr (sizeof(S) == sizeof(double)) return py::array_t<double>(elements);
  if constexpr (sizeof(S) == sizeof(float)) return py::array_t<float>(elements);
  return py::array_t<uint16_t>(elements);
}

// What lies at `source` on the emulated device.
template <typename T>
py::array_t<T> fetch(const T* source, std::vector<py::ssize_t> shape) {
  py::array_t<T> result(std::move(shape));
  if (result.size() > 0) std::memcpy(result.mutable_data(), source, static_cast<std::size_t>(result.nbytes()));
  return result;
}

inline Order order_of(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "backward") return Order::kBackward;
  if (name == "random") return Order::kRandom;
  throw std::invalid_argument("order must be forward, backward or random, and is " + name);
}

}  // namespace emulator
