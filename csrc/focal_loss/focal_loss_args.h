// What the CPU and the CUDA operator of the focal loss agree on: argument checks, layouts, shapes of the results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"

namespace retinanet_ext {

// torch's own numbering (at::Reduction).
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Arguments as the schema has them, checked once by both operators.
struct FocalLossArgs {
  torch::stable::Tensor inputs;   // [..., K] logits, float64/32/16 or bfloat16
  torch::stable::Tensor targets;  // [..., K] floating, or [...] int32/int64 class indices
  std::optional<torch::stable::Tensor> weight;       // [K], compute dtype, class indices only
  std::optional<torch::stable::Tensor> class_alpha;  // [K], compute dtype; replaces alpha
  double alpha;                                      // in [0, 1], or negative: no balancing
  double gamma;
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;

  bool soft() const {
    return is_floating(targets.scalar_type());
  }
  int64_t num_classes() const {
    return inputs.dim() == 0 ? 1 : inputs.size(inputs.dim() - 1);
  }
  int64_t num_rows() const {
    return num_classes() == 0 ? 0 : inputs.numel() / num_classes();
  }
  bool balanced() const {
    return alpha >= 0;
  }
};

inline bool same_sizes(const torch::stable::Tensor& a, const torch::stable::Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// A [K] tensor on the device of `inputs`, in the compute dtype and contiguous.
inline std::optional<torch::stable::Tensor> per_class(const std::optional<torch::stable::Tensor>& values,
                                                      const torch::stable::Tensor& inputs, const char* name) {
  if (!values.has_value()) return std::nullopt;
  const int64_t num_classes = inputs.dim() == 0 ? 1 : inputs.size(inputs.dim() - 1);
  require(values->dim() == 1 && values->size(0) == num_classes, "sigmoid_focal_loss: ", name, " must have shape [",
          num_classes, "], one value a class, and has shape ", shape_text(*values));
  require(values->device() == inputs.device(), "sigmoid_focal_loss: ", name, " and inputs must be on one device");
  const ScalarType type = compute_type(inputs.scalar_type());
  return torch::stable::contiguous(values->scalar_type() == type ? *values : torch::stable::to(*values, type));
}

inline FocalLossArgs make_focal_loss_args(const torch::stable::Tensor& inputs, const torch::stable::Tensor& targets,
                                          const std::optional<torch::stable::Tensor>& weight,
                                          const std::optional<torch::stable::Tensor>& class_alpha, double alpha,
                                          double gamma, double label_smoothing, int64_t ignore_index,
                                          int64_t reduction) {
  const ScalarType type = inputs.scalar_type();
  require(is_floating(type), "sigmoid_focal_loss: inputs must be float64, float32, float16 or bfloat16, and are ",
          type_name(type));
  require(targets.device() == inputs.device(), "sigmoid_focal_loss: inputs and targets must be on one device");
  const ScalarType target_type = targets.scalar_type();
  if (is_floating(target_type)) {
    require(targets.dim() == inputs.dim() && same_sizes(inputs, targets, inputs.dim()),
            "sigmoid_focal_loss: floating targets must have the shape of inputs, ", shape_text(inputs),
            ", and have shape ", shape_text(targets));
    require(target_type == type || target_type == compute_type(type), "sigmoid_focal_loss: floating targets of ",
            type_name(type), " inputs must be of the same dtype or ", type_name(compute_type(type)), ", and are ",
            type_name(target_type));
    require(!weight.has_value() && label_smoothing == 0,
            "sigmoid_focal_loss: weight and label_smoothing need integer targets");
  } else {
    require(target_type == ScalarType::Long || target_type == ScalarType::Int,
            "sigmoid_focal_loss: class targets must be int64 or int32, and are ", type_name(target_type));
    require(inputs.dim() >= 1 && targets.dim() == inputs.dim() - 1 && same_sizes(inputs, targets, targets.dim()),
            "sigmoid_focal_loss: integer targets must have the shape of inputs without its last dimension; inputs "
            "have shape ",
            shape_text(inputs), ", targets ", shape_text(targets));
  }
  require(alpha <= 1, "sigmoid_focal_loss: alpha must be in [0, 1], or negative for none, and is ", alpha);
  require(gamma >= 0 && std::isfinite(gamma), "sigmoid_focal_loss: gamma must be finite and >= 0, and is ", gamma);
  require(label_smoothing >= 0 && label_smoothing <= 1, "sigmoid_focal_loss: label_smoothing must be in [0, 1], and is ",
          label_smoothing);
  require(reduction >= 0 && reduction <= 2, "sigmoid_focal_loss: reduction must be 0 (none), 1 (mean) or 2 (sum), and is ",
          reduction);
  return {inputs,
          targets,
          per_class(weight, inputs, "weight"),
          per_class(class_alpha, inputs, "class_alpha"),
          alpha,
          gamma,
          label_smoothing,
          ignore_index,
          static_cast<Reduction>(reduction)};
}

// Whether the elements fill one block of memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const torch::stable::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> stride_size;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) stride_size.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(stride_size.begin(), stride_size.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : stride_size) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Elementwise work may walk memory in its own order where every tensor has the same one.
inline bool share_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return same_strides(a, b) && is_dense(a);
}

// The distance between rows of [..., K] when each row is contiguous and the rows are evenly spaced; -1 otherwise.
inline int64_t row_stride(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return -1;
  int64_t stride = tensor.size(last);  // of one row only
  int64_t expected = -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (expected < 0) {
      stride = tensor.stride(i);
    } else if (tensor.stride(i) != expected) {
      return -1;
    }
    expected = tensor.stride(i) * tensor.size(i);
  }
  return stride;
}

