// exp and log to the last place: what boxes are coded with.
//
// float on the host   polynomials without branches, so that the compiler can vectorise them for any instruction set;
//                     within 1.001 ulp, and the C library's results for zeros, infinities, NaN, overflow and underflow
// float on the device the CUDA library's, within 2 ulp: not the fast intrinsics
// double              the C library
//
// The polynomial coefficients are minimax fits (Remez exchange, 40 digits) of the functions named beside them. Each
// operation is rounded on its own (-ffp-contract=off): every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "fast_math.h"

namespace retinanet_ext {
namespace host_math {

// ln 2 in two parts; the first has so few digits that products with an exponent are exact.
constexpr float kLn2High = 0x1.62e4p-1f;
constexpr float kLn2Low = 0x1.7f7d1cp-20f;

RNX_HD float power_of_two(int32_t exponent) {
  return bit_cast<float>((static_cast<uint32_t>(exponent) + 127) << 23);
}

RNX_HD float exp_polynomial(float v) {
  // Beyond these limits the result is 0 or infinity; NaN passes both.
  v = v < -104.0f ? -104.0f : v;
  v = v > 89.0f ? 89.0f : v;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
  constexpr float kRound = 12582912.0f;
  const float shifted = v * MathConstants<float>::kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (v - n * kLn2High) - n * kLn2Low;
  // (e^r - 1 - r)/r^2 on [-0.35, 0.35], degree 4, relative error of the exponential 3.3e-9.
  float q = 0x1.6a1a6ep-10f;
  q = q * r + 0x1.123fc6p-7f;
  q = q * r + 0x1.555916p-5f;
  q = q * r + 0x1.55548ap-3f;
  q = q * r + 0x1.fffffcp-2f;
  const float result = 1.0f + (r + r * r * q);
  // Unsigned: for NaN the exponent is arbitrary. In two steps: 2^n alone may be too large or too small for a float.
  const int32_t exponent = static_cast<int32_t>(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound));
  const int32_t half = exponent >> 1;
  return result * power_of_two(half) * power_of_two(exponent - half);
}

RNX_HD float log_polynomial(float v) {
  // Subnormal numbers are scaled up; so are what has no logarithm, to no effect.
  const bool is_small = v < 0x1p-126f;
  const uint32_t bits = bit_cast<uint32_t>(is_small ? v * 0x1p23f : v);
  // The exponent that leaves the mantissa in [2/3, 4/3). Unsigned: the bits of a negative number would overflow.
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f2aaaabu) >> 23;
  const uint32_t mantissa_bits = bits - (static_cast<uint32_t>(exponent) << 23);
  const float f = bit_cast<float>(mantissa_bits) - 1.0f;
  // (ln(1 + f)/f - 1)/f on [-1/3, 1/3], degree 8, relative error of the logarithm 4.5e-9.
  float q = -0x1.0956a0p-3f;
  q = q * f + 0x1.1ef4bcp-3f;
  q = q * f - 0x1.f24e26p-4f;
  q = q * f + 0x1.1eb7c6p-3f;
  q = q * f - 0x1.55a7dep-3f;
  q = q * f + 0x1.99d250p-3f;
  q = q * f - 0x1.fffe82p-3f;
  q = q * f + 0x1.555500p-2f;
  q = q * f - 0x1.000000p-1f;
  const float n = static_cast<float>(is_small ? exponent - 23 : exponent);
  const float result = n * kLn2High + (f + (f * f * q + n * kLn2Low));
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float without = v == 0.0f ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
  const float defined = v > 0.0f ? result : without;
  return v == kInfinity ? kInfinity : defined;
}

}  // namespace host_math

RNX_HD float accurate_exp(float v) {
#if defined(__CUDA_ARCH__)
  return expf(v);
#else
  return host_math::exp_polynomial(v);
#endif
}
RNX_HD double accurate_exp(double v) {
  return exp(v);
}
RNX_HD float accurate_log(float v) {
#if defined(__CUDA_ARCH__)
  return logf(v);
#else
  return host_math::log_polynomial(v);
#endif
}
RNX_HD double accurate_log(double v) {
  return log(v);
}

}  // namespace retinanet_ext
