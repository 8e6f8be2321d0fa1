// Sigmoid focal loss on CUDA: launchers and operators around focal_loss_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include "focal_loss/focal_loss_args.h"
#include "focal_loss/focal_loss_kernel.cuh"
#include "focal_loss/focal_loss_launch.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMaxTileElements = 1 << 30;  // tile-relative offsets are 32-bit

template <typename T>
bool is_by_column(const FocalKernelArgs<T>& args) {
  return args.class_alpha != nullptr || args.half_smoothing != T(0);
}

template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
int launch_index(const CudaScope& scope, FocalKernelArgs<compute_t<In>>& args) {
  args.rows_per_tile = focal_rows_per_tile<In>(args.classes);
  args.tiles = (args.rows + args.rows_per_tile - 1) / args.rows_per_tile;
  const auto kernel = focal_index_kernel<In, kTask, kGamma, kByColumn>;
  const int blocks = scope.blocks_for(kFocalMinBlocks<In>, args.tiles);
  kernel<<<blocks, kFocalThreads, 0, scope.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return blocks;
}

template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
int launch_soft(const CudaScope& scope, FocalKernelArgs<compute_t<In>>& args) {
  constexpr int64_t kTileElements = kFocalVectorsPerThread * kFocalThreads * kVectorWidth<In>;
  args.tiles = (args.rows * args.classes + kTileElements - 1) / kTileElements;
  const auto kernel = focal_soft_kernel<In, kTask, kGamma, kByColumn>;
  const int blocks = scope.blocks_for(kFocalMinBlocks<In>, args.tiles);
  kernel<<<blocks, kFocalThreads, 0, scope.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return blocks;
}

// Chooses the kernel: float64 has one general variant; others one for gamma = 2, one for any gamma, and one for
// smoothing or alpha by class. Returns the number of blocks launched.
template <typename In, FocalTask kTask>
int launch_index(const CudaScope& scope, FocalKernelArgs<compute_t<In>>& args) {
  if (is_by_column(args)) return launch_index<In, kTask, Gamma::kAny, true>(scope, args);
  if constexpr (sizeof(compute_t<In>) == sizeof(float)) {
    if (args.gamma == 2) return launch_index<In, kTask, Gamma::kTwo, false>(scope, args);
  }
  return launch_index<In, kTask, Gamma::kAny, false>(scope, args);
}

template <typename In, FocalTask kTask>
int launch_soft(const CudaScope& scope, FocalKernelArgs<compute_t<In>>& args) {
  if (is_by_column(args)) return launch_soft<In, kTask, Gamma::kAny, true>(scope, args);
  if constexpr (sizeof(compute_t<In>) == sizeof(float)) {
    if (args.gamma == 2) return launch_soft<In, kTask, Gamma::kTwo, false>(scope, args);
  }
  return launch_soft<In, kTask, Gamma::kAny, false>(scope, args);
}

template <typename In, FocalTask kTask>
int launch(const CudaScope& scope, FocalKernelArgs<compute_t<In>>& args, bool soft) {
  return soft ? launch_soft<In, kTask>(scope, args) : launch_index<In, kTask>(scope, args);
}

// A tensor the vector loads can read: contiguous from a 16-byte boundary on.
Tensor readable(const Tensor& tensor) {
  const Tensor packed = torch::stable::contiguous(tensor);
  return is_vector_aligned(packed.const_data_ptr()) ? packed : torch::stable::clone(packed);
}

struct Prepared {
  Tensor inputs;
  Tensor targets;
};

Prepared prepare_tensors(const FocalLossArgs& args, bool keep_layout) {
  // With one shared dense layout memory order does for both; a misaligned start still needs a copy, which clone makes
  // in the same layout.
  const auto as_is = [](const Tensor& tensor) {
    return is_vector_aligned(tensor.const_data_ptr()) ? tensor : torch::stable::clone(tensor);
  };
  if (keep_layout) return {as_is(args.inputs), as_is(args.targets)};
  return {readable(args.inputs), args.soft() ? readable(args.targets) : torch::stable::contiguous(args.targets)};
}

