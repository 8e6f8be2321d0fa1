// Focal loss over the levels of a feature pyramid on CUDA: launchers and operators around
// multilevel_focal_loss_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "focal_loss/focal_loss_launch.cuh"
#include "focal_loss/multilevel_focal_loss_args.h"
#include "focal_loss/multilevel_focal_loss_kernel.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMaxClasses = 1 << 27;  // a tile's elements are counted by 32-bit numbers

template <typename In, FocalTask kTask, Gamma kGamma>
int launch(const CudaScope& scope, const MultilevelKernelArgs<compute_t<In>>& args) {
  const auto kernel = multilevel_focal_kernel<In, kTask, kGamma>;
  const int blocks = scope.blocks_for(kFocalMinBlocks<In>, args.tiles);
  kernel<<<blocks, kFocalThreads, 0, scope.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return blocks;
}

// float64 has the general variant alone.
template <typename In, FocalTask kTask>
int launch(const CudaScope& scope, const MultilevelKernelArgs<compute_t<In>>& args) {
  if constexpr (sizeof(compute_t<In>) == sizeof(float)) {
    if (args.gamma == 2) return launch<In, kTask, Gamma::kTwo>(scope, args);
  }
  return launch<In, kTask, Gamma::kAny>(scope, args);
}

// `gradients`: one tensor a level; empty for kSum. `block_sums` has room for max_blocks a launch. Returns the number of
// blocks that left a sum.
template <typename In, FocalTask kTask>
int run(const CudaScope& scope, const MultilevelArgs& args, std::vector<Tensor>& gradients, const Tensor* grad,
        double* block_sums, int32_t* was_one, bool filled) {
  using T = compute_t<In>;
  require(args.num_classes <= kMaxClasses, "multilevel_focal_loss: logits must have at most ", kMaxClasses,
          " classes on CUDA, and have ", args.num_classes);
  MultilevelKernelArgs<T> kernel = {};
  kernel.targets = args.targets.const_data_ptr();
  kernel.wide_targets = args.targets.scalar_type() == ScalarType::Long;
  kernel.num_anchors = args.num_anchors;
  kernel.classes = static_cast<int>(args.num_classes);
  kernel.rows_per_tile = focal_rows_per_tile<In>(kernel.classes);
  kernel.scale = static_cast<T>(args.scale);
  kernel.gamma = finite_cast<T>(args.gamma);
  kernel.alpha_positive = static_cast<T>(args.alpha_positive());
  kernel.alpha_negative = static_cast<T>(args.alpha_negative());
  kernel.ignore_index = kMultilevelIgnore;
  if (args.normalizer.has_value()) {
    kernel.normalizer = static_cast<const T*>(args.normalizer->const_data_ptr());
    kernel.normalizer_per_image = args.normalizer->numel() != 1;
  }
  if (grad != nullptr) kernel.grad = static_cast<const float*>(grad->const_data_ptr());
  kernel.was_one = was_one;
  kernel.filled = filled;
  int blocks = 0;
  for (size_t i = 0; i < args.levels.size(); ++i) {
    const LogitLevel& level = args.levels[i];
    if (level.rows() > 0 && args.batch > 0) {
      const LevelMemory memory{level.logits.const_data_ptr(),
                               differentiates(kTask) ? gradients[i].mutable_data_ptr() : nullptr,
                               level.image_stride,
                               level.first_anchor,
                               level.anchors,
                               level.cells,
                               level.layout == LevelLayout::kPlanes};
      require(add_level<In>(memory, args.batch, kernel), "multilevel_focal_loss: logits[", i,
              "] are too large for CUDA, with ", level.rows(), " anchors an image and ", args.batch, " images");
    }
    if (kernel.num_levels == kMaxLevels || (i + 1 == args.levels.size() && kernel.num_levels > 0)) {
      kernel.block_sums = sums(kTask) ? block_sums + blocks : nullptr;
      blocks += launch<In, kTask>(scope, kernel);
      kernel.num_levels = 0;
      kernel.tiles = 0;
    }
  }
  return blocks;
}

