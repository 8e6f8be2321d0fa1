// What the focal loss kernels share: sizes, vectors of elements, sums that have the same bits on every run.
#pragma once

#include <cstdint>

#include "common/focal_math.h"
#include "cuda/shared_memory.cuh"
#include "cuda/vec.cuh"
#include "focal_loss/focal_task.h"

namespace retinanet_ext {

constexpr int kFocalThreads = 256;
constexpr int kFocalVectorsPerThread = 4;
// Resident blocks a multiprocessor: 64 registers a thread; float64, which is not built for speed, takes 128.
constexpr int kFocalMaxBlocks = 4;
template <typename In>
constexpr int kFocalMinBlocks = sizeof(In) == sizeof(double) ? kFocalMaxBlocks / 2 : kFocalMaxBlocks;
constexpr int kWarpSize = 32;
constexpr int kFocalWarps = kFocalThreads / kWarpSize;
static_assert(kFocalThreads % kWarpSize == 0 && kFocalWarps <= kWarpSize);

// Rows of a tile: as many as a batch of every thread's vectors holds, in whole vectors so that each tile starts aligned.
template <typename In>
int focal_rows_per_tile(int classes) {
  constexpr int kWidth = kVectorWidth<In>;
  constexpr int kTileElements = kFocalVectorsPerThread * kFocalThreads * kWidth;
  const int rows = kTileElements / classes / kWidth * kWidth;
  return rows > kWidth ? rows : kWidth;
}

// The elements of one vector.
template <typename T, int kWidth>
struct FocalVector {
  T losses[kWidth];
  T gradients[kWidth];

  __device__ __forceinline__ void set(int i, const LossAndGradient<T>& element) {
    losses[i] = element.loss;
    gradients[i] = element.gradient;
  }
};

// All as background, before alpha.
template <Gamma kGamma, typename T, int kWidth>
__device__ __forceinline__ void evaluate_background(const T (&x)[kWidth], T gamma, FocalVector<T, kWidth>& vector) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) vector.set(i, hard_element<T, kGamma>(x[i], gamma));
}

// The sum of a vector's losses.
template <typename T, int kWidth>
__device__ __forceinline__ T vector_sum(const FocalVector<T, kWidth>& vector) {
  T sum = T(0);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += vector.losses[i];
  return sum;
}

// The first `count` elements from `offset` on, which lies on a 16-byte boundary; by vectors where there are all of them.
template <typename S, typename T, int kWidth>
__device__ __forceinline__ void read_values(const void* base, int64_t offset, int count, T (&values)[kWidth]) {
  const S* source = static_cast<const S*>(base) + offset;
  constexpr int kPart = kVectorWidth<S>;
  static_assert(kWidth % kPart == 0);
  if (count >= kWidth) {
#pragma unroll
    for (int part = 0; part < kWidth; part += kPart) {
      compute_t<S> part_values[kPart];
      unpack(load_vector(source + part), part_values);
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[part + i] = T(part_values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) values[i] = T(load_value(source[i]));
    }
  }
}

template <typename S, typename T, int kWidth>
__device__ __forceinline__ void write_values(void* base, int64_t offset, int count, const T (&values)[kWidth]) {
  S* target = static_cast<S*>(base) + offset;
  constexpr int kPart = kVectorWidth<S>;
  static_assert(kWidth % kPart == 0);
  if (count >= kWidth) {
#pragma unroll
    for (int part = 0; part < kWidth; part += kPart) {
      compute_t<S> part_values[kPart];
#pragma unroll
      for (int i = 0; i < kPart; ++i) part_values[i] = values[part + i];
      store_vector(target + part, pack<S>(part_values));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) store_value(values[i], target[i]);
    }
  }
}

template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The block's total in thread 0, in a fixed order.
__device__ __forceinline__ double block_sum(double value, double* shared) {
  value = warp_sum(value);
  // The previous use of `shared` has been read by warp 0 before it is overwritten.
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  // Every warp's sum is there before warp 0 adds them.
  __syncthreads();
  if (threadIdx.x < kWarpSize) value = warp_sum(threadIdx.x < kFocalWarps ? shared[threadIdx.x] : 0.0);
  return value;
}

// Second stage of the sum: one block adds the blocks' numbers in a fixed order; a mean divides by what is not ignored.
template <typename T>
__global__ void __launch_bounds__(kFocalThreads)
    focal_finish_kernel(const double* block_sums, const int64_t* block_ignored, int blocks, bool mean, int64_t rows,
                        int classes, T* result) {
  RNX_SHARED(double, shared, kFocalWarps);
  double sum = 0;
  double ignored = 0;
  for (int i = threadIdx.x; i < blocks; i += kFocalThreads) {
    sum += block_sums[i];
    if (block_ignored != nullptr) ignored += static_cast<double>(block_ignored[i]);
  }
  sum = block_sum(sum, shared);
  ignored = block_sum(ignored, shared);
  if (threadIdx.x == 0) {
    const double kept = (static_cast<double>(rows) - ignored) * classes;
    *result = static_cast<T>(mean ? sum / kept : sum);
  }
}

}  // namespace retinanet_ext
