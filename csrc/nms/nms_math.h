// Non-maximum suppression: the order of scores, and when one box suppresses another.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/box_math.h"
#include "common/fast_math.h"

namespace retinanet_ext {

// A score as an unsigned number: the better score has the smaller key. NaN comes first, -0 equals +0.
RNX_HD uint32_t descending_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

RNX_HD uint64_t descending_key(double score) {
  if (score != score) return 0;
  const uint64_t bits = bit_cast<uint64_t>(score + 0.0);
  return (bits & 0x8000000000000000u) != 0 ? bits : ~(bits | 0x8000000000000000u);
}

// The number with a descending key; of the key 0, which all NaN have, a NaN.
RNX_HD float from_descending_key(uint32_t key) {
  return bit_cast<float>((key & 0x80000000u) != 0 ? key : ~key ^ 0x80000000u);
}

RNX_HD double from_descending_key(uint64_t key) {
  return bit_cast<double>((key & 0x8000000000000000u) != 0 ? key : ~key ^ 0x8000000000000000u);
}

// A candidate's place among others: the better score first, then the lower index. A number, unique as the index is.
template <typename T>
struct RankKey;
template <>
struct RankKey<float> {
  using type = uint64_t;
  static constexpr int kBits = 64;
};
template <>
struct RankKey<double> {
  using type = unsigned __int128;
  static constexpr int kBits = 96;
};
template <typename T>
using rank_key_t = typename RankKey<T>::type;

template <typename T>
RNX_HD rank_key_t<T> rank_key(T score, uint32_t index) {
  return static_cast<rank_key_t<T>>(descending_key(score)) << 32 | index;
}

template <typename Key>
RNX_HD uint32_t index_of(Key key) {
  return static_cast<uint32_t>(key);
}

template <typename T>
RNX_HD T score_of_key(rank_key_t<T> key) {
  using ScoreKey = decltype(descending_key(T()));
  return from_descending_key(static_cast<ScoreKey>(key >> 32));
}

// The largest T that is not above `threshold`: a T is above it exactly where it is above the threshold.
template <typename T>
T threshold_below(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
                                                  : rounded;
}

// Intersection and union, each operation rounded on its own, in torchvision's order.
template <typename T>
struct Overlap {
  T intersection;
  T union_area;
};

template <typename T>
RNX_HD Overlap<T> overlap_of(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T width = larger(exact_sub(smaller(a.x2, b.x2), larger(a.x1, b.x1)), T(0));
  const T height = larger(exact_sub(smaller(a.y2, b.y2), larger(a.y1, b.y1)), T(0));
  const T intersection = exact_mul(width, height);
  return {intersection, exact_sub(exact_add(area_a, area_b), intersection)};
}

// IoU above the threshold; an IoU that is not a number suppresses nothing. (A coordinate that is not a number makes the
// area, and so the union, not a number.)
template <typename T>
RNX_HD bool exceeds(const Overlap<T>& overlap, T threshold) {
  return exact_div(overlap.intersection, overlap.union_area) > threshold;
}

// False only where `exceeds` is, for a threshold >= 0; without the division.
template <typename T>
RNX_HD bool may_exceed(const Overlap<T>& overlap, T threshold) {
  constexpr T kSlack = T(1) - 8 * std::numeric_limits<T>::epsilon();
  return overlap.intersection + std::numeric_limits<T>::min() >= threshold * kSlack * overlap.union_area;
}

// Whether one box suppresses the other, without the division where intersection and union decide.
template <typename T>
RNX_HD bool suppresses(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const Overlap<T> overlap = overlap_of(a, area_a, b, area_b);
  return (may_exceed(overlap, threshold) || !(threshold >= T(0))) && exceeds(overlap, threshold);
}

}  // namespace retinanet_ext
