// exp2, 1/d and ln(1 + u): the functions that the focal loss is made of; log2 for soft targets and general gamma.
//
// float on the host   polynomials without branches, so that the compiler can vectorise them for any instruction set
// float on the device ex2.approx, rcp.approx, lg2.approx: one special-function instruction each; ln(1 + u) a polynomial
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
  // Stands for the exponent of logits so low that z log2(e) overflows: finite, so that gamma = 0 leaves 0 of it.
  static constexpr float kMinExponent = -1e37f;
};

template <>
struct MathConstants<double> {
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2 = 0.69314718055994530942;
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

// 2^-m for m >= 0, relative error 2.4e-7 up to m = 126 and falling to 0 at 127; 0 beyond, and where m is NaN. Shorter than
// exp2_polynomial by its range: the clamp is one of integers, because non-negative floats order as their bits do, and
// 2^-n is taken off the polynomial's exponent.
RNX_HD float exp2_decay_polynomial(float m) {
  const int32_t limit = bit_cast<int32_t>(127.0f);
  const int32_t bits = bit_cast<int32_t>(m);
  m = bit_cast<float>(bits < limit ? bits : limit);
  constexpr float kRound = 12582912.0f;  // as above
  const float shifted = kRound - m;
  const float f = m + (shifted - kRound);
  // 2^-f on [-1/2, 1/2], degree 5, relative error 9.2e-8 before rounding; 1 at f = 0, so that m = 127 leaves 0.
  float p = -0x1.5bba14p-10f;
  p = p * f + 0x1.3cea88p-7f;
  p = p * f - 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f - 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
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

// 2^-m for m >= 0.
RNX_HD float exp2_decay(float m) {
#if defined(__CUDA_ARCH__)
  return exp2_fast(-m);
#else
  return host_math::exp2_decay_polynomial(m);
#endif
}

RNX_HD double exp2_decay(double m) {
  return exp2(-m);
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

// ln(1 + u)/u on [0, 1], relative error 1.9e-7 before rounding.
RNX_HD float log1p_ratio_degree7(float u) {
  float p = -0x1.17cffcp-7f;
  p = p * u + 0x1.692e94p-5f;
  p = p * u - 0x1.b91066p-4f;
  p = p * u + 0x1.6b6c26p-3f;
  p = p * u - 0x1.f5aac4p-3f;
  p = p * u + 0x1.54bdacp-2f;
  p = p * u - 0x1.fff932p-2f;
  return p * u + 0x1.fffffap-1f;
}

// The same with one instruction less, relative error 1.3e-6.
RNX_HD float log1p_ratio_degree6(float u) {
  float p = 0x1.cf5f7ep-7f;
  p = p * u - 0x1.0ffb54p-4f;
  p = p * u + 0x1.319c48p-3f;
  p = p * u - 0x1.e15becp-3f;
  p = p * u + 0x1.530a70p-2f;
  p = p * u - 0x1.ffddd4p-2f;
  return p * u + 0x1.ffffd6p-1f;
}

// ln(1 + u) for u in [0, 1], keeping its digits for small u. A polynomial on the device too: lg2.approx has an absolute
// error near 1, and would need a series beside it.
RNX_HD float log1p_unit(float u) {
#if defined(__CUDA_ARCH__)
  return u * log1p_ratio_degree6(u);  // issue slots bound the forward kernels
#else
  return u * log1p_ratio_degree7(u);
#endif
}

RNX_HD double log1p_unit(double u) {
  return log1p(u);
}

}  // namespace retinanet_ext
