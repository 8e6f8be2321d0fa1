// One aligned vector type: 16 bytes of storage elements, read and written by a single instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half_convert.h"

namespace retinanet_ext {

constexpr int kVectorBytes = 16;

template <typename S>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(S));

// Kept as words: an array of halves would be taken apart, with a register and a store for each.
template <typename S>
struct alignas(kVectorBytes) Vec {
  uint32_t words[4];
};

#if !defined(__CUDA_ARCH__)
// What the host reads and writes in one piece: an address that is not aligned is an error to UBSan, as it is to a GPU.
struct alignas(kVectorBytes) [[gnu::may_alias]] HostWords {
  uint32_t words[4];
};
#endif

template <typename S>
RNX_HD Vec<S> load_vector(const S* source) {
#if defined(__CUDA_ARCH__)
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  return {{words.x, words.y, words.z, words.w}};
#else
  const HostWords loaded = *reinterpret_cast<const HostWords*>(source);
  Vec<S> vector;
  std::memcpy(&vector, &loaded, sizeof(vector));
  return vector;
#endif
}

template <typename S>
RNX_HD void store_vector(S* target, const Vec<S>& vector) {
#if defined(__CUDA_ARCH__)
  // In words of its own: a store by type is taken apart in some places and not put together again.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "r"(vector.words[0]), "r"(vector.words[1]), "r"(vector.words[2]), "r"(vector.words[3])
               : "memory");
#else
  HostWords stored;
  std::memcpy(&stored, &vector, sizeof(stored));
  *reinterpret_cast<HostWords*>(target) = stored;
#endif
}

RNX_HD bool is_vector_aligned(const void* pointer) {
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

// Word `i` of a vector of halves, as its two elements, and back.
template <typename S>
RNX_HD void unpack_word(uint32_t word, float& low, float& high) {
  low = to_float(S{static_cast<uint16_t>(word)});
  high = to_float(S{static_cast<uint16_t>(word >> 16)});
}

template <>
RNX_HD void unpack_word<BFloat16>(uint32_t word, float& low, float& high) {
  low = bit_cast<float>(word << 16);
  high = bit_cast<float>(word & 0xffff0000u);
}

RNX_HD uint32_t pack_word(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
#endif
}

RNX_HD uint32_t pack_word(float low, float high, Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
#endif
}

// A vector's elements in the compute type.
template <typename S>
RNX_HD void unpack(const Vec<S>& vector, compute_t<S> (&values)[kVectorWidth<S>]) {
  if constexpr (sizeof(S) == 2) {
    for (int i = 0; i < 4; ++i) unpack_word<S>(vector.words[i], values[2 * i], values[2 * i + 1]);
  } else if constexpr (sizeof(S) == 4) {
    for (int i = 0; i < 4; ++i) values[i] = bit_cast<float>(vector.words[i]);
  } else {
    for (int i = 0; i < 2; ++i) {
      values[i] = bit_cast<double>(vector.words[2 * i] | static_cast<uint64_t>(vector.words[2 * i + 1]) << 32);
    }
  }
}

template <typename S>
RNX_HD Vec<S> pack(const compute_t<S> (&values)[kVectorWidth<S>]) {
  Vec<S> vector;
  if constexpr (sizeof(S) == 2) {
    for (int i = 0; i < 4; ++i) vector.words[i] = pack_word(values[2 * i], values[2 * i + 1], S{});
  } else if constexpr (sizeof(S) == 4) {
    for (int i = 0; i < 4; ++i) vector.words[i] = bit_cast<uint32_t>(values[i]);
  } else {
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = bit_cast<uint64_t>(values[i]);
      vector.words[2 * i] = static_cast<uint32_t>(bits);
      vector.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
  return vector;
}

}  // namespace retinanet_ext
