// The focal loss of runs of elements on the CPU, for the operators that walk rows and planes (formulas in
// common/focal_math.h).
//
// A run is processed in blocks that stay in the first-level cache: converted to float where stored as halves, evaluated
// by a loop that vectorises, written or summed. Everything here is compiled anew for each task and
// instruction set, but for the conversion of halves (common/half_runs.h) and streamed stores.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dispatch.h"
#include "common/focal_math.h"
#include "common/half_runs.h"
#include "common/huge_pages.h"
#include "common/streaming.h"
#include "focal_loss/focal_task.h"

namespace retinanet_ext {

constexpr int64_t kFocalBlock = 512;            // elements evaluated at a time: 2 KiB of float
constexpr int64_t kFocalChunkElements = 16384;  // elements of a parallel task, about
constexpr int64_t kSumLanes = 16;               // a block's tree sum ends at this width
constexpr int64_t kVectorLanes = 16;            // the widest vector: 512 bits of float
static_assert(kFocalBlock % kSumLanes == 0 && (kFocalBlock & (kFocalBlock - 1)) == 0);
static_assert(kFocalBlock % kVectorLanes == 0);

// Elements are evaluated in whole vectors, up to this many for `count` of them: what a vectorised loop leaves over runs in
// a copy of the loop that a compiler may round otherwise. (g++ vectorises by divisors of this number.)
RNX_HD int64_t whole_vectors(int64_t count) {
  return (count + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
}

// Rows of one block of memory. T is the compute type, float or double.
template <typename T>
struct FocalWork {
  const void* inputs;
  ScalarType input_type;
  int64_t row_stride;  // of inputs; every other tensor has contiguous rows
  int64_t num_rows;
  int64_t num_classes;
  const void* targets;
  ScalarType target_type;
  void* result;  // loss or gradient; unused by kSum
  ScalarType result_type;
  bool streams;      // the result is written around the caches
  const void* grad;  // kGradient: the upstream gradient of each element, or null
  ScalarType grad_type;
  T grad_scale;  // factor of every element's gradient
  T gamma;
  T alpha_positive;
  T alpha_negative;
  T half_smoothing;
  const T* class_alpha_positive;  // [K] or null
  const T* class_alpha_negative;
  const T* weight;  // [K] or null
  int64_t ignore_index;
};

// Where a kernel writes losses or gradients: `bytes` in all, of which `data` may be a part.
template <typename T>
void set_result(FocalWork<T>& work, void* data, ScalarType type, size_t bytes) {
  work.result = data;
  work.result_type = type;
  work.streams = outgrows_cache(bytes);
}

template <typename T>
RNX_HD const T* read_block(const void* base, ScalarType type, int64_t offset, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == ScalarType::Half) {
      widen(static_cast<const Float16*>(base) + offset, count, buffer);
      return buffer;
    }
    if (type == ScalarType::BFloat16) {
      widen(static_cast<const BFloat16*>(base) + offset, count, buffer);
      return buffer;
    }
  }
  return static_cast<const T*>(base) + offset;
}

// The same with zeros behind, up to whole vectors.
template <typename T>
RNX_HD const T* read_whole_vectors(const void* base, ScalarType type, int64_t offset, int64_t count, T* buffer) {
  const T* values = read_block(base, type, offset, count, buffer);
  const int64_t end = whole_vectors(count);
  if (end == count) return values;
  if (values != buffer) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = values[i];
  }
  for (int64_t i = count; i < end; ++i) buffer[i] = T(0);
  return buffer;
}

// The upstream gradient of a sum or mean: one number, of the inputs' dtype or wider.
template <typename T>
T read_scalar(const torch::stable::Tensor& tensor) {
  T buffer[1];
  return *read_block(tensor.const_data_ptr(), tensor.scalar_type(), 0, 1, buffer);
}

template <typename Half>
RNX_HD void write_halves(void* base, int64_t offset, int64_t count, const float* values, bool streams) {
  Half* target = static_cast<Half*>(base) + offset;
  if (!streams) return narrow(values, count, target);
  Half buffer[kFocalBlock];
  narrow(values, count, buffer);
  stream_copy(target, buffer, count);
}

