// Sigmoid focal loss on the CPU: loss and gradient (formulas in common/focal_math.h).
//
// Work is cut into chunks of a fixed number of rows, whatever the number of threads, and each chunk's sum is added in
// order: the same bits for any thread count. Within a chunk, neighbouring background rows are one long run; only a
// positive row is split around its class. A run is processed in blocks that stay in the first-level cache: converted to
// float where stored as halves, evaluated by a loop that vectorises, written or summed.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>

#include "common/cpu_dispatch.h"
#include "common/focal_math.h"
#include "common/half_convert.h"
#include "focal_loss/focal_loss_args.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 512;            // elements evaluated at a time: 2 KiB of float
constexpr int64_t kChunkElements = 16384;  // elements of a parallel task, rounded to whole rows
constexpr int64_t kSumLanes = 16;          // a block's tree sum ends at this width
static_assert(kBlock % kSumLanes == 0 && (kBlock & (kBlock - 1)) == 0);

enum class Task { kLoss, kSum, kGradient };

// T is the compute type, float or double.
template <typename T>
struct Work {
  const void* inputs;
  ScalarType input_type;
  int64_t row_stride;  // of inputs; every other tensor has contiguous rows
  int64_t num_rows;
  int64_t num_classes;
  const void* targets;
  ScalarType target_type;
  void* result;  // loss or gradient; unused by kSum
  ScalarType result_type;
  const void* grad;  // kGradient: the upstream gradient of each element, or null
  ScalarType grad_type;
  T grad_scale;  // kGradient: factor of every element
  T gamma;
  T alpha_positive;
  T alpha_negative;
  T half_smoothing;
  const T* class_alpha_positive;  // [K] or null
  const T* class_alpha_negative;
  const T* weight;  // [K] or null
  int64_t ignore_index;
};

template <typename T>
RNX_HD const T* read_block(const void* base, ScalarType type, int64_t offset, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == ScalarType::Half) {
      const Float16* source = static_cast<const Float16*>(base) + offset;
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(source[i]);
      return buffer;
    }
    if (type == ScalarType::BFloat16) {
      const BFloat16* source = static_cast<const BFloat16*>(base) + offset;
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(source[i]);
      return buffer;
    }
  }
  return static_cast<const T*>(base) + offset;
}

template <typename T>
RNX_HD void write_block(void* base, ScalarType type, int64_t offset, int64_t count, const T* values) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == ScalarType::Half) {
      Float16* target = static_cast<Float16*>(base) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = to_float16(values[i]);
      return;
    }
    if (type == ScalarType::BFloat16) {
      BFloat16* target = static_cast<BFloat16*>(base) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(values[i]);
      return;
    }
  }
  T* target = static_cast<T*>(base) + offset;
  for (int64_t i = 0; i < count; ++i) target[i] = values[i];
}

// Sum of a full block by halves: vectorises, and its rounding error grows with log2(kBlock).
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

// Finishes a block of losses or local gradients: times the upstream gradient, then stored or summed.
template <Task kTask, typename T>
RNX_HD void finish_block(const Work<T>& work, T* values, int64_t offset, int64_t count, double& sum) {
  if constexpr (kTask == Task::kSum) {
    for (int64_t i = count; i < kBlock; ++i) values[i] = T(0);
    sum += tree_sum<kBlock>(values);
  } else {
    if constexpr (kTask == Task::kGradient) {
      if (work.grad != nullptr) {
        T buffer[kBlock];
        const T* grad = read_block(work.grad, work.grad_type, offset, count, buffer);
        for (int64_t i = 0; i < count; ++i) values[i] *= grad[i];
      }
      for (int64_t i = 0; i < count; ++i) values[i] *= work.grad_scale;
    }
    write_block(work.result, work.result_type, offset, count, values);
  }
}

// `count` background elements from `input_offset` on, which lie in columns `column`, `column` + 1, … of one row where
// kByColumn, and anywhere otherwise.
template <Task kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD void background_run(const Work<T>& work, int64_t input_offset, int64_t offset, int64_t count, int64_t column,
                           double& sum) {
  T buffer[kBlock];
  T values[kBlock];
  const T gamma = work.gamma;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t n = std::min(kBlock, count - start);
    const T* x = read_block(work.inputs, work.input_type, input_offset + start, n, buffer);
    const T a = work.alpha_negative;
    const T h = work.half_smoothing;
    if (kByColumn && h != T(0)) {
      for (int64_t i = 0; i < n; ++i) {
        values[i] = a * (kTask == Task::kGradient ? smoothed_gradient(x[i], gamma, h) : smoothed_loss(x[i], gamma, h));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        values[i] = a * (kTask == Task::kGradient ? hard_gradient<T, kGamma>(x[i], gamma)
                                                  : hard_loss<T, kGamma>(x[i], gamma));
      }
    }
    if (kByColumn && work.class_alpha_negative != nullptr) {
      const T* by_class = work.class_alpha_negative + column + start;
      for (int64_t i = 0; i < n; ++i) values[i] *= by_class[i];
    }
    finish_block<kTask>(work, values, offset + start, n, sum);
  }
}

