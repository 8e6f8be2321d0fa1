// Sigmoid focal loss on the CPU: loss, sum, gradient, and sum with gradient in one pass.
//
// What the operators check, prepare and return; focal_loss_chunks.h says what does the work.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "focal_loss/focal_loss_args.h"
#include "focal_loss/focal_loss_chunks.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

template <FocalTask kTask, typename T>
double run(const FocalWork<T>& work, bool soft) {
  return soft ? run_soft<kTask>(work) : run_rows<kTask>(work);
}

// The operator's tensors, in a layout the kernel reads, and what of the work follows from them.
template <typename T>
struct Prepared {
  Tensor inputs;
  Tensor targets;
  std::vector<T> class_alpha;  // [2, K]: positive, negative
  FocalWork<T> work;
};

template <typename T>
Prepared<T> prepare(const FocalLossArgs& args, bool keep_layout) {
  Prepared<T> prepared;
  const int64_t k = args.num_classes();
  const bool soft = args.soft();
  const bool readable = soft ? keep_layout : row_stride(args.inputs) >= 0;
  prepared.inputs = readable ? args.inputs : torch::stable::contiguous(args.inputs);
  prepared.targets = soft && keep_layout ? args.targets : torch::stable::contiguous(args.targets);
  FocalWork<T>& work = prepared.work;
  work = {};
  work.inputs = prepared.inputs.const_data_ptr();
  work.input_type = prepared.inputs.scalar_type();
  work.row_stride = soft ? k : row_stride(prepared.inputs);
  work.num_rows = args.num_rows();
  work.num_classes = k;
  work.targets = prepared.targets.const_data_ptr();
  work.target_type = prepared.targets.scalar_type();
  work.grad_scale = T(1);
  work.gamma = finite_cast<T>(args.gamma);
  work.alpha_positive = args.balanced() && !args.class_alpha ? static_cast<T>(args.alpha) : T(1);
  work.alpha_negative = args.balanced() && !args.class_alpha ? static_cast<T>(1 - args.alpha) : T(1);
  work.half_smoothing = static_cast<T>(args.label_smoothing / 2);
  if (args.class_alpha.has_value()) {
    const T* alpha = static_cast<const T*>(args.class_alpha->const_data_ptr());
    prepared.class_alpha.resize(2 * k);
    for (int64_t i = 0; i < k; ++i) {
      prepared.class_alpha[i] = alpha[i] < T(0) ? T(1) : alpha[i];
      prepared.class_alpha[k + i] = alpha[i] < T(0) ? T(1) : T(1) - alpha[i];
    }
    // Moving `prepared` out leaves the vector's memory where it is.
    work.class_alpha_positive = prepared.class_alpha.data();
    work.class_alpha_negative = prepared.class_alpha.data() + k;
  }
  work.weight = args.weight.has_value() ? static_cast<const T*>(args.weight->const_data_ptr()) : nullptr;
  work.ignore_index = args.ignore_index;
  return prepared;
}

// Elements that count in the mean.
template <typename T>
double count_elements(const FocalWork<T>& work, bool soft) {
  int64_t rows = work.num_rows;
  if (!soft) {
    for (int64_t row = 0; row < work.num_rows; ++row) rows -= row_class(work, row) == work.ignore_index;
  }
  return static_cast<double>(rows) * static_cast<double>(work.num_classes);
}

template <typename T>
void set_result(FocalWork<T>& work, Tensor& result) {
  const size_t bytes = static_cast<size_t>(result.numel()) * result.element_size();
  set_result(work, result.mutable_data_ptr(), result.scalar_type(), bytes);
  prefer_huge_pages(work.result, bytes);
}

template <typename T>
Tensor finish_sum(const FocalLossArgs& args, const FocalWork<T>& work, double sum) {
  if (args.reduction == Reduction::kMean) sum /= count_elements(work, args.soft());
  Tensor loss = empty_scalar(args.inputs, compute_type(args.inputs.scalar_type()));
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum);
  return loss;
}

template <typename T>
Tensor forward(const FocalLossArgs& args, bool float32_loss) {
  const bool soft = args.soft();
  const ScalarType type = args.inputs.scalar_type();
  if (args.reduction != Reduction::kNone) {
    const Prepared<T> prepared = prepare<T>(args, share_one_layout(args, args.inputs));
    return finish_sum(args, prepared.work, run<FocalTask::kSum>(prepared.work, soft));
  }
  const bool widen = float32_loss && is_half(type);
  const bool keep_layout = !widen && share_one_layout(args, args.inputs);
  Prepared<T> prepared = prepare<T>(args, keep_layout);
  Tensor loss = keep_layout
                    ? torch::stable::empty_like(args.inputs)
                    : torch::stable::new_empty(args.inputs, args.inputs.sizes(), widen ? ScalarType::Float : type);
  set_result(prepared.work, loss);
  run<FocalTask::kLoss>(prepared.work, soft);
  return loss;
}

