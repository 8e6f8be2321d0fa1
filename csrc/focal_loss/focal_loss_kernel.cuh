// Sigmoid focal loss on CUDA: loss, sum of losses, gradient, sum and gradient in one pass (formulas in
// common/focal_math.h).
//
// Threads   Blocks of 256 walk tiles of whole rows, about 16 KiB of logits each; a thread takes four 16-byte vectors of
//           a tile (8 half or 4 float elements each), all loaded before the first is used: 64 bytes in flight a thread,
//           64 KiB a multiprocessor at four blocks.
// Rows      Nearly every row of a dense detector is background. A tile in which no row is positive or ignored is one
//           flat run: no row, no column, no division. Any other tile finds row and column once a vector and walks on.
// Math      Background, gamma = 2: one ex2 and one rcp an element; ln(1 + u) is a polynomial, which leaves as much to the
//           arithmetic units as to the special-function units. General gamma: one ex2 more.
// Bytes     An element read once (2 for halves, 4 for float), and written once by loss and gradient; targets, one a row.
// Bound     Forward sum: issue slots and memory alike for halves, memory for float. Gradient: memory.
// Sums      Thread (float) → warp by shuffles → block (double) → one number a block, added in block order by a second
//           kernel. No float atomics: the same bits on every run of a device.
#pragma once

#include "focal_loss/focal_loss_device.cuh"

namespace retinanet_ext {

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
  bool wide_result;       // kLoss: float rather than the dtype of inputs
  const void* grad;       // kGradient: one element, or [rows, classes]
  bool wide_grad;         // the compute type rather than the dtype of inputs
  bool scalar_grad;       // one element for all
  const int64_t* ignored;  // gradient of a mean: number of ignored rows, or null
  bool mean;
  double* block_sums;       // sums: [blocks]
  int64_t* block_ignored;   // sums of a mean: [blocks] ignored rows; null otherwise
  bool filled;              // kGradient of a scalar_grad: `result` has the gradient for an upstream gradient of 1
  int32_t* was_one;         // kGradient of a scalar_grad: notes whether it was 1; or null
};

template <typename T>
__device__ __forceinline__ int64_t row_class(const FocalKernelArgs<T>& args, int64_t row) {
  return args.wide_targets ? static_cast<const int64_t*>(args.targets)[row]
                           : static_cast<int64_t>(static_cast<const int32_t*>(args.targets)[row]);
}

// Loss and gradient of one element against its row's class, which is not the ignored one, with every factor but the
// upstream gradient.
template <Gamma kGamma, bool kByColumn, typename T>
__device__ __forceinline__ LossAndGradient<T> indexed_element(const FocalKernelArgs<T>& args, T x, int64_t target,
                                                              int column) {
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
  const LossAndGradient<T> element = kByColumn && h != T(0) ? smoothed_element(z, args.gamma, h)
                                                            : hard_element<T, kGamma>(z, args.gamma);
  return {a * element.loss, (positive ? -a : a) * element.gradient};
}

template <typename T>
__device__ __forceinline__ bool is_background(const FocalKernelArgs<T>& args, int64_t row) {
  const int64_t target = row_class(args, row);
  return target != args.ignore_index && (target < 0 || target >= args.classes);
}

// The upstream gradient of element `i`.
template <typename In, typename T>
__device__ __forceinline__ T grad_of(const FocalKernelArgs<T>& args, int64_t i) {
  return args.wide_grad ? static_cast<const T*>(args.grad)[i] : T(load_value(static_cast<const In*>(args.grad)[i]));
}

// The upstream gradient's factor common to all elements.
template <typename In, FocalTask kTask, typename T>
__device__ __forceinline__ T common_grad(const FocalKernelArgs<T>& args) {
  if (!differentiates(kTask)) return T(1);
  T grad = T(1);
  if (kTask == FocalTask::kGradient) {
    if (!args.scalar_grad) return T(1);
    grad = grad_of<In>(args, 0);
  }
  if (!args.mean) return grad;
  const int64_t kept = args.rows - (args.ignored != nullptr ? *args.ignored : 0);
  return static_cast<T>(static_cast<double>(grad) / (static_cast<double>(kept) * args.classes));
}