// The one element of a foreground row that is its class.
template <Task kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD void positive_element(const Work<T>& work, int64_t input_offset, int64_t offset, int64_t column, double& sum) {
  T buffer[1];
  const T z = -*read_block(work.inputs, work.input_type, input_offset, 1, buffer);
  T a = work.alpha_positive;
  if (kByColumn && work.class_alpha_positive != nullptr) a *= work.class_alpha_positive[column];
  const T gamma = work.gamma;
  const T h = work.half_smoothing;
  T values[kBlock];
  if constexpr (kTask == Task::kGradient) {
    values[0] = -a * (kByColumn && h != T(0) ? smoothed_gradient(z, gamma, h) : hard_gradient<T, kGamma>(z, gamma));
  } else {
    values[0] = a * (kByColumn && h != T(0) ? smoothed_loss(z, gamma, h) : hard_loss<T, kGamma>(z, gamma));
  }
  if constexpr (kTask == Task::kSum) {
    sum += static_cast<double>(values[0]);
  } else {
    finish_block<kTask>(work, values, offset, 1, sum);
  }
}

template <typename T>
RNX_HD void zero_run(const Work<T>& work, int64_t offset, int64_t count) {
  T zeros[kBlock] = {};
  for (int64_t start = 0; start < count; start += kBlock) {
    write_block(work.result, work.result_type, offset + start, std::min(kBlock, count - start), zeros);
  }
}

template <typename T>
RNX_HD int64_t row_class(const Work<T>& work, int64_t row) {
  return work.target_type == ScalarType::Int ? static_cast<const int32_t*>(work.targets)[row]
                                             : static_cast<const int64_t*>(work.targets)[row];
}

// Rows [begin, end) against class indices. A factor that belongs to a whole row (its class weight) or to the sum is
// applied by copying the few numbers of `work` that carry it.
template <Task kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD double index_rows(const Work<T>& work, int64_t begin, int64_t end) {
  const int64_t k = work.num_classes;
  const bool packed = work.row_stride == k && !kByColumn;
  double sum = 0;
  int64_t row = begin;
  while (row < end) {
    const int64_t target = row_class(work, row);
    if (target == work.ignore_index) {
      if (kTask != Task::kSum) zero_run(work, row * k, k);
      ++row;
    } else if (target < 0 || target >= k) {
      int64_t last = row + 1;
      if (packed) {
        for (; last < end; ++last) {
          const int64_t next = row_class(work, last);
          if (next == work.ignore_index || (next >= 0 && next < k)) break;
        }
      }
      background_run<kTask, kGamma, kByColumn>(work, row * work.row_stride, row * k, (last - row) * k, 0, sum);
      row = last;
    } else {
      const int64_t in = row * work.row_stride;
      const int64_t out = row * k;
      Work<T> weighted = work;
      if (work.weight != nullptr) {
        weighted.alpha_positive *= work.weight[target];
        weighted.alpha_negative *= work.weight[target];
      }
      background_run<kTask, kGamma, kByColumn>(weighted, in, out, target, 0, sum);
      positive_element<kTask, kGamma, kByColumn>(weighted, in + target, out + target, target, sum);
      background_run<kTask, kGamma, kByColumn>(weighted, in + target + 1, out + target + 1, k - target - 1, target + 1,
                                               sum);
      ++row;
    }
  }
  return sum;
}

// Elements [begin, end) against soft targets of the same layout.
template <Task kTask, Gamma kGamma, bool kByColumn, typename T>
RNX_HD double soft_elements(const Work<T>& work, int64_t begin, int64_t end) {
  T input_buffer[kBlock];
  T target_buffer[kBlock];
  T positive[kBlock];
  T negative[kBlock];
  T values[kBlock];
  const T gamma = work.gamma;
  double sum = 0;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    const T* x = read_block(work.inputs, work.input_type, start, n, input_buffer);
    const T* t = read_block(work.targets, work.target_type, start, n, target_buffer);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t column = kByColumn ? (start + i) % work.num_classes : 0;
      positive[i] = kByColumn ? work.class_alpha_positive[column] : work.alpha_positive;
      negative[i] = kByColumn ? work.class_alpha_negative[column] : work.alpha_negative;
    }
    for (int64_t i = 0; i < n; ++i) {
      values[i] = kTask == Task::kGradient ? soft_gradient<T, kGamma>(x[i], t[i], gamma, positive[i], negative[i])
                                           : soft_loss<T, kGamma>(x[i], t[i], gamma, positive[i], negative[i]);
    }
    finish_block<kTask>(work, values, start, n, sum);
  }
  return sum;
}

