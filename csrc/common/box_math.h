// Boxes (x1, y1, x2, y2): intersection over union, the box coder, and the GIoU loss of a pair.
//
// Values are exact in this sense: every operation is rounded on its own, in torchvision's order, so that float32 and
// float64 results equal torchvision's on the CPU to the bit (but for exp and log, which libraries round differently in
// the last place). A multiplication that a compiler contracts with the addition after it would break that: host code is
// compiled with -ffp-contract=off, device code calls the operations by their names. Gradients are not exact in this
// sense: the device may contract them.
//
// Where a function has a kink, its gradient is PyTorch's: half to each side of a tie between two coordinates, all of it
// at the clip of the size deltas and at an overlap of zero.
#pragma once

#include <cmath>

#include "accurate_math.h"
#include "host_device.h"

namespace retinanet_ext {

// One IEEE operation each, never contracted.
template <typename T>
RNX_HD T exact_mul(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

template <typename T>
RNX_HD T exact_add(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fadd_rn(a, b);
  } else {
    return __dadd_rn(a, b);
  }
#else
  return a + b;
#endif
}

template <typename T>
RNX_HD T exact_sub(T a, T b) {
  return exact_add(a, -b);
}

template <typename T>
RNX_HD T exact_div(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fdiv_rn(a, b);
  } else {
    return __ddiv_rn(a, b);
  }
#else
  return a / b;
#endif
}

template <typename T>
struct alignas(4 * sizeof(T)) Box {
  T x1;
  T y1;
  T x2;
  T y2;
};

template <typename T>
RNX_HD T box_area(const Box<T>& box) {
  return exact_mul(exact_sub(box.x2, box.x1), exact_sub(box.y2, box.y1));
}

