// What the lanes of a warp do together. All 32 must take part.
#pragma once

#include <cstdint>

#include "common/fast_math.h"

namespace retinanet_ext {

constexpr int kWarpLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The lowest bit that is set; bits must not be 0.
__device__ __forceinline__ int first_bit(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

__device__ __forceinline__ int first_bit(unsigned long long bits) {
  return __ffsll(static_cast<long long>(bits)) - 1;
}

__device__ __forceinline__ int count_bits(unsigned bits) {
  return __popc(bits);
}

__device__ __forceinline__ int count_bits(unsigned long long bits) {
  return __popcll(bits);
}

// The highest one.
__device__ __forceinline__ int last_bit(unsigned bits) {
  return kWarpLanes - 1 - __clz(static_cast<int>(bits));
}

template <typename T>
__device__ __forceinline__ T warp_max_by_shuffles(T value) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kWholeWarp, value);
#else
  return warp_max_by_shuffles(value);
#endif
}

__device__ __forceinline__ unsigned long long warp_max(unsigned long long value) {
  return warp_max_by_shuffles(value);
}

__device__ __forceinline__ int warp_sum(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kWholeWarp, value);
#else
  for (int step = kWarpLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
#endif
}

// The sum of the values of the lanes below this one.
__device__ __forceinline__ uint32_t warp_sum_before(uint32_t value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  uint32_t sum = value;
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const uint32_t other = __shfl_sync(kWholeWarp, sum, lane - step);
    if (lane >= step) sum += other;
  }
  return sum - value;
}

// What other threads may be changing by atomics: some value that it has or had, not one kept from an earlier look.
template <typename T>
__device__ __forceinline__ T load_shared_with_others(const T* source) {
#if defined(__CUDA_ARCH__)
  return __ldcg(source);
#else
  return *source;
#endif
}

}  // namespace retinanet_ext