template <Task kTask, Gamma kGamma, bool kByColumn, bool kSoft, typename T>
struct ChunkBody {
  const Work<T>& work;
  int64_t chunk_size;  // rows, or elements of soft targets
  int64_t total;
  double* partial_sums;

  RNX_HD void operator()(int64_t first, int64_t last) const {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * chunk_size;
      const int64_t end = std::min(total, begin + chunk_size);
      const double sum = kSoft ? soft_elements<kTask, kGamma, kByColumn>(work, begin, end)
                               : index_rows<kTask, kGamma, kByColumn>(work, begin, end);
      if (kTask == Task::kSum) partial_sums[chunk] = sum;
    }
  }
};

template <Task kTask, Gamma kGamma, bool kByColumn, bool kSoft, typename T>
double run_chunks(const Work<T>& work) {
  const int64_t total = kSoft ? work.num_rows * work.num_classes : work.num_rows;
  const int64_t chunk_size = kSoft ? kChunkElements : std::max<int64_t>(1, kChunkElements / work.num_classes);
  const int64_t chunks = (total + chunk_size - 1) / chunk_size;
  std::vector<double> partial_sums(kTask == Task::kSum ? chunks : 0);
  const ChunkBody<kTask, kGamma, kByColumn, kSoft, T> body{work, chunk_size, total, partial_sums.data()};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    if constexpr (sizeof(T) == sizeof(float)) {
      run_on_best_isa(body, first, last);
    } else {
      run_baseline(body, first, last);
    }
  });
  double sum = 0;
  for (const double partial : partial_sums) sum += partial;
  return sum;
}

template <Task kTask, typename T>
double run(const Work<T>& work, bool soft) {
  if (work.num_rows == 0) return 0;
  // Smoothing and alpha by class take the general path, where gamma is general too; so there are three of each task.
  const bool by_column = work.class_alpha_negative != nullptr || work.half_smoothing != T(0);
  double sum = 0;
  with_flag(soft, [&](auto is_soft) {
    if (by_column) {
      sum = run_chunks<kTask, Gamma::kAny, true, is_soft.value>(work);
    } else if (work.gamma == T(2)) {
      sum = run_chunks<kTask, Gamma::kTwo, false, is_soft.value>(work);
    } else {
      sum = run_chunks<kTask, Gamma::kAny, false, is_soft.value>(work);
    }
  });
  return sum;
}

// The operator's tensors, in a layout the kernel reads, and what of `Work` follows from them.
template <typename T>
struct Prepared {
  Tensor inputs;
  Tensor targets;
  std::vector<T> class_alpha;  // [2, K]: positive, negative
  Work<T> work;
};

bool share_one_layout(const FocalLossArgs& args, const Tensor& other) {
  return !args.class_alpha.has_value() && share_layout(args.inputs, args.targets) &&
         same_strides(args.inputs, other);
}

template <typename T>
Prepared<T> prepare(const FocalLossArgs& args, bool keep_layout) {
  Prepared<T> prepared;
  const int64_t k = args.num_classes();
  const bool soft = args.soft();
  const bool readable = soft ? keep_layout : row_stride(args.inputs) >= 0;
  prepared.inputs = readable ? args.inputs : torch::stable::contiguous(args.inputs);
  prepared.targets = soft && keep_layout ? args.targets : torch::stable::contiguous(args.targets);
  Work<T>& work = prepared.work;
  work = {};
  work.inputs = prepared.inputs.const_data_ptr();
  work.input_type = prepared.inputs.scalar_type();
  work.row_stride = soft ? k : row_stride(prepared.inputs);
  work.num_rows = args.num_rows();
  work.num_classes = k;
  work.targets = prepared.targets.const_data_ptr();
  work.target_type = prepared.targets.scalar_type();
  work.grad_scale = T(1);
  work.gamma = static_cast<T>(args.gamma);
  work.alpha_positive = args.balanced() && !args.class_alpha ? static_cast<T>(args.alpha) : T(1);
  work.alpha_negative = args.balanced() && !args.class_alpha ? static_cast<T>(1 - args.alpha) : T(1);
  work.half_smoothing = static_cast<T>(args.label_smoothing / 2);
  if (args.class_alpha.has_value()) {
    const T* alpha = static_cast<const T*>(args.class_alpha->const_data_ptr());
    prepared.class_alpha.resize(2 * k);
    for (int64_t i = 0; i < k; ++i) {
      prepared.class_alpha[i] = alpha[i] < T(0) ? T(1) : alpha[i];
      prepared.class_alpha[k + i] = alpha[i] < T(0) ? T(1) : T(1) - alpha[i];
    }
    // Moving `prepared` out leaves the vector's memory where it is.
    work.class_alpha_positive = prepared.class_alpha.data();
    work.class_alpha_negative = prepared.class_alpha.data() + k;
  }
  work.weight = args.weight.has_value() ? static_cast<const T*>(args.weight->const_data_ptr()) : nullptr;
  work.ignore_index = args.ignore_index;
  return prepared;
}

