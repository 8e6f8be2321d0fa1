// What the CPU and the CUDA operators of the box coder agree on: argument checks, strides, results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "box_coder/box_coder_task.h"
#include "common/box_tensors.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace retinanet_ext {

struct CoderArgs {
  BoxRows values;   // ground-truth boxes, or deltas
  BoxRows anchors;  // broadcast with them
  BroadcastDims dims;
  int64_t rows;
  ScalarType type;             // of the result: the wider of both
  std::vector<int64_t> shape;  // [..., 4]
  std::optional<torch::stable::Tensor> upstream;  // of gradients: contiguous, aligned
  BoxResult results[2];
  double weights[4];  // (wx, wy, ww, wh)
  double clip;        // of decoding

  template <typename T>
  CoderOptions<T> options() const {
    return {{static_cast<T>(weights[0]), static_cast<T>(weights[1]), static_cast<T>(weights[2]),
             static_cast<T>(weights[3])},
            static_cast<T>(clip)};
  }
  bool in_double() const {
    return type == ScalarType::Double;
  }
};

inline ScalarType wider_type(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline CoderArgs make_coder_args(const char* op, const char* name, const torch::stable::Tensor& values,
                                 const torch::stable::Tensor& anchors, double wx, double wy, double ww, double wh,
                                 double clip) {
  for (const torch::stable::Tensor* rows : {&values, &anchors}) {
    require(rows->dim() >= 1 && rows->size(rows->dim() - 1) == 4 && is_floating(rows->scalar_type()), op, ": ", name,
            " and anchors must be floating, of shape [..., 4], and one is ", type_name(rows->scalar_type()),
            " of shape ", shape_text(*rows));
  }
  require(values.device() == anchors.device(), op, ": ", name, " and anchors must be on one device");
  require(wx > 0 && wy > 0 && ww > 0 && wh > 0, op, ": weights must be positive, and are ", wx, ", ", wy, ", ", ww,
          ", ", wh);
  CoderArgs args{box_rows(values),
                 box_rows(anchors),
                 {},
                 1,
                 wider_type(values.scalar_type(), anchors.scalar_type()),
                 {},
                 std::nullopt,
                 {},
                 {wx, wy, ww, wh},
                 clip};
  args.dims = broadcast_dims(op, values, values.dim() - 1, anchors, anchors.dim() - 1, args.shape);
  for (const int64_t size : args.shape) args.rows *= size;
  args.shape.push_back(4);
  return args;
}

inline BoxResult box_result(torch::stable::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), box_type(tensor.scalar_type())};
}

inline torch::stable::Tensor empty_coded(CoderArgs& args, const torch::stable::Tensor& values) {
  torch::stable::Tensor result = torch::stable::new_empty(values, args.shape, args.type);
  args.results[0] = box_result(result);
  return result;
}

inline bool has_shape(const torch::stable::Tensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (tensor.size(static_cast<int64_t>(d)) != shape[d]) return false;
  }
  return true;
}

// Memory for the gradient of one argument, of the broadcast shape: in the argument's type where that is its own shape,
// in the type of the computation where it is still to be summed, [0] where nobody asks for it.
inline torch::stable::Tensor empty_coder_gradient(const CoderArgs& args, const torch::stable::Tensor& argument,
                                                  bool wanted, BoxResult& result) {
  if (!wanted) return torch::stable::new_empty(argument, {0});
  const ScalarType type = has_shape(argument, args.shape) ? argument.scalar_type() : compute_type(args.type);
  torch::stable::Tensor gradient = torch::stable::new_empty(argument, args.shape, type);
  result = box_result(gradient);
  return gradient;
}

using CoderGradients = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;

inline CoderGradients empty_coder_gradients(const char* op, CoderArgs& args, const torch::stable::Tensor& grad,
                                            const torch::stable::Tensor& values, const torch::stable::Tensor& anchors,
                                            bool of_values, bool of_anchors) {
  require(has_shape(grad, args.shape) && grad.scalar_type() == args.type && grad.device() == values.device(), op,
          ": grad must be ", type_name(args.type), " of the result's shape and on its device, and is ",
          type_name(grad.scalar_type()), " of shape ", shape_text(grad));
  args.upstream = torch::stable::contiguous(grad);
  if (!box_rows(*args.upstream).whole) args.upstream = torch::stable::clone(*args.upstream);
  return {empty_coder_gradient(args, values, of_values, args.results[0]),
          empty_coder_gradient(args, anchors, of_anchors, args.results[1])};
}

}  // namespace retinanet_ext