// Whether the gradient is there already. Notes for the host whether the upstream gradient was 1.
template <typename In, FocalTask kTask, typename T>
__device__ __forceinline__ bool is_done(const FocalKernelArgs<T>& args) {
  if (kTask != FocalTask::kGradient || args.was_one == nullptr) return false;
  const T grad = grad_of<In>(args, 0);
  const bool one = grad == T(1);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.was_one = one;
  return one && args.filled;
}

// Ends the first `count` elements of a vector (all but in a tensor's last one): summed, or stored with the upstream
// gradient. The losses of others are zero already.
template <typename In, FocalTask kTask, typename T, int kWidth>
__device__ __forceinline__ void finish_vector(const FocalKernelArgs<T>& args, FocalVector<T, kWidth>& vector,
                                              int64_t offset, int count, T loss_scale, T grad_scale, T& sum) {
  if (sums(kTask)) sum += vector_sum(vector) * loss_scale;
  if (kTask == FocalTask::kSum) return;
  T values[kWidth];
  if (kTask == FocalTask::kLoss) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = vector.losses[i] * loss_scale;
  } else {
    T grad[kWidth] = {};
    const bool by_element = kTask == FocalTask::kGradient && !args.scalar_grad;
    if (by_element && args.wide_grad) {
      read_values<T>(args.grad, offset, count, grad);
    } else if (by_element) {
      read_values<In>(args.grad, offset, count, grad);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = vector.gradients[i] * grad_scale;
      if (by_element) values[i] *= grad[i];
    }
  }
  if (kTask == FocalTask::kLoss && sizeof(In) < sizeof(T) && args.wide_result) {
    write_values<T>(args.result, offset, count, values);
  } else {
    write_values<In>(args.result, offset, count, values);
  }
}

// Elements one by one, of `row` from `column` on, and of the rows that follow.
template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
__device__ __forceinline__ void indexed_elements(const FocalKernelArgs<T>& args, int64_t offset, int count, int64_t row,
                                                 int column, T upstream, T& sum) {
  int64_t target = row_class(args, row);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (column == args.classes) {
      column = 0;
      target = row_class(args, ++row);
    }
    const bool counts = target != args.ignore_index;
    const T x = T(load_value(static_cast<const In*>(args.inputs)[offset + i]));
    const LossAndGradient<T> element = indexed_element<kGamma, kByColumn>(args, x, target, column);
    if (sums(kTask) && counts) sum += element.loss;
    if (kTask != FocalTask::kSum) {
      T value = kTask == FocalTask::kLoss ? element.loss : element.gradient * upstream;
      if (kTask == FocalTask::kGradient && !args.scalar_grad) value *= grad_of<In>(args, offset + i);
      if (!counts) value = T(0);
      if (kTask == FocalTask::kLoss && sizeof(In) < sizeof(T) && args.wide_result) {
        static_cast<T*>(args.result)[offset + i] = value;
      } else {
        store_value(value, static_cast<In*>(args.result)[offset + i]);
      }
    }
    ++column;
  }
}