// The smaller and the larger of two numbers; `b` where `a` is NaN.
template <typename T>
RNX_HD T smaller(T a, T b) {
#if defined(__CUDA_ARCH__)
  return fmin(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
RNX_HD T larger(T a, T b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// The same of any two: NaN if either is, as torch.minimum and torch.maximum.
template <typename T>
RNX_HD T smaller_or_nan(T a, T b) {
  return a < b || a != a ? a : b;
}

template <typename T>
RNX_HD T larger_or_nan(T a, T b) {
  return a > b || a != a ? a : b;
}

// log(1000 / 16), the largest size delta that torchvision decodes: a factor of 62.5.
constexpr double kDeltaClip = 4.135166556742356;

// A box relative to an anchor (Girshick et al., arXiv 1311.2524, appendix C).
template <typename T>
struct alignas(4 * sizeof(T)) Deltas {
  T dx;
  T dy;
  T dw;
  T dh;
};

// The factors of the four deltas.
template <typename T>
struct CoderWeights {
  T x;
  T y;
  T w;
  T h;
};

// One axis of a box, and of its deltas.
template <typename T>
struct Interval {
  T low;
  T high;
};

template <typename T>
struct AxisDelta {
  T shift;  // of the centre
  T scale;  // of the size
};

template <typename T>
RNX_HD Interval<T> x_axis(const Box<T>& box) {
  return {box.x1, box.x2};
}

template <typename T>
RNX_HD Interval<T> y_axis(const Box<T>& box) {
  return {box.y1, box.y2};
}

template <typename T>
RNX_HD Box<T> box_of(const Interval<T>& x, const Interval<T>& y) {
  return {x.low, y.low, x.high, y.high};
}

template <typename T>
RNX_HD T interval_size(const Interval<T>& interval) {
  return exact_sub(interval.high, interval.low);
}

template <typename T>
RNX_HD T interval_center(const Interval<T>& interval, T size) {
  return exact_add(interval.low, exact_mul(T(0.5), size));
}

// The gradient of an interval's ends from that of its centre, low + size / 2, and that of its size, high - low.
template <typename T>
RNX_HD Interval<T> interval_gradient(T center, T size) {
  const T high = T(0.5) * center + size;
  return {center - high, high};
}

template <typename T>
RNX_HD AxisDelta<T> encode_axis(const Interval<T>& gt, const Interval<T>& anchor, T shift_weight, T scale_weight) {
  const T gt_size = interval_size(gt);
  const T size = interval_size(anchor);
  const T shift = exact_sub(interval_center(gt, gt_size), interval_center(anchor, size));
  return {exact_div(exact_mul(shift_weight, shift), size),
          exact_mul(scale_weight, accurate_log(exact_div(gt_size, size)))};
}

// What the box coder is trained to predict for `gt` at `anchor`.
template <typename T>
RNX_HD Deltas<T> encode_box(const Box<T>& gt, const Box<T>& anchor, const CoderWeights<T>& weights) {
  const AxisDelta<T> x = encode_axis(x_axis(gt), x_axis(anchor), weights.x, weights.w);
  const AxisDelta<T> y = encode_axis(y_axis(gt), y_axis(anchor), weights.y, weights.h);
  return {x.shift, y.shift, x.scale, y.scale};
}

template <typename T>
struct EncodeGradient {
  Box<T> gt;
  Box<T> anchor;
};

template <typename T>
RNX_HD void encode_axis_gradient(const AxisDelta<T>& upstream, const Interval<T>& gt, const Interval<T>& anchor,
                                 T shift_weight, T scale_weight, Interval<T>& gt_gradient,
                                 Interval<T>& anchor_gradient) {
  const T gt_size = interval_size(gt);
  const T size = interval_size(anchor);
  const T shift = interval_center(gt, gt_size) - interval_center(anchor, size);
  const T center = upstream.shift / size * shift_weight;
  const T scale = upstream.scale * scale_weight;
  gt_gradient = interval_gradient(center, scale / gt_size);
  anchor_gradient = interval_gradient(-center, -(center * shift + scale) / size);
}

// The gradients of both boxes from that of their deltas.
template <typename T>
RNX_HD EncodeGradient<T> encode_box_gradient(const Deltas<T>& upstream, const Box<T>& gt, const Box<T>& anchor,
                                             const CoderWeights<T>& weights) {
  Interval<T> gt_x, gt_y, anchor_x, anchor_y;
  encode_axis_gradient<T>({upstream.dx, upstream.dw}, x_axis(gt), x_axis(anchor), weights.x, weights.w, gt_x, anchor_x);
  encode_axis_gradient<T>({upstream.dy, upstream.dh}, y_axis(gt), y_axis(anchor), weights.y, weights.h, gt_y, anchor_y);
  return {box_of(gt_x, gt_y), box_of(anchor_x, anchor_y)};
}

// The factor of the anchor's size, where `scaled` is the size delta before the clip.
template <typename T>
RNX_HD T decode_factor(T scaled, T clip) {
  return accurate_exp(scaled > clip ? clip : scaled);
}

template <typename T>
RNX_HD Interval<T> decode_axis(const AxisDelta<T>& delta, const Interval<T>& anchor, T shift_weight, T scale_weight,
                               T clip) {
  const T size = interval_size(anchor);
  const T center =
      exact_add(exact_mul(exact_div(delta.shift, shift_weight), size), interval_center(anchor, size));
  const T factor = decode_factor(exact_div(delta.scale, scale_weight), clip);
  const T half = exact_mul(T(0.5), exact_mul(factor, size));
  return {exact_sub(center, half), exact_add(center, half)};
}

// The box that `deltas` predict at `anchor`; size deltas count up to `clip`, after division by their weights.
template <typename T>
RNX_HD Box<T> decode_box(const Deltas<T>& deltas, const Box<T>& anchor, const CoderWeights<T>& weights, T clip) {
  return box_of(decode_axis({deltas.dx, deltas.dw}, x_axis(anchor), weights.x, weights.w, clip),
                decode_axis({deltas.dy, deltas.dh}, y_axis(anchor), weights.y, weights.h, clip));
}

template <typename T>
struct DecodeGradient {
  Deltas<T> deltas;
  Box<T> anchor;
};

template <typename T>
RNX_HD void decode_axis_gradient(const Interval<T>& upstream, const AxisDelta<T>& delta, const Interval<T>& anchor,
                                 T shift_weight, T scale_weight, T clip, AxisDelta<T>& delta_gradient,
                                 Interval<T>& anchor_gradient) {
  const T size = interval_size(anchor);
  const T scaled = exact_div(delta.scale, scale_weight);
  const T factor = decode_factor(scaled, clip);
  const T center = upstream.low + upstream.high;
  const T decoded_size = T(0.5) * (upstream.high - upstream.low);
  // Written so that NaN, like what lies beyond the clip, gets no gradient.
  delta_gradient = {center * size / shift_weight,
                    scaled <= clip ? decoded_size * (factor * size) / scale_weight : T(0)};
  anchor_gradient = interval_gradient(center, center * (delta.shift / shift_weight) + decoded_size * factor);
}

// The gradients of deltas and anchor from that of the decoded box.
template <typename T>
RNX_HD DecodeGradient<T> decode_box_gradient(const Box<T>& upstream, const Deltas<T>& deltas, const Box<T>& anchor,
                                             const CoderWeights<T>& weights, T clip) {
  AxisDelta<T> x, y;
  Interval<T> anchor_x, anchor_y;
  decode_axis_gradient<T>(x_axis(upstream), {deltas.dx, deltas.dw}, x_axis(anchor), weights.x, weights.w, clip, x,
                          anchor_x);
  decode_axis_gradient<T>(y_axis(upstream), {deltas.dy, deltas.dh}, y_axis(anchor), weights.y, weights.h, clip, y,
                          anchor_y);
  return {{x.shift, y.shift, x.scale, y.scale}, box_of(anchor_x, anchor_y)};
}

constexpr double kGiouEps = 1e-7;  // torchvision's, added to both denominators

// Two boxes along one axis.
template <typename T>
struct AxisOverlap {
  T overlap;  // negative where they lie apart
  T hull;
};

template <typename T>
RNX_HD AxisOverlap<T> overlap_axis(const Interval<T>& a, const Interval<T>& b) {
  return {exact_sub(smaller_or_nan(a.high, b.high), larger_or_nan(a.low, b.low)),
          exact_sub(larger_or_nan(a.high, b.high), smaller_or_nan(a.low, b.low))};
}

// Not below 0; NaN stays.
template <typename T>
RNX_HD T positive_part(T v) {
  return v < T(0) ? T(0) : v;
}

template <typename T>
struct GiouTerms {
  AxisOverlap<T> x;
  AxisOverlap<T> y;
  T intersection;
  T union_area;
  T padded_union;  // with kGiouEps
  T hull_area;
  T padded_hull;

  RNX_HD GiouTerms(const Box<T>& a, const Box<T>& b)
      : x(overlap_axis(x_axis(a), x_axis(b))), y(overlap_axis(y_axis(a), y_axis(b))) {
    intersection = exact_mul(positive_part(x.overlap), positive_part(y.overlap));
    union_area = exact_sub(exact_add(box_area(a), box_area(b)), intersection);
    padded_union = exact_add(union_area, T(kGiouEps));
    hull_area = exact_mul(x.hull, y.hull);
    padded_hull = exact_add(hull_area, T(kGiouEps));
  }

  RNX_HD T loss() const {
    const T iou = exact_div(intersection, padded_union);
    return exact_sub(T(1), exact_sub(iou, exact_div(exact_sub(hull_area, union_area), padded_hull)));
  }
};

// 1 - GIoU (Rezatofighi et al., arXiv 1902.09630) of a prediction with its ground truth.
template <typename T>
RNX_HD T giou_loss(const Box<T>& predicted, const Box<T>& gt) {
  return GiouTerms<T>(predicted, gt).loss();
}

// How much of the gradient of the smaller, or the larger, of both goes to `own`. With NaN all of it, as in PyTorch.
template <typename T>
RNX_HD T share_of_smaller(T own, T other) {
  return own == other ? T(0.5) : own > other ? T(0) : T(1);
}

template <typename T>
RNX_HD T share_of_larger(T own, T other) {
  return own == other ? T(0.5) : own < other ? T(0) : T(1);
}

// The gradient of one axis of the prediction from those of its own size, of the overlap and of the hull.
template <typename T>
RNX_HD Interval<T> giou_axis_gradient(const Interval<T>& predicted, const Interval<T>& gt, T size, T overlap, T hull) {
  return {-(size + overlap * share_of_larger(predicted.low, gt.low) + hull * share_of_smaller(predicted.low, gt.low)),
          size + overlap * share_of_smaller(predicted.high, gt.high) +
              hull * share_of_larger(predicted.high, gt.high)};
}

// The gradient of giou_loss with respect to `predicted`.
template <typename T>
RNX_HD Box<T> giou_loss_gradient(const Box<T>& predicted, const Box<T>& gt) {
  const GiouTerms<T> terms(predicted, gt);
  // loss = 1 - I / (U + eps) + (H - U) / (H + eps), with U = area + gt's area - I. The derivative by H is simplified,
  // which leaves nothing to cancel; what is squared is divided by twice, so that it does not overflow.
  const T by_union = terms.intersection / terms.padded_union / terms.padded_union - T(1) / terms.padded_hull;
  const T by_intersection = -T(1) / terms.padded_union - by_union;
  const T by_hull = terms.padded_union / terms.padded_hull / terms.padded_hull;
  const T width = interval_size(x_axis(predicted));
  const T height = interval_size(y_axis(predicted));
  const T overlap_x = terms.x.overlap >= T(0) ? by_intersection * positive_part(terms.y.overlap) : T(0);
  const T overlap_y = terms.y.overlap >= T(0) ? by_intersection * positive_part(terms.x.overlap) : T(0);
  return box_of(giou_axis_gradient(x_axis(predicted), x_axis(gt), by_union * height, overlap_x, by_hull * terms.y.hull),
                giou_axis_gradient(y_axis(predicted), y_axis(gt), by_union * width, overlap_y, by_hull * terms.x.hull));
}

}  // namespace retinanet_ext