template <typename T>
FocalKernelArgs<T> kernel_args(const FocalLossArgs& args, const Prepared& prepared) {
  require(args.num_classes() <= kMaxTileElements / 8, "sigmoid_focal_loss: inputs must have at most ",
          kMaxTileElements / 8, " classes on CUDA, and have ", args.num_classes());
  FocalKernelArgs<T> kernel = {};
  const ScalarType type = prepared.inputs.scalar_type();
  const ScalarType target_type = prepared.targets.scalar_type();
  kernel.inputs = prepared.inputs.const_data_ptr();
  kernel.targets = prepared.targets.const_data_ptr();
  kernel.wide_targets = args.soft() ? target_type != type : target_type == ScalarType::Long;
  kernel.rows = args.num_rows();
  kernel.classes = static_cast<int>(args.num_classes());
  kernel.gamma = finite_cast<T>(args.gamma);
  const bool balanced = args.balanced() && !args.class_alpha.has_value();
  kernel.alpha_positive = balanced ? static_cast<T>(args.alpha) : T(1);
  kernel.alpha_negative = balanced ? static_cast<T>(1 - args.alpha) : T(1);
  kernel.half_smoothing = static_cast<T>(args.label_smoothing / 2);
  if (args.class_alpha.has_value()) kernel.class_alpha = static_cast<const T*>(args.class_alpha->const_data_ptr());
  if (args.weight.has_value()) kernel.weight = static_cast<const T*>(args.weight->const_data_ptr());
  kernel.ignore_index = args.ignore_index;
  kernel.mean = args.reduction == Reduction::kMean;
  return kernel;
}

// Memory for the two stages of a sum.
struct SumWorkspace {
  Tensor block_sums;
  Tensor block_ignored;

  SumWorkspace(const CudaScope& scope, const FocalLossArgs& args)
      : block_sums(torch::stable::new_empty(args.inputs, {max_blocks(scope)}, ScalarType::Double)),
        block_ignored(torch::stable::new_empty(args.inputs, {max_blocks(scope)}, ScalarType::Long)) {}

  double* sums() {
    return static_cast<double*>(block_sums.mutable_data_ptr());
  }
  // Where ignored rows are counted: the mean over class indices. Null otherwise.
  int64_t* ignored(const FocalLossArgs& args) {
    const bool counts = args.reduction == Reduction::kMean && !args.soft();
    return counts ? static_cast<int64_t*>(block_ignored.mutable_data_ptr()) : nullptr;
  }
};

