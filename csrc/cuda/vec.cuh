// One aligned vector type: 16 bytes of storage elements, read and written by a single instruction.
#pragma once

#include <cstdint>

#include "common/half_convert.h"

namespace retinanet_ext {

constexpr int kVectorBytes = 16;

template <typename S>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(S));

template <typename S, int kWidth>
struct alignas(kVectorBytes) Vec {
  S values[kWidth];
};

template <typename S, int kWidth = kVectorWidth<S>>
RNX_HD Vec<S, kWidth> load_vector(const S* source) {
  return *reinterpret_cast<const Vec<S, kWidth>*>(source);
}

template <typename S, int kWidth>
RNX_HD void store_vector(S* target, const Vec<S, kWidth>& vector) {
  *reinterpret_cast<Vec<S, kWidth>*>(target) = vector;
}

inline bool is_vector_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// The type a stored element is computed in.
template <typename S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename S>
using compute_t = typename Compute<S>::type;

RNX_HD float load_value(float value) {
  return value;
}
RNX_HD double load_value(double value) {
  return value;
}
RNX_HD float load_value(Float16 value) {
  return to_float(value);
}
RNX_HD float load_value(BFloat16 value) {
  return to_float(value);
}

RNX_HD void store_value(float value, float& target) {
  target = value;
}
RNX_HD void store_value(double value, double& target) {
  target = value;
}
RNX_HD void store_value(float value, Float16& target) {
  target = to_float16(value);
}
RNX_HD void store_value(float value, BFloat16& target) {
  target = to_bfloat16(value);
}

}  // namespace retinanet_ext
