// float16 and bfloat16 as bit patterns, to and from float: on the host without branches so that loops over them
// vectorise, on the device by its conversion instructions.
// Rounding is to nearest, ties to even; NaN stays NaN; overflow becomes infinity.
#pragma once

#include <cstdint>

#include "fast_math.h"

namespace retinanet_ext {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

RNX_HD float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

RNX_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The half's exponent and mantissa in a float's fields are the value times 2^-112, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const bool infinite_or_nan = (value.bits & 0x7c00u) == 0x7c00u;
  return bit_cast<float>(sign | (infinite_or_nan ? magnitude | 0x7f800000u : scaled));
#endif
}

RNX_HD BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
}

RNX_HD Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: round the 13 bits that go, then move the exponent's bias from 127 to 15.
  const uint32_t rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t normal = rounded < 0x7c00u ? rounded : 0x7c00u;
  // Subnormal halves: at 0.5 a float's last place is 2^-24, the half's smallest step, so the sum rounds as needed.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
#endif
}

}  // namespace retinanet_ext