// `streams`: around the caches.
template <typename T>
RNX_HD void write_block(void* base, ScalarType type, int64_t offset, int64_t count, const T* values, bool streams) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == ScalarType::Half) return write_halves<Float16>(base, offset, count, values, streams);
    if (type == ScalarType::BFloat16) return write_halves<BFloat16>(base, offset, count, values, streams);
  }
  T* target = static_cast<T*>(base) + offset;
  if (streams) return stream_copy(target, values, count);
  for (int64_t i = 0; i < count; ++i) target[i] = values[i];
}

// Sum of a full block by halves: vectorises, and its rounding error grows with log2(kFocalBlock).
template <int64_t kWidth, typename T>
RNX_HD double tree_sum(T* values) {
  if constexpr (kWidth > kSumLanes) {
    constexpr int64_t kHalf = kWidth / 2;
    for (int64_t i = 0; i < kHalf; ++i) values[i] += values[i + kHalf];
    return tree_sum<kHalf>(values);
  } else {
    double sum = 0;
    for (int64_t i = 0; i < kWidth; ++i) sum += static_cast<double>(values[i]);
    return sum;
  }
}

// Losses and gradients of a block, before the upstream gradient.
template <typename T>
struct FocalBlock {
  T losses[kFocalBlock];
  T gradients[kFocalBlock];
};

// Evaluates `count` elements as background: losses before alpha_negative, gradients with alpha_negative and grad_scale.
// Where kByColumn they lie in columns `column`, `column` + 1, ... of one row, and losses have their alphas. Behind them x
// is read, and the block written, up to whole vectors.
template <FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD void evaluate_background(const FocalWork<T>& work, const T* x, int64_t count, int64_t column,
                                FocalBlock<T>& block) {
  const T gamma = work.gamma;
  const T h = work.half_smoothing;
  const T scale = work.alpha_negative * work.grad_scale;
  const int64_t end = whole_vectors(count);
  if (kByColumn && h != T(0)) {
    for (int64_t i = 0; i < end; ++i) {
      const LossAndGradient<T> element = smoothed_element(x[i], gamma, h);
      if (kTask != FocalTask::kGradient) block.losses[i] = element.loss;
      if (differentiates(kTask)) block.gradients[i] = element.gradient * scale;
    }
  } else {
    for (int64_t i = 0; i < end; ++i) {
      const LossAndGradient<T> element = hard_element<T, kGamma>(x[i], gamma);
      if (kTask != FocalTask::kGradient) block.losses[i] = element.loss;
      if (differentiates(kTask)) block.gradients[i] = element.gradient * scale;
    }
  }
  if (kByColumn && work.class_alpha_negative != nullptr) {
    const T* by_class = work.class_alpha_negative + column;
    for (int64_t i = 0; i < count; ++i) {
      if (kTask != FocalTask::kGradient) block.losses[i] *= by_class[i];
      if (differentiates(kTask)) block.gradients[i] *= by_class[i];
    }
  }
}

// Adds a block's losses, times `loss_scale`, to `sum`, and writes what is to be written.
template <FocalTask kTask, typename T>
RNX_HD void finish_block(const FocalWork<T>& work, FocalBlock<T>& block, int64_t offset, int64_t count, T loss_scale,
                         double& sum) {
  if constexpr (sums(kTask)) {
    for (int64_t i = count; i < kFocalBlock; ++i) block.losses[i] = T(0);
    sum += static_cast<double>(loss_scale) * tree_sum<kFocalBlock>(block.losses);
  }
  if constexpr (kTask == FocalTask::kLoss) {
    for (int64_t i = 0; i < count; ++i) block.losses[i] *= loss_scale;
    write_block(work.result, work.result_type, offset, count, block.losses, work.streams);
  }
  if constexpr (differentiates(kTask)) {
    if (kTask == FocalTask::kGradient && work.grad != nullptr) {
      T buffer[kFocalBlock];
      const T* grad = read_block(work.grad, work.grad_type, offset, count, buffer);
      for (int64_t i = 0; i < count; ++i) block.gradients[i] *= grad[i];
    }
    write_block(work.result, work.result_type, offset, count, block.gradients, work.streams);
  }
}

