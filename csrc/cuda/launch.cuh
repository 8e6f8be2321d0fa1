// What every launcher needs: the caller's device and stream, the number of blocks that fit, the check of the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace retinanet_ext {

// Makes the tensor's device current for the launcher's scope.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const {
    return stream_;
  }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  // Blocks that fill the device once, at most one a tile: the grid of a kernel that walks its tiles. It depends on the
  // device and the size alone, so that a sum in block order has the same bits on every run.
  template <typename Kernel>
  int blocks_for(Kernel kernel, int threads, int64_t tiles) const {
    int per_multiprocessor = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0));
    const int64_t resident = static_cast<int64_t>(std::max(per_multiprocessor, 1)) * multiprocessors();
    return static_cast<int>(std::min(tiles, resident));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace retinanet_ext
