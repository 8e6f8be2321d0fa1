// What the kernels of the box coder do with one row (formulas in common/box_math.h).
#pragma once

#include "common/box_rows.h"

namespace retinanet_ext {

enum class CoderTask {
  kEncode,          // ground-truth box, anchor -> deltas
  kDecode,          // deltas, anchor -> box
  kEncodeGradient,  // gradient of the deltas, ground-truth box, anchor -> gradients of both boxes
  kDecodeGradient,  // gradient of the box, deltas, anchor -> gradients of deltas and anchor
};

constexpr bool is_gradient(CoderTask task) {
  return task == CoderTask::kEncodeGradient || task == CoderTask::kDecodeGradient;
}

template <typename T>
struct CoderOptions {
  CoderWeights<T> weights;
  T clip;
};

template <typename T>
RNX_HD Deltas<T> as_deltas(const Box<T>& row) {
  return {row.x1, row.y1, row.x2, row.y2};
}

template <typename T>
RNX_HD Box<T> as_row(const Deltas<T>& deltas) {
  return {deltas.dx, deltas.dy, deltas.dw, deltas.dh};
}

// Number by number: a loop in which rows are copied whole does not vectorise (GCC 12).
template <typename T>
RNX_HD Box<T> as_row(const Box<T>& box) {
  return {box.x1, box.y1, box.x2, box.y2};
}

template <typename T>
struct CoderRow {
  Box<T> first;   // the result, or the gradient of `values`
  Box<T> second;  // the gradient of `anchor`
};

// `values`: a ground-truth box, or deltas. `upstream`: of gradients.
template <CoderTask kTask, typename T>
RNX_HD CoderRow<T> coder_row(const Box<T>& upstream, const Box<T>& values, const Box<T>& anchor,
                             const CoderOptions<T>& options) {
  if constexpr (kTask == CoderTask::kEncode) {
    return {as_row(encode_box(values, anchor, options.weights)), Box<T>{}};
  } else if constexpr (kTask == CoderTask::kDecode) {
    return {decode_box(as_deltas(values), anchor, options.weights, options.clip), Box<T>{}};
  } else if constexpr (kTask == CoderTask::kEncodeGradient) {
    const EncodeGradient<T> gradient = encode_box_gradient(as_deltas(upstream), values, anchor, options.weights);
    return {as_row(gradient.gt), as_row(gradient.anchor)};
  } else {
    const DecodeGradient<T> gradient =
        decode_box_gradient(upstream, as_deltas(values), anchor, options.weights, options.clip);
    return {as_row(gradient.deltas), as_row(gradient.anchor)};
  }
}

}  // namespace retinanet_ext
