// What the CPU and the CUDA operators of non-maximum suppression agree on: argument checks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/checks.h"
#include "common/dispatch.h"

namespace retinanet_ext {

struct NmsArgs {
  torch::stable::Tensor boxes;                  // [B, N, 4]; float32 or float64, contiguous
  torch::stable::Tensor scores;                 // [B, N], as boxes
  std::optional<torch::stable::Tensor> labels;  // int64 [B, N], contiguous; none where all boxes are of one label
  std::optional<torch::stable::Tensor> num_valid;  // int32 [B], contiguous
  int64_t batch;
  int64_t num_boxes;
  double iou_threshold;

  ScalarType type() const {
    return boxes.scalar_type();
  }
};

inline NmsArgs make_nms_args(const char* op, const torch::stable::Tensor& boxes, const torch::stable::Tensor& scores,
                             const std::optional<torch::stable::Tensor>& labels,
                             const std::optional<torch::stable::Tensor>& num_valid, double iou_threshold) {
  const ScalarType type = boxes.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, op, ": boxes must be float32 or float64, and are ",
          type_name(type));
  require(boxes.dim() == 3 && boxes.size(2) == 4, op, ": boxes must have shape [B, N, 4], and have shape ",
          shape_text(boxes));
  const auto check_per_box = [&](const char* name, const torch::stable::Tensor& values, ScalarType expected) {
    require(values.dim() == 2 && values.size(0) == boxes.size(0) && values.size(1) == boxes.size(1) &&
                values.scalar_type() == expected,
            op, ": ", name, " must be ", type_name(expected), " of shape [", boxes.size(0), ", ", boxes.size(1),
            "], and are ", type_name(values.scalar_type()), " of shape ", shape_text(values));
    require(values.device() == boxes.device(), op, ": ", name, " and boxes must be on one device");
  };
  check_per_box("scores", scores, type);
  NmsArgs args{torch::stable::contiguous(boxes), torch::stable::contiguous(scores), std::nullopt, std::nullopt,
               boxes.size(0), boxes.size(1), iou_threshold};
  if (labels.has_value()) {
    check_per_box("labels", *labels, ScalarType::Long);
    args.labels = torch::stable::contiguous(*labels);
  }
  if (num_valid.has_value()) {
    require(num_valid->dim() == 1 && num_valid->size(0) == args.batch && num_valid->scalar_type() == ScalarType::Int,
            op, ": num_valid must be int32 of shape [", args.batch, "], and is ", type_name(num_valid->scalar_type()),
            " of shape ", shape_text(*num_valid));
    require(num_valid->device() == boxes.device(), op, ": num_valid and boxes must be on one device");
    args.num_valid = torch::stable::contiguous(*num_valid);
  }
  return args;
}

}  // namespace retinanet_ext
