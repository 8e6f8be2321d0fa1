// The regression loss of one foreground anchor, and its gradient with respect to the anchor's deltas.
#pragma once

#include <cstdint>

#include "common/box_math.h"

namespace retinanet_ext {

// As the schema numbers them.
enum class BoxLoss : int64_t { kL1 = 0, kSmoothL1 = 1, kGiou = 2 };

template <typename T>
struct BoxLossOptions {
  BoxLoss loss;
  T beta;  // of kSmoothL1, positive
  CoderWeights<T> weights;
};

// One delta's distance from what is expected, as torch.nn.functional.smooth_l1_loss has it.
template <typename T>
RNX_HD T delta_loss(T delta, T expected, const BoxLossOptions<T>& options) {
  const T difference = exact_sub(delta, expected);
  const T distance = difference < T(0) ? -difference : difference;
  if (options.loss == BoxLoss::kSmoothL1) {
    if (distance < options.beta) return exact_div(exact_mul(exact_mul(T(0.5), distance), distance), options.beta);
    return exact_sub(distance, exact_mul(T(0.5), options.beta));
  }
  return distance;
}

// Likewise: kL1 has no gradient at a distance of zero or NaN; kSmoothL1 passes NaN on.
template <typename T>
RNX_HD T delta_loss_gradient(T delta, T expected, const BoxLossOptions<T>& options) {
  const T difference = exact_sub(delta, expected);
  if (options.loss == BoxLoss::kSmoothL1) {
    if (difference <= -options.beta) return T(-1);
    if (difference >= options.beta) return T(1);
    return difference / options.beta;
  }
  return difference > T(0) ? T(1) : difference < T(0) ? T(-1) : T(0);
}

// The loss of an anchor that is matched with `gt`; the four parts of kL1 and kSmoothL1 are added in double.
template <typename T>
RNX_HD double box_loss(const Deltas<T>& deltas, const Box<T>& anchor, const Box<T>& gt,
                       const BoxLossOptions<T>& options) {
  if (options.loss == BoxLoss::kGiou) {
    return static_cast<double>(giou_loss(decode_box(deltas, anchor, options.weights, T(kDeltaClip)), gt));
  }
  const Deltas<T> expected = encode_box(gt, anchor, options.weights);
  return static_cast<double>(delta_loss(deltas.dx, expected.dx, options)) +
         static_cast<double>(delta_loss(deltas.dy, expected.dy, options)) +
         static_cast<double>(delta_loss(deltas.dw, expected.dw, options)) +
         static_cast<double>(delta_loss(deltas.dh, expected.dh, options));
}

// `upstream` times the gradient of box_loss with respect to the deltas.
template <typename T>
RNX_HD Deltas<T> box_loss_gradient(const Deltas<T>& deltas, const Box<T>& anchor, const Box<T>& gt,
                                   const BoxLossOptions<T>& options, T upstream) {
  if (options.loss == BoxLoss::kGiou) {
    const Box<T> predicted = decode_box(deltas, anchor, options.weights, T(kDeltaClip));
    const Box<T> by_box = giou_loss_gradient(predicted, gt);
    const Box<T> scaled = {upstream * by_box.x1, upstream * by_box.y1, upstream * by_box.x2, upstream * by_box.y2};
    return decode_box_gradient(scaled, deltas, anchor, options.weights, T(kDeltaClip)).deltas;
  }
  const Deltas<T> expected = encode_box(gt, anchor, options.weights);
  return {upstream * delta_loss_gradient(deltas.dx, expected.dx, options),
          upstream * delta_loss_gradient(deltas.dy, expected.dy, options),
          upstream * delta_loss_gradient(deltas.dw, expected.dw, options),
          upstream * delta_loss_gradient(deltas.dh, expected.dh, options)};
}

}  // namespace retinanet_ext
