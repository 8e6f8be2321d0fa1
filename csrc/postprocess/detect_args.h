// What the CPU and the CUDA operator of post-processing agree on: argument checks, and how each level lies in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/delta_level.h"
#include "common/dispatch.h"
#include "common/logit_level.h"

namespace retinanet_ext {

struct DetectArgs {
  std::vector<LogitLevel> logits;
  std::vector<DeltaLevel> deltas;
  torch::stable::Tensor anchors;                     // [N, 4] or [B, N, 4], box dtype, contiguous
  std::optional<torch::stable::Tensor> image_sizes;  // [B, 2], (height, width), box dtype, contiguous; or in size_list
  std::vector<double> size_list;                     // height, width, height, ...
  ScalarType logit_type;
  ScalarType delta_type;
  ScalarType box_type;  // of the boxes that are computed
  int64_t batch;
  int64_t num_anchors;  // N
  int64_t num_classes;  // K
  double score_thresh;
  int64_t topk_per_level;
  double nms_thresh;
  int64_t max_detections;  // D
  bool clip_before_nms;
};

inline DetectArgs make_detect_args(const std::vector<torch::stable::Tensor>& cls_logits,
                                   const std::vector<torch::stable::Tensor>& box_deltas,
                                   const torch::stable::Tensor& anchors,
                                   const std::optional<torch::stable::Tensor>& image_sizes,
                                   std::vector<double> size_list, int64_t num_classes, double score_thresh,
                                   int64_t topk_per_level, double nms_thresh, int64_t max_detections,
                                   bool clip_before_nms) {
  constexpr const char* kOp = "detect";
  require(!cls_logits.empty() && cls_logits.size() == box_deltas.size(), kOp,
          ": cls_logits and box_deltas must hold as many levels, at least one, and hold ", cls_logits.size(), " and ",
          box_deltas.size());
  require(num_classes >= 1, kOp, ": num_classes must be at least 1, and is ", num_classes);
  require(topk_per_level >= 0 && max_detections >= 0, kOp,
          ": topk_per_level and max_detections must be at least 0, and are ", topk_per_level, " and ", max_detections);
  const ScalarType logit_type = cls_logits[0].scalar_type();
  const ScalarType delta_type = box_deltas[0].scalar_type();
  const ScalarType box_type =
      delta_type == ScalarType::Double || anchors.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                                      : ScalarType::Float;
  DetectArgs args{{},         {},         anchors,  std::nullopt, std::move(size_list), logit_type,
                  delta_type, box_type,   cls_logits[0].size(0), 0, num_classes, score_thresh,
                  topk_per_level, nms_thresh, max_detections, clip_before_nms};
  for (size_t i = 0; i < cls_logits.size(); ++i) {
    const torch::stable::Tensor& logits = cls_logits[i];
    const torch::stable::Tensor& deltas = box_deltas[i];
    require(is_floating(logit_type) && logits.scalar_type() == logit_type, kOp,
            ": cls_logits must share one floating dtype");
    require(is_floating(delta_type) && deltas.scalar_type() == delta_type, kOp,
            ": box_deltas must share one floating dtype");
    require(logits.device() == anchors.device() && deltas.device() == anchors.device(), kOp,
            ": cls_logits, box_deltas and anchors must be on one device");
    const bool maps = logits.dim() == 4 && deltas.dim() == 4 && logits.size(1) % num_classes == 0 &&
                      deltas.size(1) == 4 * (logits.size(1) / num_classes) && logits.size(2) == deltas.size(2) &&
                      logits.size(3) == deltas.size(3);
    const bool rows = logits.dim() == 3 && deltas.dim() == 3 && logits.size(1) == deltas.size(1) &&
                      logits.size(2) == num_classes && deltas.size(2) == 4;
    require((maps || rows) && logits.size(0) == args.batch && deltas.size(0) == args.batch, kOp,
            ": each level must be [B, A*K, H, W] and [B, 4*A, H, W], or [B, n, K] and [B, n, 4], with B = ", args.batch,
            " and K = ", num_classes, ", and level ", i, " is ", shape_text(logits), " and ", shape_text(deltas));
    args.logits.push_back(describe_level(logits, num_classes, args.num_anchors));
    args.deltas.push_back(describe_deltas(deltas, args.num_anchors));
    args.num_anchors += args.logits.back().rows();
  }
  const int64_t dims = anchors.dim();
  require(is_floating(anchors.scalar_type()) && (dims == 2 || dims == 3) && anchors.size(dims - 1) == 4 &&
              anchors.size(dims - 2) == args.num_anchors && (dims == 2 || anchors.size(0) == args.batch),
          kOp, ": anchors must be floating, of shape [", args.num_anchors, ", 4] or [", args.batch, ", ",
          args.num_anchors, ", 4], and have shape ", shape_text(anchors));
  const auto as_boxes = [&](const torch::stable::Tensor& tensor) {
    return torch::stable::contiguous(tensor.scalar_type() == box_type ? tensor : torch::stable::to(tensor, box_type));
  };
  args.anchors = as_boxes(anchors);
  if (image_sizes.has_value()) {
    require(image_sizes->dim() == 2 && image_sizes->size(0) == args.batch && image_sizes->size(1) == 2, kOp,
            ": image_sizes must have shape [", args.batch, ", 2], and have shape ", shape_text(*image_sizes));
    require(image_sizes->device() == anchors.device(), kOp, ": image_sizes and anchors must be on one device");
    args.image_sizes = as_boxes(*image_sizes);
  } else {
    require(static_cast<int64_t>(args.size_list.size()) == 2 * args.batch, kOp, ": size_list must hold ",
            2 * args.batch, " numbers, height and width of each image, and holds ", args.size_list.size());
  }
  return args;
}

// boxes [B, D, 4], scores [B, D], labels [B, D], indices [B, D], counts [B].
using DetectResult = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                                torch::stable::Tensor, torch::stable::Tensor>;

inline DetectResult empty_detections(const DetectArgs& args) {
  const int64_t b = args.batch;
  const int64_t d = args.max_detections;
  return {torch::stable::new_empty(args.anchors, {b, d, 4}, args.box_type),
          torch::stable::new_empty(args.anchors, {b, d}, compute_type(args.logit_type)),
          torch::stable::new_empty(args.anchors, {b, d}, ScalarType::Long),
          torch::stable::new_empty(args.anchors, {b, d}, ScalarType::Long),
          torch::stable::new_empty(args.anchors, {b}, ScalarType::Int)};
}

}  // namespace retinanet_ext
