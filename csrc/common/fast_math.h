// exp2, log2(1 + e) and 1/d: the three functions that the focal loss is made of.
//
// float on the host   polynomials without branches, so that the compiler can vectorise them for any instruction set
// float on the device ex2.approx, lg2.approx, rcp.approx: one special-function instruction each
// double              the C library
//
// The polynomial coefficients are minimax fits (Remez exchange, 40 digits) of the functions named beside them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace retinanet_ext {

template <typename To, typename From>
RNX_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr float kLn2 = 0.69314718055994530942f;
  // Above this exponent 1 + 2^t rounds to 2^t, and the product of four such numbers still fits a float.
  static constexpr float kMaxExponent = 31.0f;
  // Stands for the exponent of logits so low that z log2(e) overflows: finite, so that gamma = 0 leaves 0 of it.
  static constexpr float kMinExponent = -1e37f;
};

template <>
struct MathConstants<double> {
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2 = 0.69314718055994530942;
  static constexpr double kMaxExponent = 250.0;
  static constexpr double kMinExponent = -1e307;
};

namespace host_math {

// 2^t, relative error 1.5e-7; 0 below t = -126.5. t must not exceed 127.
RNX_HD float exp2_polynomial(float t) {
  t = t < -127.0f ? -127.0f : t;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
  constexpr float kRound = 12582912.0f;
  const float shifted = t + kRound;
  const float f = t - (shifted - kRound);
  // 2^f on [-1/2, 1/2], degree 6, relative error 1.9e-9 before rounding.
  float p = 0x1.41d334p-13f;
  p = p * f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  // Unsigned: for NaN the exponent is arbitrary, and a negative number must not be shifted.
  return p * bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// log2(d) for normal d > 0, relative error 3e-7 also near d = 1.
RNX_HD float log2_polynomial(float d) {
  const int32_t bits = bit_cast<int32_t>(d);
  // The exponent that leaves the mantissa in [2/3, 4/3).
  const int32_t exponent = (bits - 0x3f2aaaab) >> 23;
  const uint32_t mantissa_bits = static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23);
  const float f = bit_cast<float>(mantissa_bits) - 1.0f;
  // (log2(1 + f)/f - log2(e))/f on [-1/3, 1/3], degree 7, relative error of the logarithm 2.6e-8.
  float q = 0x1.9e6d88p-3f;
  q = q * f - 0x1.c6acf2p-3f;
  q = q * f + 0x1.9d8696p-3f;
  q = q * f - 0x1.e50852p-3f;
  q = q * f + 0x1.27a102p-2f;
  q = q * f - 0x1.717208p-2f;
  q = q * f + 0x1.ec701ap-2f;
  q = q * f - 0x1.715458p-1f;
  const float log_mantissa = f * MathConstants<float>::kLog2E + (f * f) * q;
  return static_cast<float>(exponent) + log_mantissa;
}

}  // namespace host_math

// 2^t for t <= 127; values below 2^-126 become 0.
RNX_HD float exp2_fast(float t) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return host_math::exp2_polynomial(t);
#endif
}

RNX_HD double exp2_fast(double t) {
  return exp2(t);
}

// 1/d for normal d.
RNX_HD float reciprocal(float d) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d));
  return result;
#else
  return 1.0f / d;
#endif
}

RNX_HD double reciprocal(double d) {
  return 1.0 / d;
}

// log2(v) for normal v > 0. On the device the error is absolute near v = 1 (2^-22.6).
RNX_HD float log2_fast(float v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return host_math::log2_polynomial(v);
#endif
}

RNX_HD double log2_fast(double v) {
  return log2(v);
}

// log2(1 + e), keeping its digits for small e. `d` is 1 + e and `r` is 1/d, which the caller has already.
RNX_HD float log2_1p(float e, float d, float r) {
#if defined(__CUDA_ARCH__)
  // lg2.approx has an absolute error near 1, so small e takes a series; both are computed, one is kept.
  // log2(1 + e)/e on [0, 1/16], degree 4, relative error 2.7e-10.
  float series = 0x1.04254ap-2f;
  series = series * e - 0x1.6f7416p-2f;
  series = series * e + 0x1.ec660cp-2f;
  series = series * e - 0x1.71546cp-1f;
  series = series * e + 0x1.715476p+0f;
  return e < 0.0625f ? series * e : log2_fast(d);
#else
  // d rounds 1 + e; its error relative to d, (e - (d - 1)) / d, is the first-order correction of the logarithm.
  return host_math::log2_polynomial(d) + (e - (d - 1.0f)) * r * MathConstants<float>::kLog2E;
#endif
}

RNX_HD double log2_1p(double e, double, double) {
  return log1p(e) * MathConstants<double>::kLog2E;
}

}  // namespace retinanet_ext
