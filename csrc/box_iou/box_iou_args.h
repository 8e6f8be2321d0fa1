// What the CPU and the CUDA operator of box_iou agree on: argument checks, strides, the result's shape.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "box_iou/box_iou_math.h"
#include "common/box_tensors.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace retinanet_ext {

// Boxes of one side of the matrix.
struct IouSide {
  BoxRows rows;
  int64_t count;       // N or M
  int64_t row_stride;  // elements from one box to the next
};

struct BoxIouArgs {
  IouSide first;   // the rows of the result
  IouSide second;  // its columns
  BroadcastDims batch_dims;
  int64_t batch;
  BoxFormat format;
  ScalarType type;              // of the result, and of the computation
  std::vector<int64_t> shape;  // [..., N, M]
};

inline IouSide iou_side(const torch::stable::Tensor& boxes) {
  const int64_t rows = boxes.dim() - 2;
  return {box_rows(boxes), boxes.size(rows), boxes.stride(rows)};
}

inline BoxIouArgs make_box_iou_args(const torch::stable::Tensor& boxes1, const torch::stable::Tensor& boxes2,
                                    int64_t format) {
  constexpr const char* kOp = "box_iou";
  for (const torch::stable::Tensor* boxes : {&boxes1, &boxes2}) {
    require(boxes->dim() >= 2 && boxes->size(boxes->dim() - 1) == 4 && is_floating(boxes->scalar_type()), kOp,
            ": boxes must be floating, of shape [..., n, 4], and are ", type_name(boxes->scalar_type()), " of shape ",
            shape_text(*boxes));
  }
  const ScalarType type = compute_type(boxes1.scalar_type());
  require(compute_type(boxes2.scalar_type()) == type, kOp, ": both boxes must be float64, or neither; they are ",
          type_name(boxes1.scalar_type()), " and ", type_name(boxes2.scalar_type()));
  require(boxes1.device() == boxes2.device(), kOp, ": boxes1 and boxes2 must be on one device");
  require(format >= 0 && format <= 2, kOp, ": fmt must be 0 (xyxy), 1 (xywh) or 2 (cxcywh), and is ", format);
  BoxIouArgs args{iou_side(boxes1), iou_side(boxes2), {}, 1, static_cast<BoxFormat>(format), type, {}};
  args.batch_dims = broadcast_dims(kOp, boxes1, boxes1.dim() - 2, boxes2, boxes2.dim() - 2, args.shape);
  for (const int64_t size : args.shape) args.batch *= size;
  args.shape.push_back(args.first.count);
  args.shape.push_back(args.second.count);
  return args;
}

}  // namespace retinanet_ext