// An upstream gradient that is one number for every element, as the gradient of a sum is: expanded, all strides 0.
inline bool is_expanded_scalar(const torch::stable::Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != 0) return false;
  }
  return true;
}

// The upstream gradient has the shape of the loss, and its dtype is that of inputs or the compute dtype.
inline void check_grad(const FocalLossArgs& args, const torch::stable::Tensor& grad, const char* op) {
  const ScalarType type = args.inputs.scalar_type();
  require(grad.scalar_type() == type || grad.scalar_type() == compute_type(type),
          op, ": grad of ", type_name(type), " inputs must be of the same dtype or ",
          type_name(compute_type(type)), ", and is ", type_name(grad.scalar_type()));
  require(grad.device() == args.inputs.device(), op, ": grad and inputs must be on one device");
  const bool shaped = args.reduction == Reduction::kNone
                          ? grad.dim() == args.inputs.dim() && same_sizes(args.inputs, grad, grad.dim())
                          : grad.dim() == 0;
  require(shaped, op, ": grad must have the shape of the loss, and has shape ",
          shape_text(grad), " for inputs ", shape_text(args.inputs));
}

// Whether inputs, soft targets and `other` may be walked as they lie in memory.
inline bool share_one_layout(const FocalLossArgs& args, const torch::stable::Tensor& other) {
  return args.soft() && !args.class_alpha.has_value() && share_layout(args.inputs, args.targets) &&
         same_strides(args.inputs, other);
}

// Whether the upstream gradient is one number for all elements.
inline bool is_scalar_grad(const FocalLossArgs& args, const torch::stable::Tensor& grad) {
  return args.reduction != Reduction::kNone || (grad.numel() > 0 && is_expanded_scalar(grad));
}

// What the operators of one-pass training take: a sum or mean over class indices. (Over soft targets a compiler may round
// the loss otherwise where it computes the gradient too.)
inline void check_one_pass(const FocalLossArgs& args, const char* op) {
  require(args.reduction != Reduction::kNone, op, ": reduction must be 1 (mean) or 2 (sum), and is 0 (none)");
  require(!args.soft(), op, ": targets must be class indices, and are ", type_name(args.targets.scalar_type()));
}

// `was_one` is where a backward pass notes whether its upstream gradient was 1: memory the host can read at any time.
inline void check_was_one(const torch::stable::Tensor& was_one, const char* op) {
  require(was_one.scalar_type() == ScalarType::Int && was_one.numel() == 1 && was_one.is_cpu(), op,
          ": was_one must be one int32 in host memory");
}

inline void check_refresh(const FocalLossArgs& args, const torch::stable::Tensor& grad,
                          const torch::stable::Tensor& grad_inputs, const torch::stable::Tensor& was_one) {
  constexpr const char* kOp = "sigmoid_focal_loss_refresh_grad";
  check_one_pass(args, kOp);
  check_grad(args, grad, kOp);
  check_was_one(was_one, kOp);
  require(grad_inputs.scalar_type() == args.inputs.scalar_type() && grad_inputs.device() == args.inputs.device() &&
              grad_inputs.dim() == args.inputs.dim() && same_sizes(grad_inputs, args.inputs, args.inputs.dim()) &&
              grad_inputs.is_contiguous(),
          kOp, ": grad_inputs must be contiguous and have the shape, dtype and device of inputs");
}

inline torch::stable::Tensor empty_scalar(const torch::stable::Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, {}, type);
}

// Memory for the gradient: laid out as the inputs, or contiguous.
inline torch::stable::Tensor empty_gradient(const FocalLossArgs& args, bool keep_layout) {
  return keep_layout ? torch::stable::empty_like(args.inputs)
                     : torch::stable::new_empty(args.inputs, args.inputs.sizes());
}

}  // namespace retinanet_ext
