// What the CPU and the CUDA operator of the multi-level focal loss agree on: argument checks, and how each level lies
// in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/logit_level.h"
#include "focal_loss/focal_loss_args.h"

namespace retinanet_ext {

constexpr int64_t kMultilevelIgnore = -2;  // the target that leaves an anchor out

struct MultilevelArgs {
  std::vector<LogitLevel> levels;
  torch::stable::Tensor targets;                    // [B, N] int32 or int64, contiguous
  std::optional<torch::stable::Tensor> normalizer;  // 1 or [B] of the compute dtype, contiguous
  ScalarType type;
  int64_t batch;
  int64_t num_anchors;  // N
  int64_t num_classes;  // K
  double alpha;         // in [0, 1], or negative: no balancing
  double gamma;
  double scale;  // factor of the loss

  double alpha_positive() const {
    return alpha < 0 ? 1 : alpha;
  }
  double alpha_negative() const {
    return alpha < 0 ? 1 : 1 - alpha;
  }
};

inline MultilevelArgs make_multilevel_args(const std::vector<torch::stable::Tensor>& logits,
                                           const torch::stable::Tensor& targets,
                                           const std::optional<torch::stable::Tensor>& normalizer, int64_t num_classes,
                                           double alpha, double gamma, double scale) {
  constexpr const char* kOp = "multilevel_focal_loss";
  require(!logits.empty(), kOp, ": logits must hold at least one level");
  const ScalarType target_type = targets.scalar_type();
  require(targets.dim() == 2 && (target_type == ScalarType::Long || target_type == ScalarType::Int), kOp,
          ": targets must be int64 or int32 of shape [B, N], and are ", type_name(target_type), " of shape ",
          shape_text(targets));
  require(num_classes >= 1, kOp, ": num_classes must be at least 1, and is ", num_classes);
  require(alpha <= 1, kOp, ": alpha must be in [0, 1], or negative for none, and is ", alpha);
  require(gamma >= 0 && std::isfinite(gamma), kOp, ": gamma must be finite and >= 0, and is ", gamma);
  const ScalarType type = logits[0].scalar_type();
  MultilevelArgs args{{},    torch::stable::contiguous(targets), std::nullopt, type, targets.size(0), targets.size(1),
                      num_classes, alpha, gamma, scale};
  int64_t anchors = 0;
  for (const torch::stable::Tensor& level : logits) {
    require(is_floating(level.scalar_type()) && level.scalar_type() == type, kOp,
            ": logits must share one floating dtype; there are ", type_name(type), " and ",
            type_name(level.scalar_type()));
    require(level.device() == targets.device(), kOp, ": logits and targets must be on one device");
    require((level.dim() == 3 && level.size(2) == num_classes) ||
                (level.dim() == 4 && level.size(1) % num_classes == 0),
            kOp, ": each level must be [B, A*K, H, W] or [B, n, K] with K = ", num_classes, ", and one has shape ",
            shape_text(level));
    require(level.size(0) == args.batch, kOp, ": logits and targets must have one batch size; targets are ",
            shape_text(targets), ", a level ", shape_text(level));
    args.levels.push_back(describe_level(level, num_classes, anchors));
    anchors += args.levels.back().rows();
  }
  require(anchors == args.num_anchors, kOp, ": targets name ", args.num_anchors, " anchors an image, and logits hold ",
          anchors);
  if (normalizer.has_value()) {
    require(normalizer->numel() == 1 || (normalizer->dim() == 1 && normalizer->size(0) == args.batch), kOp,
            ": normalizer must be a scalar or have shape [", args.batch, "], and has shape ", shape_text(*normalizer));
    require(normalizer->device() == targets.device() && normalizer->scalar_type() == compute_type(type), kOp,
            ": normalizer must be ", type_name(compute_type(type)), " on the device of logits");
    args.normalizer = torch::stable::contiguous(*normalizer);
  }
  return args;
}

// Memory for each level's gradient, laid out as the level where that is one of the layouts above.
inline std::vector<torch::stable::Tensor> empty_gradients(const std::vector<torch::stable::Tensor>& logits,
                                                          const MultilevelArgs& args) {
  std::vector<torch::stable::Tensor> gradients;
  for (size_t i = 0; i < logits.size(); ++i) {
    gradients.push_back(args.levels[i].channels_last
                            ? torch::stable::empty_like(logits[i])
                            : torch::stable::new_empty(logits[i], logits[i].sizes()));
  }
  return gradients;
}

inline void check_multilevel_grad(const MultilevelArgs& args, const torch::stable::Tensor& grad, const char* op) {
  require(grad.dim() == 0 && grad.scalar_type() == ScalarType::Float && grad.device() == args.targets.device(), op,
          ": grad must be a float32 scalar on the device of logits");
}

inline void check_multilevel_refresh(const MultilevelArgs& args, const torch::stable::Tensor& grad,
                                     const std::vector<torch::stable::Tensor>& logits,
                                     const std::vector<torch::stable::Tensor>& gradients,
                                     const torch::stable::Tensor& was_one) {
  constexpr const char* kOp = "multilevel_focal_loss_refresh_grad";
  check_multilevel_grad(args, grad, kOp);
  check_was_one(was_one, kOp);
  require(gradients.size() == logits.size(), kOp, ": grad_logits must hold one tensor a level");
  for (size_t i = 0; i < logits.size(); ++i) {
    require(gradients[i].scalar_type() == args.type && gradients[i].device() == logits[i].device() &&
                gradients[i].dim() == logits[i].dim() && same_sizes(gradients[i], logits[i], logits[i].dim()),
            kOp, ": each of grad_logits must have the shape, dtype and device of its level");
    require(args.levels[i].channels_last ? same_strides(gradients[i], logits[i]) : gradients[i].is_contiguous(), kOp,
            ": each of grad_logits must be laid out as its level where that is channels_last, and be contiguous "
            "otherwise");
  }
}

}  // namespace retinanet_ext
