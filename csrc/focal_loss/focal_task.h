// What a focal loss kernel, on the CPU or on CUDA, makes of each element.
#pragma once

namespace retinanet_ext {

enum class FocalTask {
  kLoss,            // its loss
  kSum,             // the sum of losses
  kGradient,        // its gradient, times the upstream gradient
  kSumAndGradient,  // both in one pass; the gradient for an upstream gradient of 1
};

constexpr bool sums(FocalTask task) {
  return task == FocalTask::kSum || task == FocalTask::kSumAndGradient;
}

constexpr bool differentiates(FocalTask task) {
  return task == FocalTask::kGradient || task == FocalTask::kSumAndGradient;
}

}  // namespace retinanet_ext
