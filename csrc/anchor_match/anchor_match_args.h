// What the CPU and the CUDA operator of anchor matching agree on: argument checks, and where each image's boxes lie.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "anchor_match/anchor_match_math.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace retinanet_ext {

struct AnchorMatchArgs {
  const char* op;  // for messages
  torch::stable::Tensor anchors;                  // [N, 4], or [B, N, 4]; float32 or float64, contiguous
  std::vector<torch::stable::Tensor> gt_boxes;    // [M_b, 4] an image, or one [capacity, 4]; as anchors
  std::vector<torch::stable::Tensor> gt_labels;   // int32 or int64, [M_b] an image, or one [capacity]; may be none
  std::vector<torch::stable::Tensor> gt_ignore;   // bool, likewise; may be none
  std::optional<torch::stable::Tensor> offsets;   // int32 [B + 1] where the boxes are packed, contiguous
  int64_t batch;
  int64_t num_anchors;
  bool per_image;  // anchors are [B, N, 4]
  double fg_iou_thresh;
  double bg_iou_thresh;
  bool allow_low_quality_matches;
  MatchPolicy policy;
  double min_pos_iou;

  bool packed() const {
    return offsets.has_value();
  }
  int64_t anchor_sets() const {
    return per_image ? batch : 1;
  }
  // Rows of all boxes together.
  int64_t gt_rows() const {
    int64_t rows = 0;
    for (const torch::stable::Tensor& boxes : gt_boxes) rows += boxes.size(0);
    return rows;
  }
};

// One tensor a box tensor, of one number a box; none at all where `values` is empty.
inline std::vector<torch::stable::Tensor> check_per_box(const char* op, const char* name,
                                                        const std::vector<torch::stable::Tensor>& values,
                                                        const std::vector<torch::stable::Tensor>& gt_boxes) {
  std::vector<torch::stable::Tensor> result;
  if (values.empty()) return result;
  require(values.size() == gt_boxes.size(), op, ": ", name, " must hold ", gt_boxes.size(),
          " tensors, as gt_boxes does, and holds ", values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    require(values[i].dim() == 1 && values[i].size(0) == gt_boxes[i].size(0), op, ": ", name, "[", i,
            "] must have shape [", gt_boxes[i].size(0), "], and has shape ", shape_text(values[i]));
    require(values[i].device() == gt_boxes[i].device(), op, ": ", name, " and gt_boxes must be on one device");
    require(values[i].scalar_type() == values[0].scalar_type(), op, ": ", name, " must share one dtype");
    result.push_back(torch::stable::contiguous(values[i]));
  }
  return result;
}

inline AnchorMatchArgs make_anchor_match_args(const char* op, const torch::stable::Tensor& anchors,
                                              const std::vector<torch::stable::Tensor>& gt_boxes,
                                              const std::vector<torch::stable::Tensor>& gt_labels,
                                              const std::vector<torch::stable::Tensor>& gt_ignore,
                                              const std::optional<torch::stable::Tensor>& gt_offsets,
                                              double fg_iou_thresh, double bg_iou_thresh,
                                              bool allow_low_quality_matches, int64_t policy, double min_pos_iou) {
  const ScalarType type = anchors.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, op,
          ": anchors must be float32 or float64, and are ", type_name(type));
  require((anchors.dim() == 2 || anchors.dim() == 3) && anchors.size(anchors.dim() - 1) == 4, op,
          ": anchors must have shape [N, 4] or [B, N, 4], and have shape ", shape_text(anchors));
  require(policy >= 0 && policy <= 2, op, ": policy must be 0 (safe), 1 (torchvision) or 2 (mmdet), and is ", policy);
  require(bg_iou_thresh >= 0 && bg_iou_thresh <= fg_iou_thresh && fg_iou_thresh <= 1, op,
          ": thresholds must be 0 <= bg_iou_thresh <= fg_iou_thresh <= 1, and are ", bg_iou_thresh, " and ",
          fg_iou_thresh);
  AnchorMatchArgs args{op,
                       torch::stable::contiguous(anchors),
                       {},
                       {},
                       {},
                       std::nullopt,
                       static_cast<int64_t>(gt_boxes.size()),
                       anchors.size(anchors.dim() - 2),
                       anchors.dim() == 3,
                       fg_iou_thresh,
                       bg_iou_thresh,
                       allow_low_quality_matches,
                       static_cast<MatchPolicy>(policy),
                       min_pos_iou};
  for (const torch::stable::Tensor& boxes : gt_boxes) {
    require(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == type, op, ": gt_boxes must be ",
            type_name(type), ", as anchors are, of shape [M, 4], and one is ", type_name(boxes.scalar_type()),
            " of shape ", shape_text(boxes));
    require(boxes.device() == anchors.device(), op, ": anchors and gt_boxes must be on one device");
    require(boxes.size(0) <= std::numeric_limits<int32_t>::max(), op, ": gt_boxes must have at most 2^31 - 1 rows");
    args.gt_boxes.push_back(torch::stable::contiguous(boxes));
  }
  if (gt_offsets.has_value()) {
    require(gt_boxes.size() == 1, op, ": gt_boxes must be one tensor where gt_offsets are given, and are ",
            gt_boxes.size());
    require(gt_offsets->dim() == 1 && gt_offsets->size(0) >= 1 && gt_offsets->scalar_type() == ScalarType::Int, op,
            ": gt_offsets must be int32 of shape [B + 1], and are ", type_name(gt_offsets->scalar_type()), " of shape ",
            shape_text(*gt_offsets));
    require(gt_offsets->device() == anchors.device(), op, ": anchors and gt_offsets must be on one device");
    args.offsets = torch::stable::contiguous(*gt_offsets);
    args.batch = gt_offsets->size(0) - 1;
  }
  require(!args.per_image || anchors.size(0) == args.batch, op, ": anchors must be [N, 4] or [", args.batch,
          ", N, 4], and have shape ", shape_text(anchors));
  args.gt_labels = check_per_box(op, "gt_labels", gt_labels, gt_boxes);
  args.gt_ignore = check_per_box(op, "gt_ignore", gt_ignore, gt_boxes);
  require(args.gt_ignore.empty() || args.gt_ignore[0].scalar_type() == ScalarType::Bool, op,
          ": gt_ignore must be bool");
  require(args.gt_labels.empty() || args.gt_labels[0].scalar_type() == ScalarType::Int ||
              args.gt_labels[0].scalar_type() == ScalarType::Long,
          op, ": gt_labels must be int32 or int64");
  return args;
}

// What assign_targets returns: labels [B, N], matched [B, N], num_foreground [B], all int32.
using AssignedTargets = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

inline torch::stable::Tensor empty_matched(const AnchorMatchArgs& args) {
  return torch::stable::new_empty(args.anchors, {args.batch, args.num_anchors}, ScalarType::Int);
}

inline AssignedTargets empty_targets(const AnchorMatchArgs& args) {
  require(args.gt_labels.size() == args.gt_boxes.size(), args.op, ": gt_labels must hold ", args.gt_boxes.size(),
          " tensors, as gt_boxes does, and holds none");
  return {empty_matched(args), empty_matched(args),
          torch::stable::new_empty(args.anchors, {args.batch}, ScalarType::Int)};
}

}  // namespace retinanet_ext
