// What the CPU and the CUDA operator of the box regression loss agree on: argument checks, and how each level lies in
// memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "box_loss/box_loss_math.h"
#include "common/checks.h"
#include "common/delta_level.h"
#include "common/dispatch.h"
#include "cuda/vec.cuh"

namespace retinanet_ext {

struct BoxLossArgs {
  std::vector<DeltaLevel> levels;
  torch::stable::Tensor anchors;                    // [N, 4] or [B, N, 4], compute dtype; each image's are contiguous
  std::vector<torch::stable::Tensor> gt_boxes;      // [M_i, 4] an image, or one [capacity, 4]; as the anchors
  std::optional<torch::stable::Tensor> gt_offsets;  // [B + 1] int32, contiguous
  torch::stable::Tensor matched;                    // [B, N] int32 or int64, contiguous
  std::optional<torch::stable::Tensor> normalizer;  // 1 or [B] of the compute dtype, contiguous
  ScalarType type;                                  // of the deltas
  int64_t batch;
  int64_t num_anchors;  // N
  BoxLoss loss;
  double beta;
  double weights[4];
  double scale;  // factor of the loss

  int64_t anchor_image_stride() const {
    return anchors.dim() == 3 ? anchors.stride(0) : 0;
  }

  template <typename T>
  BoxLossOptions<T> options() const {
    return {loss, static_cast<T>(beta),
            CoderWeights<T>{static_cast<T>(weights[0]), static_cast<T>(weights[1]), static_cast<T>(weights[2]),
                            static_cast<T>(weights[3])}};
  }
};

constexpr const char* kBoxLossOp = "box_regression_loss";

// Boxes in the compute dtype on the device of the deltas, [..., 4], every image's contiguous.
inline torch::stable::Tensor compute_boxes(const torch::stable::Tensor& boxes, int64_t dims, const char* name,
                                           const torch::stable::Tensor& matched, ScalarType type) {
  require(is_floating(boxes.scalar_type()) && (boxes.dim() == 2 || boxes.dim() == dims) &&
              boxes.size(boxes.dim() - 1) == 4,
          kBoxLossOp, ": ", name, " must be floating, of shape [n, 4], and are ", type_name(boxes.scalar_type()),
          " of shape ", shape_text(boxes));
  require(boxes.device() == matched.device(), kBoxLossOp, ": ", name, " and matched must be on one device");
  const torch::stable::Tensor wide =
      boxes.scalar_type() == type ? boxes : torch::stable::to(boxes, type);
  const int64_t last = wide.dim() - 1;
  const bool readable = wide.stride(last) == 1 && (wide.size(last - 1) <= 1 || wide.stride(last - 1) == 4);
  return readable ? wide : torch::stable::contiguous(wide);
}

inline void check_deltas(const torch::stable::Tensor& level, const BoxLossArgs& args) {
  require(is_floating(level.scalar_type()) && level.scalar_type() == args.type, kBoxLossOp,
          ": deltas must share one floating dtype; there are ", type_name(args.type), " and ",
          type_name(level.scalar_type()));
  require(level.device() == args.matched.device(), kBoxLossOp, ": deltas and matched must be on one device");
  require((level.dim() == 3 && level.size(2) == 4) || (level.dim() == 4 && level.size(1) % 4 == 0), kBoxLossOp,
          ": each level of deltas must be [B, 4 * A, H, W] or [B, n, 4], and one has shape ", shape_text(level));
  require(level.size(0) == args.batch, kBoxLossOp, ": deltas and matched must have one batch size; matched is ",
          shape_text(args.matched), ", a level ", shape_text(level));
}

inline void check_gt_boxes(const BoxLossArgs& args, const std::optional<torch::stable::Tensor>& gt_offsets) {
  const int64_t lists = static_cast<int64_t>(args.gt_boxes.size());
  if (!gt_offsets.has_value()) {
    require(lists == args.batch, kBoxLossOp, ": gt_boxes must be those of ", args.batch, " images, and are ", lists);
    return;
  }
  require(lists == 1, kBoxLossOp, ": gt_boxes must be one tensor where there are gt_offsets, and are ", lists);
  require(gt_offsets->scalar_type() == ScalarType::Int && gt_offsets->dim() == 1 &&
              gt_offsets->size(0) == args.batch + 1 && gt_offsets->device() == args.matched.device(),
          kBoxLossOp, ": gt_offsets must be int32 of shape [", args.batch + 1, "] on the device of matched");
}

inline BoxLossArgs make_box_loss_args(const std::vector<torch::stable::Tensor>& deltas,
                                      const torch::stable::Tensor& anchors,
                                      const std::vector<torch::stable::Tensor>& gt_boxes,
                                      const std::optional<torch::stable::Tensor>& gt_offsets,
                                      const torch::stable::Tensor& matched,
                                      const std::optional<torch::stable::Tensor>& normalizer, int64_t loss, double beta,
                                      double wx, double wy, double ww, double wh, double scale) {
  require(!deltas.empty(), kBoxLossOp, ": deltas must hold at least one level");
  const ScalarType matched_type = matched.scalar_type();
  require(matched.dim() == 2 && (matched_type == ScalarType::Long || matched_type == ScalarType::Int), kBoxLossOp,
          ": matched must be int64 or int32 of shape [B, N], and is ", type_name(matched_type), " of shape ",
          shape_text(matched));
  require(loss >= 0 && loss <= 2, kBoxLossOp, ": loss must be 0 (l1), 1 (smooth_l1) or 2 (giou), and is ", loss);
  require(beta >= 0, kBoxLossOp, ": beta must be at least 0, and is ", beta);
  require(wx > 0 && wy > 0 && ww > 0 && wh > 0, kBoxLossOp, ": weights must be positive");
  const ScalarType type = deltas[0].scalar_type();
  const ScalarType compute = compute_type(type);
  // Without a rounded part smooth_l1 is l1, and its gradient at a distance of zero is l1's too.
  const bool smooth = compute == ScalarType::Double ? beta > 0 : static_cast<float>(beta) > 0;
  const BoxLoss kind = static_cast<BoxLoss>(loss);
  BoxLossArgs args{{},
                   compute_boxes(anchors, 3, "anchors", matched, compute),
                   {},
                   std::nullopt,
                   torch::stable::contiguous(matched),
                   std::nullopt,
                   type,
                   matched.size(0),
                   matched.size(1),
                   kind == BoxLoss::kSmoothL1 && !smooth ? BoxLoss::kL1 : kind,
                   beta,
                   {wx, wy, ww, wh},
                   scale};
  int64_t count = 0;
  for (const torch::stable::Tensor& level : deltas) {
    check_deltas(level, args);
    args.levels.push_back(describe_deltas(level, count));
    count += args.levels.back().rows();
  }
  require(count == args.num_anchors, kBoxLossOp, ": matched names ", args.num_anchors,
          " anchors an image, and deltas hold ", count);
  require(anchors.size(anchors.dim() - 2) == args.num_anchors && (anchors.dim() == 2 || anchors.size(0) == args.batch),
          kBoxLossOp, ": anchors must be [N, 4] or [B, N, 4] with matched of ", shape_text(matched), ", and are ",
          shape_text(anchors));
  for (const torch::stable::Tensor& boxes : gt_boxes) {
    args.gt_boxes.push_back(compute_boxes(boxes, 2, "gt_boxes", matched, compute));
  }
  check_gt_boxes(args, gt_offsets);
  if (gt_offsets.has_value()) args.gt_offsets = torch::stable::contiguous(*gt_offsets);
  if (normalizer.has_value()) {
    require(normalizer->numel() == 1 || (normalizer->dim() == 1 && normalizer->size(0) == args.batch), kBoxLossOp,
            ": normalizer must be a scalar or have shape [", args.batch, "], and has shape ", shape_text(*normalizer));
    require(normalizer->device() == matched.device() && normalizer->scalar_type() == compute, kBoxLossOp,
            ": normalizer must be ", type_name(compute), " on the device of deltas");
    args.normalizer = torch::stable::contiguous(*normalizer);
  }
  return args;
}

inline void check_box_loss_grad(const BoxLossArgs& args, const torch::stable::Tensor& grad) {
  require(grad.dim() == 0 && grad.scalar_type() == compute_type(args.type) && grad.device() == args.matched.device(),
          "box_regression_loss_backward: grad must be a ", type_name(compute_type(args.type)),
          " scalar on the device of deltas");
}

// Memory for each level's gradient, laid out as the level where that is channels_last, else contiguous.
inline std::vector<torch::stable::Tensor> empty_delta_gradients(const BoxLossArgs& args) {
  std::vector<torch::stable::Tensor> gradients;
  for (const DeltaLevel& level : args.levels) {
    gradients.push_back(level.channels_last ? torch::stable::empty_like(level.deltas)
                                            : torch::stable::new_empty(level.deltas, level.deltas.sizes()));
  }
  return gradients;
}

// Calls f with a value of the deltas' storage type.
template <typename F>
auto with_delta_type(ScalarType type, F&& f) {
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

}  // namespace retinanet_ext
