// Sigmoid focal loss on CUDA: loss, sum of losses, gradient (formulas in common/focal_math.h).
//
// Threads   Blocks of 256 walk tiles of whole rows, about 16 KiB of logits each; a thread takes four 16-byte vectors of
//           a tile (8 half or 4 float elements each), all loaded before the first is used: 64 bytes in flight a thread,
//           64 KiB a multiprocessor at four blocks.
// Rows      Nearly every row of a dense detector is background. A tile in which no row is positive or ignored is one
//           flat run: no row, no column, no division. Any other tile finds row and column once a vector and walks on.
// Math      Background, gamma = 2: ex2, lg2 and a quarter of a rcp an element (four elements share one reciprocal of
//           the product of their denominators): 2.25 special-function operations. General gamma: one ex2 more.
// Bytes     An element read once (2 for halves, 4 for float), and written once by loss and gradient; targets, one a row.
// Bound     Forward sum: special functions for halves, memory for float. Gradient: memory.
// Sums      Thread (float) → warp by shuffles → block (double) → one number a block, added in block order by a second
//           kernel. No float atomics: the same bits on every run of a device.
#pragma once

#include <cstdint>

#include "common/focal_math.h"
#include "cuda/shared_memory.cuh"
#include "cuda/vec.cuh"

namespace retinanet_ext {

constexpr int kFocalThreads = 256;
constexpr int kFocalVectorsPerThread = 4;
// Resident blocks a multiprocessor: 64 registers a thread; float64, which is not built for speed, takes 128.
template <typename In>
constexpr int kFocalMinBlocks = sizeof(In) == sizeof(double) ? 2 : 4;
constexpr int kWarpSize = 32;
constexpr int kFocalWarps = kFocalThreads / kWarpSize;
static_assert(kFocalThreads % kWarpSize == 0 && kFocalWarps <= kWarpSize);

enum class FocalTask { kLoss, kSum, kGradient };

// T is the compute type, float or double.
template <typename T>
struct FocalKernelArgs {
  const void* inputs;   // [rows, classes] contiguous, 16-byte aligned
  const void* targets;  // class indices [rows], or soft targets [rows, classes], 16-byte aligned
  bool wide_targets;    // indices: int64 rather than int32; soft: float rather than the dtype of inputs
  int64_t rows;
  int classes;
  int rows_per_tile;  // focal_rows_per_tile
  int64_t tiles;
  T gamma;
  T alpha_positive;
  T alpha_negative;
  T half_smoothing;
  const T* class_alpha;  // [classes] or null
  const T* weight;       // [classes] or null
  int64_t ignore_index;
  void* result;           // loss or gradient [rows, classes], 16-byte aligned
  bool wide_result;       // float rather than the dtype of inputs
  const void* grad;       // kGradient: one element, or [rows, classes]
  bool wide_grad;         // the compute type rather than the dtype of inputs
  bool scalar_grad;       // one element for all
  const int64_t* ignored;  // kGradient of a mean: number of ignored rows, or null
  bool mean;
  double* block_sums;       // kSum: [blocks]
  int64_t* block_ignored;   // kSum of a mean: [blocks] ignored rows; null otherwise
};

// Rows of a tile: as many as a batch of every thread's vectors holds, in whole vectors so that each tile starts aligned.
template <typename In>
int focal_rows_per_tile(int classes) {
  constexpr int kWidth = kVectorWidth<In>;
  constexpr int kTileElements = kFocalVectorsPerThread * kFocalThreads * kWidth;
  const int rows = kTileElements / classes / kWidth * kWidth;
  return rows > kWidth ? rows : kWidth;
}

template <typename T>
__device__ __forceinline__ int64_t row_class(const FocalKernelArgs<T>& args, int64_t row) {
  return args.wide_targets ? static_cast<const int64_t*>(args.targets)[row]
                           : static_cast<int64_t>(static_cast<const int32_t*>(args.targets)[row]);
}

// r[i] = 1/d[i]. Float: one reciprocal for each four; d <= 2^31 + 1, so that the product stays below 2^125.
template <int kWidth>
__device__ __forceinline__ void reciprocals(const float (&d)[kWidth], float (&r)[kWidth]) {
  static_assert(kWidth % 4 == 0);
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    const float left = d[i] * d[i + 1];
    const float right = d[i + 2] * d[i + 3];
    const float all = reciprocal(left * right);
    const float inverse_left = all * right;
    const float inverse_right = all * left;
    r[i] = inverse_left * d[i + 1];
    r[i + 1] = inverse_left * d[i];
    r[i + 2] = inverse_right * d[i + 3];
    r[i + 3] = inverse_right * d[i + 2];
  }
}

