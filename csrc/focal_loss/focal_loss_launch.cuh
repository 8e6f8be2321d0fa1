// What the launchers of the focal loss kernels share.
#pragma once

#include "common/checks.h"
#include "common/dispatch.h"
#include "cuda/launch.cuh"
#include "focal_loss/focal_loss_device.cuh"

namespace retinanet_ext {

// Grids never exceed this; the sum's workspace is sized by it.
inline int64_t max_blocks(const CudaScope& scope) {
  return static_cast<int64_t>(scope.multiprocessors()) * kFocalMaxBlocks;
}

// Calls f with a value of the storage type of `type`.
template <typename F>
auto with_storage_type(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      return f(BFloat16{});
  }
}

// The device's address of one int32 in pinned host memory: a kernel can write what the host reads without waiting.
inline int32_t* host_memory_on_device(const torch::stable::Tensor& tensor, const char* op) {
  void* address = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&address, tensor.mutable_data_ptr(), 0);
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error of this call alone; it must not come up again after the next launch
    fail(op, ": was_one must be pinned host memory: ", cudaGetErrorString(error));
  }
  return static_cast<int32_t*>(address);
}

}  // namespace retinanet_ext
