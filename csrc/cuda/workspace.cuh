// Device memory of a launcher, and the size of its grids.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>

#include "common/checks.h"

namespace retinanet_ext {

// Uninitialised memory for `count` values of T on the device of `like`, aligned for any of them.
template <typename T>
torch::stable::Tensor workspace(const torch::stable::Tensor& like, int64_t count) {
  constexpr int64_t kWords = (sizeof(T) + sizeof(int64_t) - 1) / sizeof(int64_t);
  return torch::stable::new_empty(like, {std::max<int64_t>(count, 1) * kWords},
                                  torch::headeronly::ScalarType::Long);
}

template <typename T>
T* data_of(torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline int64_t blocks_of(int64_t count, int64_t threads) {
  return (count + threads - 1) / threads;
}

inline unsigned grid_of(const char* op, int64_t blocks) {
  require(blocks <= std::numeric_limits<int32_t>::max(), op, ": the input is too large for CUDA: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace retinanet_ext