template <int kWidth>
__device__ __forceinline__ void reciprocals(const double (&d)[kWidth], double (&r)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) r[i] = reciprocal(d[i]);
}

// Loss or local gradient of background elements, before alpha.
template <FocalTask kTask, Gamma kGamma, typename T, int kWidth>
__device__ __forceinline__ void background_vector(const T (&x)[kWidth], T gamma, T (&values)[kWidth]) {
  T e[kWidth];
  T d[kWidth];
  T r[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    e[i] = hard_exponential(x[i]);
    d[i] = T(1) + e[i];
  }
  reciprocals(d, r);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values[i] = kTask == FocalTask::kGradient ? hard_gradient<T, kGamma>(x[i], e[i], r[i], gamma)
                                              : hard_loss<T, kGamma>(x[i], e[i], r[i], gamma);
  }
}

// Loss or local gradient of one element against its row's class, which is not the ignored one, with every factor but the
// upstream gradient.
template <FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
__device__ __forceinline__ T indexed_element(const FocalKernelArgs<T>& args, T x, int64_t target, int column) {
  const bool positive = target == column;
  const bool foreground = target >= 0 && target < args.classes;
  T a = positive ? args.alpha_positive : args.alpha_negative;
  if (kByColumn && args.class_alpha != nullptr) {
    const T alpha = args.class_alpha[column];
    a = alpha < T(0) ? T(1) : (positive ? alpha : T(1) - alpha);
  }
  if (args.weight != nullptr && foreground) a *= args.weight[target];
  const T z = positive ? -x : x;
  const T h = args.half_smoothing;
  if (kTask == FocalTask::kGradient) {
    const T slope = kByColumn && h != T(0) ? smoothed_gradient(z, args.gamma, h) : hard_gradient<T, kGamma>(z, args.gamma);
    return positive ? -a * slope : a * slope;
  }
  return a * (kByColumn && h != T(0) ? smoothed_loss(z, args.gamma, h) : hard_loss<T, kGamma>(z, args.gamma));
}

// The upstream gradient's factor common to all elements.
template <typename In, typename T>
__device__ __forceinline__ T common_grad(const FocalKernelArgs<T>& args) {
  if (!args.scalar_grad) return T(1);
  const T grad = args.wide_grad ? *static_cast<const T*>(args.grad) : T(load_value(*static_cast<const In*>(args.grad)));
  if (!args.mean) return grad;
  const int64_t kept = args.rows - (args.ignored != nullptr ? *args.ignored : 0);
  return static_cast<T>(static_cast<double>(grad) / (static_cast<double>(kept) * args.classes));
}

template <typename S, typename T, int kWidth>
__device__ __forceinline__ void read_values(const void* base, int64_t offset, int count, T (&values)[kWidth]) {
  const S* source = static_cast<const S*>(base) + offset;
  if (count == kWidth) {
    const Vec<S, kWidth> vector = load_vector<S, kWidth>(source);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = T(load_value(vector.values[i]));
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
  if (count == kWidth) {
    Vec<S, kWidth> vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) store_value(values[i], vector.values[i]);
    store_vector(target, vector);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) store_value(values[i], target[i]);
    }
  }
}

