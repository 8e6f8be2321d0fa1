// The smallest of many unique keys, by one block: a histogram of one digit after the other, from the highest.
#pragma once

#include <cstdint>

#include "cuda/shared_memory.cuh"
#include "cuda/warp.cuh"

namespace retinanet_ext {

constexpr int kDigitBits = 8;
constexpr int kDigitValues = 1 << kDigitBits;

// A number with at least `count` and at most `room` keys at or below it, of the keys that for_each brings: for_each(f)
// calls f(key) for those that fall to this thread. There must be at least `count` of them, and `count` at least 1. The more
// room, the fewer digits are looked at. All threads of the block call it together; kBits: that a key has.
template <int kThreads, int kBits, typename Key, typename ForEach>
__device__ Key bound_of_smallest(int64_t count, int64_t room, const ForEach& for_each) {
  RNX_SHARED(uint32_t, histogram, kDigitValues);
  RNX_SHARED(uint32_t, found, 3);  // the digit, keys below it, keys that have it
  constexpr int kLaneValues = kDigitValues / kWarpLanes;
  Key prefix = 0;
  int64_t needed = count;  // of the keys with the prefix
  for (int shift = kBits - kDigitBits;; shift -= kDigitBits) {
    for (int i = threadIdx.x; i < kDigitValues; i += kThreads) histogram[i] = 0;
    __syncthreads();  // counting begins at zero
    for_each([&](Key key) {
      // In two steps: a shift by all bits would be undefined.
      if (key >> shift >> kDigitBits == prefix >> shift >> kDigitBits) {
        atomicAdd(histogram + static_cast<int>(key >> shift & (kDigitValues - 1)), 1u);
      }
    });
    __syncthreads();  // all are counted
    if (threadIdx.x < kWarpLanes) {
      const int lane = threadIdx.x;
      uint32_t own = 0;
      for (int i = 0; i < kLaneValues; ++i) own += histogram[lane * kLaneValues + i];
      uint32_t below = warp_sum_before(own);
      if (below < needed && needed <= static_cast<int64_t>(below) + own) {
        int digit = lane * kLaneValues;
        for (; below + histogram[digit] < needed; ++digit) below += histogram[digit];
        found[0] = digit;
        found[1] = below;
        found[2] = histogram[digit];
      }
    }
    __syncthreads();  // the digit is found
    prefix |= static_cast<Key>(found[0]) << shift;
    needed -= found[1];
    // All below the digit, and all that have it.
    if (count - needed + found[2] <= room) return prefix | ((static_cast<Key>(1) << shift) - 1);
  }
}

// Moves the keys of keys[0, count) that are at or below `bound` to the front, in any order. `kept`: in shared memory,
// zero at first; afterwards their number. All threads of the block call it together.
template <int kThreads, typename Key>
__device__ void compact_keys(Key* keys, int64_t count, Key bound, uint32_t* kept) {
  for (int64_t start = 0; start < count; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const Key key = i < count ? keys[i] : Key(0);
    __syncthreads();  // these keys are read: what is kept of them goes to places up to here
    if (i < count && key <= bound) keys[atomicAdd(kept, 1u)] = key;
  }
  __syncthreads();  // all have moved
}

}  // namespace retinanet_ext