// Class indices. In: storage type of the logits.
template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
__global__ void __launch_bounds__(kFocalThreads, kFocalMinBlocks<In>)
    focal_index_kernel(const FocalKernelArgs<compute_t<In>> args) {
  using T = compute_t<In>;
  constexpr int kWidth = kVectorWidth<In>;
  constexpr int kBatch = kFocalVectorsPerThread * kFocalThreads;
  RNX_SHARED(double, shared, kFocalWarps);
  if (is_done<In, kTask>(args)) return;
  const In* inputs = static_cast<const In*>(args.inputs);
  const T upstream = common_grad<In, kTask>(args);
  const T background_grad = args.alpha_negative * upstream;
  T sum = T(0);
  int64_t ignored = 0;

  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t first_row = tile * args.rows_per_tile;
    const int64_t rest = args.rows - first_row;
    const int rows = static_cast<int>(rest < args.rows_per_tile ? rest : args.rows_per_tile);
    const int count = rows * args.classes;
    const int64_t base = first_row * args.classes;
    const int whole_vectors = count / kWidth;
    const int vectors = (count + kWidth - 1) / kWidth;  // only a tensor's last vector can be partial
    bool mixed = false;

    for (int start = 0; start < vectors; start += kBatch) {
      Vec<In> loaded[kFocalVectorsPerThread];
      if (!kByColumn) {
#pragma unroll
        for (int u = 0; u < kFocalVectorsPerThread; ++u) {
          const int index = start + u * kFocalThreads + static_cast<int>(threadIdx.x);
          if (index < whole_vectors) loaded[u] = load_vector(inputs + base + index * kWidth);
        }
      }
      if (start == 0) {
        // The loads above are under way while the rows' classes are read.
        bool found = kByColumn;
        for (int row = threadIdx.x; row < rows; row += kFocalThreads) {
          const int64_t target = row_class(args, first_row + row);
          const bool skipped = target == args.ignore_index;
          ignored += skipped;
          found |= skipped || (target >= 0 && target < args.classes);
        }
        // One row that is not background sends the whole block down the general path.
        mixed = __syncthreads_or(found) != 0;
      }
      if (mixed) break;
#pragma unroll
      for (int u = 0; u < kFocalVectorsPerThread; ++u) {
        const int index = start + u * kFocalThreads + static_cast<int>(threadIdx.x);
        if (index >= whole_vectors) continue;
        T x[kWidth];
        unpack(loaded[u], x);
        FocalVector<T, kWidth> vector;
        evaluate_background<kGamma>(x, args.gamma, vector);
        finish_vector<In, kTask>(args, vector, base + index * kWidth, kWidth, args.alpha_negative, background_grad, sum);
      }
    }

    // What is left, the whole tile or the partial vector, is loaded anew, a vector at a time, which leaves the registers to
    // the path above. Vectors whose rows are all background take the fast arithmetic here too. By column there is no fast
    // arithmetic, and neighbouring threads take neighbouring elements.
    constexpr int kStep = kByColumn ? 1 : kWidth;
    const int first = mixed ? 0 : whole_vectors * kWidth;
#pragma unroll 1
    for (int element = first + static_cast<int>(threadIdx.x) * kStep; element < count; element += kFocalThreads * kStep) {
      const int valid = count - element < kStep ? count - element : kStep;
      const int row = element / args.classes;
      const int column = element - row * args.classes;
      if (!kByColumn && valid == kWidth && column + kWidth <= 2 * args.classes) {
        const bool one_row = column + kWidth <= args.classes;
        if (is_background(args, first_row + row) && (one_row || is_background(args, first_row + row + 1))) {
          T x[kWidth];
          unpack(load_vector(inputs + base + element), x);
          FocalVector<T, kWidth> vector;
          evaluate_background<kGamma>(x, args.gamma, vector);
          finish_vector<In, kTask>(args, vector, base + element, kWidth, args.alpha_negative, background_grad, sum);
          continue;
        }
      }
      indexed_elements<In, kTask, kGamma, kByColumn>(args, base + element, valid, first_row + row, column, upstream, sum);
    }
  }
  if (sums(kTask)) {
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
  const T upstream = common_grad<In, kTask>(args);
  T sum = T(0);
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    for (int u = 0; u < kFocalVectorsPerThread; ++u) {
      const int64_t index = (tile * kFocalVectorsPerThread + u) * kFocalThreads + static_cast<int>(threadIdx.x);
      const int64_t element = index * kWidth;
      if (element >= total) break;
      const int valid = total - element < kWidth ? static_cast<int>(total - element) : kWidth;
      T x[kWidth] = {};
      T targets[kWidth] = {};
      FocalVector<T, kWidth> vector;
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
        vector.set(i, soft_element<T, kGamma>(x[i], targets[i], args.gamma, positive, negative));
        if (i >= valid) vector.losses[i] = T(0);
      }
      finish_vector<In, kTask>(args, vector, element, valid, T(1), upstream, sum);
    }
  }
  if (sums(kTask)) {
    const double block_total = block_sum(static_cast<double>(sum), shared);
    if (threadIdx.x == 0) args.block_sums[blockIdx.x] = block_total;
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