// Elements that count in the mean.
template <typename T>
double count_elements(const Work<T>& work, bool soft) {
  int64_t rows = work.num_rows;
  if (!soft) {
    for (int64_t row = 0; row < work.num_rows; ++row) rows -= row_class(work, row) == work.ignore_index;
  }
  return static_cast<double>(rows) * static_cast<double>(work.num_classes);
}

template <typename T>
Tensor forward(const FocalLossArgs& args, bool float32_loss) {
  const bool soft = args.soft();
  const ScalarType type = args.inputs.scalar_type();
  if (args.reduction == Reduction::kNone) {
    const bool widen = float32_loss && is_half(type);
    const bool keep_layout = soft && !widen && share_one_layout(args, args.inputs);
    Prepared<T> prepared = prepare<T>(args, keep_layout);
    Tensor loss = keep_layout ? torch::stable::empty_like(args.inputs)
                              : torch::stable::new_empty(args.inputs, args.inputs.sizes(),
                                                         widen ? ScalarType::Float : type);
    Work<T>& work = prepared.work;
    work.result = loss.mutable_data_ptr();
    work.result_type = loss.scalar_type();
    run<Task::kLoss>(work, soft);
    return loss;
  }
  Prepared<T> prepared = prepare<T>(args, soft && share_one_layout(args, args.inputs));
  Work<T>& work = prepared.work;
  double value = run<Task::kSum>(work, soft);
  if (args.reduction == Reduction::kMean) value /= count_elements(work, soft);
  Tensor loss = empty_scalar(args.inputs, compute_type(type));
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(value);
  return loss;
}

template <typename T>
Tensor backward(const FocalLossArgs& args, const Tensor& grad) {
  const bool soft = args.soft();
  const bool scalar_grad = args.reduction != Reduction::kNone || (grad.numel() > 0 && is_expanded_scalar(grad));
  const bool keep_layout = soft && share_one_layout(args, scalar_grad ? args.inputs : grad);
  Prepared<T> prepared = prepare<T>(args, keep_layout);
  Work<T>& work = prepared.work;
  Tensor grad_inputs = keep_layout ? torch::stable::empty_like(args.inputs)
                                   : torch::stable::new_empty(args.inputs, args.inputs.sizes());
  if (args.inputs.numel() == 0) return grad_inputs;
  const Tensor upstream = scalar_grad || keep_layout ? grad : torch::stable::contiguous(grad);
  if (scalar_grad) {
    T buffer[1];
    work.grad_scale = *read_block(upstream.const_data_ptr(), upstream.scalar_type(), 0, 1, buffer);
    if (args.reduction == Reduction::kMean) {
      work.grad_scale = static_cast<T>(work.grad_scale / count_elements(work, soft));
    }
  } else {
    work.grad = upstream.const_data_ptr();
    work.grad_type = upstream.scalar_type();
  }
  work.result = grad_inputs.mutable_data_ptr();
  work.result_type = grad_inputs.scalar_type();
  run<Task::kGradient>(work, soft);
  return grad_inputs;
}

Tensor sigmoid_focal_loss_cpu(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& class_alpha, double alpha, double gamma,
                              double label_smoothing, int64_t ignore_index, int64_t reduction, bool float32_loss) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  return inputs.scalar_type() == ScalarType::Double ? forward<double>(args, float32_loss)
                                                    : forward<float>(args, float32_loss);
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad, const Tensor& inputs, const Tensor& targets,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& class_alpha,
                                       double alpha, double gamma, double label_smoothing, int64_t ignore_index,
                                       int64_t reduction) {
  const FocalLossArgs args = make_focal_loss_args(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing,
                                                  ignore_index, reduction);
  check_grad(args, grad);
  return inputs.scalar_type() == ScalarType::Double ? backward<double>(args, grad) : backward<float>(args, grad);
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cpu));
}

}  // namespace
}  // namespace retinanet_ext