// `count` background elements from `input_offset` on, which lie in columns `column`, `column` + 1, … of one row where
// kByColumn, and anywhere otherwise.
template <FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD void background_run(const FocalWork<T>& work, int64_t input_offset, int64_t offset, int64_t count,
                           int64_t column, double& sum) {
  T buffer[kFocalBlock];
  FocalBlock<T> block;
  for (int64_t start = 0; start < count; start += kFocalBlock) {
    const int64_t n = std::min(kFocalBlock, count - start);
    const T* x = read_whole_vectors(work.inputs, work.input_type, input_offset + start, n, buffer);
    evaluate_background<kTask, kGamma, kByColumn>(work, x, n, column + start, block);
    finish_block<kTask>(work, block, offset + start, n, work.alpha_negative, sum);
  }
}

// The one element of a foreground row that is its class.
template <FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD void positive_element(const FocalWork<T>& work, int64_t input_offset, int64_t offset, int64_t column,
                             double& sum) {
  T buffer[1];
  const T z = -*read_block(work.inputs, work.input_type, input_offset, 1, buffer);
  T a = work.alpha_positive;
  if (kByColumn && work.class_alpha_positive != nullptr) a *= work.class_alpha_positive[column];
  const T h = work.half_smoothing;
  const LossAndGradient<T> element = kByColumn && h != T(0) ? smoothed_element(z, work.gamma, h)
                                                            : hard_element<T, kGamma>(z, work.gamma);
  if (sums(kTask)) sum += static_cast<double>(a * element.loss);
  if (kTask == FocalTask::kSum) return;
  T value[1] = {a * element.loss};
  if (differentiates(kTask)) {
    value[0] = element.gradient * (-a * work.grad_scale);
    if (kTask == FocalTask::kGradient && work.grad != nullptr) {
      value[0] *= *read_block(work.grad, work.grad_type, offset, 1, buffer);
    }
  }
  write_block(work.result, work.result_type, offset, 1, value, false);
}

template <typename T>
RNX_HD void zero_run(const FocalWork<T>& work, int64_t offset, int64_t count) {
  const T zeros[kFocalBlock] = {};
  for (int64_t start = 0; start < count; start += kFocalBlock) {
    write_block(work.result, work.result_type, offset + start, std::min(kFocalBlock, count - start), zeros,
                work.streams);
  }
}

template <typename T>
RNX_HD int64_t row_class(const FocalWork<T>& work, int64_t row) {
  return work.target_type == ScalarType::Int ? static_cast<const int32_t*>(work.targets)[row]
                                             : static_cast<const int64_t*>(work.targets)[row];
}

// Rows [begin, end) against class indices. A factor that belongs to a whole row (its class weight) or to the sum is
// applied by copying the few numbers of `work` that carry it. All runs pass one call, because each is compiled apart.
template <FocalTask kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD double index_rows(const FocalWork<T>& work, int64_t begin, int64_t end) {
  const int64_t k = work.num_classes;
  const bool packed = work.row_stride == k && !kByColumn;
  double sum = 0;
  FocalWork<T> weighted = work;
  int64_t next_row = begin;
  for (int64_t row = begin; row < end; row = next_row) {
    const int64_t target = row_class(work, row);
    next_row = row + 1;
    if (target == work.ignore_index) {
      if (kTask != FocalTask::kSum) zero_run(work, row * k, k);
      continue;
    }
    const int64_t in = row * work.row_stride;
    const int64_t out = row * k;
    const bool positive = target >= 0 && target < k;
    if (!positive && packed) {
      for (; next_row < end; ++next_row) {
        const int64_t next = row_class(work, next_row);
        if (next == work.ignore_index || (next >= 0 && next < k)) break;
      }
    }
    const T factor = positive && work.weight != nullptr ? work.weight[target] : T(1);
    weighted.alpha_positive = work.alpha_positive * factor;
    weighted.alpha_negative = work.alpha_negative * factor;
    // The whole of the rows, or what lies on either side of the class.
    for (int64_t side = 0; side < (positive ? 2 : 1); ++side) {
      const int64_t first = side == 0 ? 0 : target + 1;
      const int64_t stop = positive && side == 0 ? target : (next_row - row) * k;
      background_run<kTask, kGamma, kByColumn>(weighted, in + first, out + first, stop - first, first, sum);
      if (positive && side == 0) {
        positive_element<kTask, kGamma, kByColumn>(weighted, in + target, out + target, target, sum);
      }
    }
  }
  return sum;
}

}  // namespace retinanet_ext
