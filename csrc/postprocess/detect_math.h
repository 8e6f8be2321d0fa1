// Scores and candidates of post-processing.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/fast_math.h"
#include "nms/nms_math.h"

namespace retinanet_ext {

// The sigmoid, rounded once: float32 from float64.
RNX_HD float score_of(float logit) {
  return static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
}
RNX_HD double score_of(double logit) {
  return 1.0 / (1.0 + exp(-logit));
}

// The smallest logit whose score is above the threshold, which is rounded to the score's type: comparing logits with it
// is comparing scores with the threshold, without a sigmoid. NaN, which nothing reaches, where no score is.
template <typename T>
T smallest_logit_above(double score_thresh) {
  using Key = decltype(descending_key(T()));
  const T threshold = static_cast<T>(score_thresh);
  // Keys fall as logits rise, and so do scores: the last key that passes is looked for.
  Key passes = descending_key(std::numeric_limits<T>::infinity());
  Key fails = descending_key(-std::numeric_limits<T>::infinity());
  if (!(score_of(from_descending_key(passes)) > threshold)) return std::numeric_limits<T>::quiet_NaN();
  if (score_of(from_descending_key(fails)) > threshold) return from_descending_key(fails);
  while (fails - passes > 1) {
    const Key middle = passes + (fails - passes) / 2;
    (score_of(from_descending_key(middle)) > threshold ? passes : fails) = middle;
  }
  return from_descending_key(passes);
}

// The logits that candidates at or below `bound` may have: no lower one. Not every bound is the key of a number.
template <typename T>
RNX_HD T lowest_logit(rank_key_t<T> bound) {
  using Key = decltype(descending_key(T()));
  const Key key = static_cast<Key>(bound >> 32);
  const Key worst = descending_key(-std::numeric_limits<T>::infinity());
  return from_descending_key(key < worst ? key : worst);
}

// NaN stays NaN, as in torch.clamp.
template <typename T>
RNX_HD T clip_coordinate(T value, T limit) {
  const T above = value < T(0) ? T(0) : value;
  return above > limit || limit != limit ? limit : above;
}

template <typename T>
RNX_HD Box<T> clip_box(const Box<T>& box, T height, T width) {
  return {clip_coordinate(box.x1, width), clip_coordinate(box.y1, height), clip_coordinate(box.x2, width),
          clip_coordinate(box.y2, height)};
}

}  // namespace retinanet_ext