// Sum or mean and its gradient in one pass.
template <typename T>
std::tuple<Tensor, Tensor> forward_with_grad(const FocalLossArgs& args) {
  Prepared<T> prepared = prepare<T>(args, false);
  FocalWork<T>& work = prepared.work;
  Tensor grad_inputs = empty_gradient(args, false);
  set_result(work, grad_inputs);
  if (args.reduction == Reduction::kMean) work.grad_scale = static_cast<T>(1 / count_elements(work, false));
  const double sum = run_rows<FocalTask::kSumAndGradient>(work);
  return {finish_sum(args, work, sum), grad_inputs};
}

// Into `grad_inputs`, which is contiguous or, where `keep_layout`, laid out as the inputs.
template <typename T>
void backward_into(const FocalLossArgs& args, const Tensor& grad, bool keep_layout, Tensor& grad_inputs) {
  const bool soft = args.soft();
  Prepared<T> prepared = prepare<T>(args, keep_layout);
  FocalWork<T>& work = prepared.work;
  const bool scalar_grad = is_scalar_grad(args, grad);
  const Tensor upstream = scalar_grad || keep_layout ? grad : torch::stable::contiguous(grad);
  if (scalar_grad) {
    work.grad_scale = read_scalar<T>(upstream);
    if (args.reduction == Reduction::kMean) {
      work.grad_scale = static_cast<T>(work.grad_scale / count_elements(work, soft));
    }
  } else {
    work.grad = upstream.const_data_ptr();
    work.grad_type = upstream.scalar_type();
  }
  set_result(work, grad_inputs);
  run<FocalTask::kGradient>(work, soft);
}

template <typename T>
Tensor backward(const FocalLossArgs& args, const Tensor& grad) {
  const bool keep_layout =
      share_one_layout(args, is_scalar_grad(args, grad) ? args.inputs : grad);
  Tensor grad_inputs = empty_gradient(args, keep_layout);
  if (args.inputs.numel() > 0) backward_into<T>(args, grad, keep_layout, grad_inputs);
  return grad_inputs;
}

template <typename T>
void refresh_gradient(const FocalLossArgs& args, const Tensor& grad, Tensor& grad_inputs, Tensor& was_one, bool filled) {
  const bool is_one = read_scalar<T>(grad) == T(1);
  *static_cast<int32_t*>(was_one.mutable_data_ptr()) = is_one;
  if ((filled && is_one) || args.inputs.numel() == 0) return;
  backward_into<T>(args, grad, false, grad_inputs);
}

Tensor sigmoid_focal_loss_cpu(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& class_alpha, double alpha, double gamma,
                              double label_smoothing, int64_t ignore_index, int64_t reduction, bool float32_loss) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  return inputs.scalar_type() == ScalarType::Double ? forward<double>(args, float32_loss)
                                                    : forward<float>(args, float32_loss);
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad, const Tensor& inputs, const Tensor& targets,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& class_alpha,
                                       double alpha, double gamma, double label_smoothing, int64_t ignore_index,
                                       int64_t reduction) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_grad(args, grad, "sigmoid_focal_loss_backward");
  return inputs.scalar_type() == ScalarType::Double ? backward<double>(args, grad) : backward<float>(args, grad);
}

std::tuple<Tensor, Tensor> sigmoid_focal_loss_with_grad_cpu(const Tensor& inputs, const Tensor& targets,
                                                            const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& class_alpha, double alpha,
                                                            double gamma, double label_smoothing, int64_t ignore_index,
                                                            int64_t reduction) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_one_pass(args, "sigmoid_focal_loss_with_grad");
  return inputs.scalar_type() == ScalarType::Double ? forward_with_grad<double>(args) : forward_with_grad<float>(args);
}

void sigmoid_focal_loss_refresh_grad_cpu(Tensor grad_inputs, Tensor was_one, const Tensor& grad, const Tensor& inputs,
                                         const Tensor& targets, const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& class_alpha, double alpha, double gamma,
                                         double label_smoothing, int64_t ignore_index, int64_t reduction, bool filled) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_refresh(args, grad, grad_inputs, was_one);
  if (inputs.scalar_type() == ScalarType::Double) {
    refresh_gradient<double>(args, grad, grad_inputs, was_one, filled);
  } else {
    refresh_gradient<float>(args, grad, grad_inputs, was_one, filled);
  }
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cpu));
  m.impl("sigmoid_focal_loss_with_grad", TORCH_BOX(&sigmoid_focal_loss_with_grad_cpu));
  m.impl("sigmoid_focal_loss_refresh_grad", TORCH_BOX(&sigmoid_focal_loss_refresh_grad_cpu));
}

}  // namespace
}  // namespace retinanet_ext
