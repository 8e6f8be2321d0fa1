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
  const auto from_key = [](Key key) {
    constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
    return bit_cast<T>((key & kSign) != 0 ? key : ~key ^ kSign);
  };
  // Keys fall as logits rise, and so do scores: the last key that passes is looked for.
  Key passes = descending_key(std::numeric_limits<T>::infinity());
  Key fails = descending_key(-std::numeric_limits<T>::infinity());
  if (!(score_of(from_key(passes)) > threshold)) return std::numeric_limits<T>::quiet_NaN();
  if (score_of(from_key(fails)) > threshold) return from_key(fails);
  while (fails - passes > 1) {
    const Key middle = passes + (fails - passes) / 2;
    (score_of(from_key(middle)) > threshold ? passes : fails) = middle;
  }
  return from_key(passes);
}

}  // namespace retinanet_ext