Tensor block_sums_of(const CudaScope& scope, const MultilevelArgs& args) {
  const int64_t launches = (static_cast<int64_t>(args.levels.size()) + kMaxLevels - 1) / kMaxLevels;
  return torch::stable::new_empty(args.targets, {launches * max_blocks(scope)}, ScalarType::Double);
}

Tensor finish_sum(const CudaScope& scope, const MultilevelArgs& args, const Tensor& block_sums, int blocks) {
  Tensor loss = empty_scalar(args.targets, ScalarType::Float);
  focal_finish_kernel<float><<<1, kFocalThreads, 0, scope.stream()>>>(
      static_cast<const double*>(block_sums.const_data_ptr()), nullptr, blocks, false, 0, 0,
      static_cast<float*>(loss.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

Tensor multilevel_focal_loss_cuda(const std::vector<Tensor>& logits, const Tensor& targets,
                                  const std::optional<Tensor>& normalizer, int64_t num_classes, double alpha,
                                  double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  const CudaScope scope(targets);
  Tensor block_sums = block_sums_of(scope, args);
  std::vector<Tensor> none;
  const int blocks = with_storage_type(args.type, [&](auto storage) {
    return run<decltype(storage), FocalTask::kSum>(scope, args, none, nullptr,
                                                   static_cast<double*>(block_sums.mutable_data_ptr()), nullptr, false);
  });
  return finish_sum(scope, args, block_sums, blocks);
}

void backward_into(const CudaScope& scope, const MultilevelArgs& args, const Tensor& grad,
                   std::vector<Tensor>& gradients, int32_t* was_one, bool filled) {
  with_storage_type(args.type, [&](auto storage) {
    return run<decltype(storage), FocalTask::kGradient>(scope, args, gradients, &grad, nullptr, was_one, filled);
  });
}

std::vector<Tensor> multilevel_focal_loss_backward_cuda(const Tensor& grad, const std::vector<Tensor>& logits,
                                                        const Tensor& targets, const std::optional<Tensor>& normalizer,
                                                        int64_t num_classes, double alpha, double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  check_multilevel_grad(args, grad, "multilevel_focal_loss_backward");
  std::vector<Tensor> gradients = empty_gradients(logits, args);
  backward_into(CudaScope(targets), args, grad, gradients, nullptr, false);
  return gradients;
}

std::tuple<Tensor, std::vector<Tensor>> multilevel_focal_loss_with_grad_cuda(const std::vector<Tensor>& logits,
                                                                             const Tensor& targets,
                                                                             const std::optional<Tensor>& normalizer,
                                                                             int64_t num_classes, double alpha,
                                                                             double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  std::vector<Tensor> gradients = empty_gradients(logits, args);
  const CudaScope scope(targets);
  Tensor block_sums = block_sums_of(scope, args);
  const int blocks = with_storage_type(args.type, [&](auto storage) {
    return run<decltype(storage), FocalTask::kSumAndGradient>(
        scope, args, gradients, nullptr, static_cast<double*>(block_sums.mutable_data_ptr()), nullptr, false);
  });
  return {finish_sum(scope, args, block_sums, blocks), gradients};
}

void multilevel_focal_loss_refresh_grad_cuda(std::vector<Tensor> grad_logits, Tensor was_one, const Tensor& grad,
                                             const std::vector<Tensor>& logits, const Tensor& targets,
                                             const std::optional<Tensor>& normalizer, int64_t num_classes,
                                             double alpha, double gamma, double scale, bool filled) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  check_multilevel_refresh(args, grad, logits, grad_logits, was_one);
  const CudaScope scope(targets);
  backward_into(scope, args, grad, grad_logits, host_memory_on_device(was_one, "multilevel_focal_loss_refresh_grad"),
                filled);
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("multilevel_focal_loss", TORCH_BOX(&multilevel_focal_loss_cuda));
  m.impl("multilevel_focal_loss_backward", TORCH_BOX(&multilevel_focal_loss_backward_cuda));
  m.impl("multilevel_focal_loss_with_grad", TORCH_BOX(&multilevel_focal_loss_with_grad_cuda));
  m.impl("multilevel_focal_loss_refresh_grad", TORCH_BOX(&multilevel_focal_loss_refresh_grad_cuda));
}

}  // namespace
}  // namespace retinanet_ext
