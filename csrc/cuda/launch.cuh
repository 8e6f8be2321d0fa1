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

  // The grid of a kernel that walks its tiles: `per_multiprocessor` blocks, which its __launch_bounds__ make fit, and at
  // most one a tile. It depends on the device and the size alone, not on what a kernel's registers happen to allow: a
  // sum in block order then has the same bits on every run, and in every kernel that sums in the same way.
  int blocks_for(int per_multiprocessor, int64_t tiles) const {
    return static_cast<int>(std::min(tiles, static_cast<int64_t>(per_multiprocessor) * multiprocessors()));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace retinanet_ext