// Ends the first `count` values of a vector (all but in a tensor's last one): summed, or times the upstream gradient
// and stored. Elements whose bit of `skipped` is set are zero, whatever the upstream gradient is.
template <typename In, FocalTask kTask, typename T, int kWidth>
__device__ __forceinline__ void finish_vector(const FocalKernelArgs<T>& args, T (&values)[kWidth], int64_t offset,
                                              int count, unsigned skipped, T scale, T& sum) {
  if (kTask == FocalTask::kSum) {
    T vector_sum = T(0);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vector_sum += i < count && (skipped >> i & 1u) == 0 ? values[i] : T(0);
    sum += vector_sum * scale;
    return;
  }
  if (kTask == FocalTask::kGradient && !args.scalar_grad) {
    T grad[kWidth] = {};
    if (args.wide_grad) {
      read_values<T>(args.grad, offset, count, grad);
    } else {
      read_values<In>(args.grad, offset, count, grad);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] *= grad[i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = (skipped >> i & 1u) != 0 ? T(0) : values[i] * scale;
  if (args.wide_result) {
    write_values<T>(args.result, offset, count, values);
  } else {
    write_values<In>(args.result, offset, count, values);
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

// Class indices. In: storage type of the logits.
template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
__global__ void __launch_bounds__(kFocalThreads, kFocalMinBlocks<In>)
    focal_index_kernel(const FocalKernelArgs<compute_t<In>> args) {
  using T = compute_t<In>;
  constexpr int kWidth = kVectorWidth<In>;
  constexpr int kBatch = kFocalVectorsPerThread * kFocalThreads;
  RNX_SHARED(double, shared, kFocalWarps);
  const In* inputs = static_cast<const In*>(args.inputs);
  const T upstream = kTask == FocalTask::kGradient ? common_grad<In>(args) : T(1);
  const T background_scale = args.alpha_negative * upstream;
  T sum = T(0);
  int64_t ignored = 0;

  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t first_row = tile * args.rows_per_tile;
    const int64_t rest = args.rows - first_row;
    const int rows = static_cast<int>(rest < args.rows_per_tile ? rest : args.rows_per_tile);
    const int count = rows * args.classes;
    const int64_t base = first_row * args.classes;
    const int vectors = (count + kWidth - 1) / kWidth;  // only a tensor's last vector can be partial
    bool mixed = kByColumn;

    for (int start = 0; start < vectors; start += kBatch) {
      Vec<In, kWidth> loaded[kFocalVectorsPerThread];
#pragma unroll
      for (int u = 0; u < kFocalVectorsPerThread; ++u) {
        const int element = (start + u * kFocalThreads + static_cast<int>(threadIdx.x)) * kWidth;
        if (element + kWidth <= count) loaded[u] = load_vector(inputs + base + element);
      }
      if (start == 0) {
        // The loads above are under way while the rows' classes are read.
        bool found = false;
        for (int row = threadIdx.x; row < rows; row += kFocalThreads) {
          const int64_t target = row_class(args, first_row + row);
          const bool skipped = target == args.ignore_index;
          ignored += skipped;
          found |= skipped || (target >= 0 && target < args.classes);
        }
        // One row that is not background sends the whole block down the general path.
        mixed |= __syncthreads_or(found) != 0;
      }
#pragma unroll
      for (int u = 0; u < kFocalVectorsPerThread; ++u) {
        const int element = (start + u * kFocalThreads + static_cast<int>(threadIdx.x)) * kWidth;
        if (element >= count) continue;
        const int valid = count - element < kWidth ? count - element : kWidth;
        T x[kWidth];
        T values[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          x[i] = valid == kWidth ? T(load_value(loaded[u].values[i]))
                                 : (i < valid ? T(load_value(inputs[base + element + i])) : T(0));
        }
        if (mixed) {
          int row = element / args.classes;
          int column = element - row * args.classes;
          int64_t target = row_class(args, first_row + row);
          unsigned skipped = 0;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            skipped |= static_cast<unsigned>(target == args.ignore_index) << i;
            values[i] = i < valid ? indexed_element<kTask, kGamma, kByColumn>(args, x[i], target, column) : T(0);
            if (++column == args.classes && i + 1 < valid) {
              column = 0;
              target = row_class(args, first_row + ++row);
            }
          }
          finish_vector<In, kTask>(args, values, base + element, valid, skipped, upstream, sum);
        } else {
          background_vector<kTask, kGamma>(x, args.gamma, values);
          finish_vector<In, kTask>(args, values, base + element, valid, 0u, background_scale, sum);
        }
      }
    }
  }
  if (kTask == FocalTask::kSum) {
    const double total = block_sum(static_cast<double>(sum), shared);
    if (threadIdx.x == 0) args.block_sums[blockIdx.x] = total;
    if (args.block_ignored != nullptr) {
      const double skipped = block_sum(static_cast<double>(ignored), shared);
      if (threadIdx.x == 0) args.block_ignored[blockIdx.x] = static_cast<int64_t>(skipped);
    }
  }
}

// Soft targets, elementwise; a tile is kFocalVectorsPerThread * kFocalThreads vectors here.
template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
__global__ void __launch_bounds__(kFocalThreads, kFocalMinBlocks<In>)
    focal_soft_kernel(const FocalKernelArgs<compute_t<In>> args) {
  using T = compute_t<In>;
  constexpr int kWidth = kVectorWidth<In>;
  RNX_SHARED(double, shared, kFocalWarps);
  const int64_t total = args.rows * args.classes;
  const T upstream = kTask == FocalTask::kGradient ? common_grad<In>(args) : T(1);
  T sum = T(0);
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    for (int u = 0; u < kFocalVectorsPerThread; ++u) {
      const int64_t vector = (tile * kFocalVectorsPerThread + u) * kFocalThreads + static_cast<int>(threadIdx.x);
      const int64_t element = vector * kWidth;
      if (element >= total) break;
      const int valid = total - element < kWidth ? static_cast<int>(total - element) : kWidth;
      T x[kWidth] = {};
      T targets[kWidth] = {};
      T values[kWidth];
      read_values<In>(args.inputs, element, valid, x);
      if (args.wide_targets) {
        read_values<T>(args.targets, element, valid, targets);
      } else {
        read_values<In>(args.targets, element, valid, targets);
      }
      int column = kByColumn ? static_cast<int>(element % args.classes) : 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        T positive = args.alpha_positive;
        T negative = args.alpha_negative;
        if (kByColumn) {
          const T alpha = args.class_alpha[column];
          positive = alpha < T(0) ? T(1) : alpha;
          negative = alpha < T(0) ? T(1) : T(1) - alpha;
          column = column + 1 == args.classes ? 0 : column + 1;
        }
        values[i] = kTask == FocalTask::kGradient
                        ? soft_gradient<T, kGamma>(x[i], targets[i], args.gamma, positive, negative)
                        : soft_loss<T, kGamma>(x[i], targets[i], args.gamma, positive, negative);
      }
      finish_vector<In, kTask>(args, values, element, valid, 0u, upstream, sum);
    }
  }
  if (kTask == FocalTask::kSum) {
    const double block_total = block_sum(static_cast<double>(sum), shared);
    if (threadIdx.x == 0) args.block_sums[blockIdx.x] = block_total;
  }
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

// Number of rows whose class is `ignore_index`, added to *ignored: integers, so that the atomic's order is no matter.
template <typename Index>
__global__ void __launch_bounds__(kFocalThreads)
    count_ignored_kernel(const Index* targets, int64_t rows, int64_t ignore_index, unsigned long long* ignored) {
  unsigned long long count = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kFocalThreads + threadIdx.x; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kFocalThreads) {
    count += static_cast<int64_t>(targets[row]) == ignore_index;
  }
  count = warp_sum(count);
  if (threadIdx.x % kWarpSize == 0 && count != 0) atomicAdd(ignored, count);
}

}  // namespace retinanet_ext