// Second stage: the sum or mean of what `blocks` blocks left in the workspace; of none, 0 or NaN.
template <typename T>
Tensor finish_sum(const CudaScope& scope, const FocalLossArgs& args, SumWorkspace& workspace, int blocks) {
  Tensor loss = empty_scalar(args.inputs, compute_type(args.inputs.scalar_type()));
  focal_finish_kernel<T><<<1, kFocalThreads, 0, scope.stream()>>>(
      workspace.sums(), workspace.ignored(args), blocks, args.reduction == Reduction::kMean, args.num_rows(),
      static_cast<int>(args.num_classes()), static_cast<T*>(loss.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

template <typename In>
Tensor forward(const FocalLossArgs& args, bool float32_loss) {
  using T = compute_t<In>;
  const CudaScope scope(args.inputs);
  const ScalarType type = args.inputs.scalar_type();
  if (args.reduction == Reduction::kNone) {
    const bool widen = float32_loss && is_half(type);
    const bool keep_layout = !widen && share_one_layout(args, args.inputs);
    Tensor loss = keep_layout ? torch::stable::empty_like(args.inputs)
                              : torch::stable::new_empty(args.inputs, args.inputs.sizes(),
                                                         widen ? ScalarType::Float : type);
    if (args.inputs.numel() == 0) return loss;
    const Prepared prepared = prepare_tensors(args, keep_layout);
    FocalKernelArgs<T> kernel = kernel_args<T>(args, prepared);
    kernel.result = loss.mutable_data_ptr();
    kernel.wide_result = widen;
    launch<In, FocalTask::kLoss>(scope, kernel, args.soft());
    return loss;
  }
  SumWorkspace workspace(scope, args);
  int blocks = 0;
  if (args.inputs.numel() > 0) {
    const Prepared prepared = prepare_tensors(args, share_one_layout(args, args.inputs));
    FocalKernelArgs<T> kernel = kernel_args<T>(args, prepared);
    kernel.block_sums = workspace.sums();
    kernel.block_ignored = workspace.ignored(args);
    blocks = launch<In, FocalTask::kSum>(scope, kernel, args.soft());
  }
  return finish_sum<T>(scope, args, workspace, blocks);
}

void count_ignored(const CudaScope& scope, const FocalLossArgs& args, const Tensor& targets, const Tensor& ignored) {
  const int64_t rows = args.num_rows();
  const int64_t blocks_needed = (rows + kFocalThreads - 1) / kFocalThreads;
  const int blocks = static_cast<int>(std::min(blocks_needed, max_blocks(scope)));
  auto* count = static_cast<unsigned long long*>(ignored.mutable_data_ptr());
  if (targets.scalar_type() == ScalarType::Long) {
    count_ignored_kernel<<<blocks, kFocalThreads, 0, scope.stream()>>>(
        static_cast<const int64_t*>(targets.const_data_ptr()), rows, args.ignore_index, count);
  } else {
    count_ignored_kernel<<<blocks, kFocalThreads, 0, scope.stream()>>>(
        static_cast<const int32_t*>(targets.const_data_ptr()), rows, args.ignore_index, count);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// For the gradient of a mean over class indices: the number of ignored rows, on the device. Keeps it in `memory`.
template <typename T>
void set_ignored(const CudaScope& scope, const FocalLossArgs& args, const Prepared& prepared,
                 FocalKernelArgs<T>& kernel, std::optional<Tensor>& memory) {
  if (!kernel.mean || args.soft()) return;
  memory = torch::stable::new_zeros(args.inputs, {1}, ScalarType::Long);
  count_ignored(scope, args, prepared.targets, *memory);
  kernel.ignored = static_cast<const int64_t*>(memory->const_data_ptr());
}

// Sum or mean and its gradient in one pass.
template <typename In>
std::tuple<Tensor, Tensor> forward_with_grad(const FocalLossArgs& args) {
  using T = compute_t<In>;
  const CudaScope scope(args.inputs);
  Tensor grad_inputs = empty_gradient(args, false);
  SumWorkspace workspace(scope, args);
  int blocks = 0;
  if (args.inputs.numel() > 0) {
    const Prepared prepared = prepare_tensors(args, false);
    FocalKernelArgs<T> kernel = kernel_args<T>(args, prepared);
    std::optional<Tensor> ignored;
    set_ignored(scope, args, prepared, kernel, ignored);
    kernel.block_sums = workspace.sums();
    kernel.block_ignored = workspace.ignored(args);
    kernel.result = grad_inputs.mutable_data_ptr();
    blocks = launch_index<In, FocalTask::kSumAndGradient>(scope, kernel);
  }
  return {finish_sum<T>(scope, args, workspace, blocks), grad_inputs};
}

// Into `grad_inputs`, which is contiguous or, where `keep_layout`, laid out as the inputs. `was_one`, on the device,
// notes whether the upstream gradient was 1, and where `filled`, that leaves grad_inputs as it is.
template <typename In>
void backward_into(const CudaScope& scope, const FocalLossArgs& args, const Tensor& grad, bool keep_layout,
                   Tensor& grad_inputs, int32_t* was_one, bool filled) {
  using T = compute_t<In>;
  const bool scalar_grad = is_scalar_grad(args, grad);
  const Prepared prepared = prepare_tensors(args, keep_layout);
  const Tensor upstream = scalar_grad ? grad
                          : keep_layout && is_vector_aligned(grad.const_data_ptr()) ? grad
                          : keep_layout ? torch::stable::clone(grad)
                                        : readable(grad);
  FocalKernelArgs<T> kernel = kernel_args<T>(args, prepared);
  kernel.result = grad_inputs.mutable_data_ptr();
  kernel.grad = upstream.const_data_ptr();
  kernel.wide_grad = upstream.scalar_type() != args.inputs.scalar_type();
  kernel.scalar_grad = scalar_grad;
  kernel.was_one = was_one;
  kernel.filled = filled;
  std::optional<Tensor> ignored;
  set_ignored(scope, args, prepared, kernel, ignored);
  launch<In, FocalTask::kGradient>(scope, kernel, args.soft());
}

template <typename In>
Tensor backward(const FocalLossArgs& args, const Tensor& grad) {
  const CudaScope scope(args.inputs);
  const bool keep_layout = share_one_layout(args, is_scalar_grad(args, grad) ? args.inputs : grad);
  Tensor grad_inputs = empty_gradient(args, keep_layout);
  if (args.inputs.numel() > 0) backward_into<In>(scope, args, grad, keep_layout, grad_inputs, nullptr, false);
  return grad_inputs;
}

Tensor sigmoid_focal_loss_cuda(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& class_alpha, double alpha, double gamma,
                               double label_smoothing, int64_t ignore_index, int64_t reduction, bool float32_loss) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  return with_storage_type(inputs.scalar_type(),
                           [&](auto storage) { return forward<decltype(storage)>(args, float32_loss); });
}

Tensor sigmoid_focal_loss_backward_cuda(const Tensor& grad, const Tensor& inputs, const Tensor& targets,
                                        const std::optional<Tensor>& weight, const std::optional<Tensor>& class_alpha,
                                        double alpha, double gamma, double label_smoothing, int64_t ignore_index,
                                        int64_t reduction) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_grad(args, grad, "sigmoid_focal_loss_backward");
  return with_storage_type(inputs.scalar_type(), [&](auto storage) { return backward<decltype(storage)>(args, grad); });
}

std::tuple<Tensor, Tensor> sigmoid_focal_loss_with_grad_cuda(const Tensor& inputs, const Tensor& targets,
                                                             const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& class_alpha, double alpha,
                                                             double gamma, double label_smoothing, int64_t ignore_index,
                                                             int64_t reduction) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_one_pass(args, "sigmoid_focal_loss_with_grad");
  return with_storage_type(inputs.scalar_type(),
                           [&](auto storage) { return forward_with_grad<decltype(storage)>(args); });
}

void sigmoid_focal_loss_refresh_grad_cuda(Tensor grad_inputs, Tensor was_one, const Tensor& grad, const Tensor& inputs,
                                          const Tensor& targets, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& class_alpha, double alpha, double gamma,
                                          double label_smoothing, int64_t ignore_index, int64_t reduction, bool filled) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_refresh(args, grad, grad_inputs, was_one);
  require(is_vector_aligned(grad_inputs.const_data_ptr()),
          "sigmoid_focal_loss_refresh_grad: grad_inputs must begin on a 16-byte boundary");
  if (inputs.numel() == 0) return;
  with_storage_type(inputs.scalar_type(), [&](auto storage) {
    const CudaScope scope(args.inputs);
    backward_into<decltype(storage)>(scope, args, grad, false, grad_inputs,
                                     host_memory_on_device(was_one, "sigmoid_focal_loss_refresh_grad"), filled);
  });
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cuda));
  m.impl("sigmoid_focal_loss_with_grad", TORCH_BOX(&sigmoid_focal_loss_with_grad_cuda));
  m.impl("sigmoid_focal_loss_refresh_grad", TORCH_BOX(&sigmoid_focal_loss_refresh_grad_cuda));
}

}  // namespace
}  // namespace retinanet_ext
