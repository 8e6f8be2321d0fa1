// Focal loss over the levels of a feature pyramid on the CPU: sum, gradient, and both in one pass.
//
// Each image of each level is cut into chunks, by rows (anchors) or by planes (a class of an anchor at every cell); all
// chunks of all levels are one list that the threads share, and their sums are added in order: the same bits for any
// number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "focal_loss/focal_loss_blocks.h"
#include "focal_loss/multilevel_focal_loss_args.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

// A cell whose anchor is foreground, or ignored: its class, or kMultilevelIgnore.
struct SpecialCell {
  int64_t cell;
  int64_t target;
};

// One image of one level.
template <typename T>
struct LevelImage {
  FocalWork<T> work;
  int64_t image;
  LevelLayout layout;
  int64_t anchors;
  int64_t cells;
  int64_t units_per_chunk;  // rows, or planes
  int64_t first_chunk;
  std::vector<std::vector<SpecialCell>> special;  // planes: [A], each in order

  int64_t units() const {
    return layout == LevelLayout::kRows ? work.num_rows : anchors * work.num_classes;
  }
  int64_t chunks() const {
    return (units() + units_per_chunk - 1) / units_per_chunk;
  }
};

// The targets of the planes layout are A apart, and each serves K planes: read once, in order, and only what is not
// background is kept.
template <typename T>
void find_special_cells(LevelImage<T>& part) {
  part.special.resize(part.anchors);
  for (int64_t row = 0; row < part.work.num_rows; ++row) {
    const int64_t target = row_class(part.work, row);
    if (target == part.work.ignore_index || (target >= 0 && target < part.work.num_classes)) {
      part.special[row % part.anchors].push_back({row / part.anchors, target});
    }
  }
}

// One plane: class `k` of one anchor at every cell.
template <FocalTask kTask, Gamma kGamma, typename T>
RNX_HD double plane(const LevelImage<T>& part, int64_t anchor, int64_t k) {
  const FocalWork<T>& work = part.work;
  const std::vector<SpecialCell>& special = part.special[anchor];
  const int64_t offset = (anchor * work.num_classes + k) * part.cells;
  T buffer[kFocalBlock];
  FocalBlock<T> block;
  double sum = 0;
  size_t first = 0;
  for (int64_t start = 0; start < part.cells; start += kFocalBlock) {
    const int64_t count = std::min(kFocalBlock, part.cells - start);
    const T* x = read_whole_vectors(work.inputs, work.input_type, offset + start, count, buffer);
    evaluate_background<kTask, kGamma, false>(work, x, count, 0, block);
    size_t last = first;
    for (; last < special.size() && special[last].cell < start + count; ++last) {
      if (special[last].target != k && special[last].target != work.ignore_index) continue;
      const int64_t i = special[last].cell - start;
      block.losses[i] = T(0);
      block.gradients[i] = T(0);
    }
    finish_block<kTask>(work, block, offset + start, count, work.alpha_negative, sum);
    for (; first < last; ++first) {
      if (special[first].target != k) continue;
      const int64_t i = offset + special[first].cell;
      positive_element<kTask, kGamma, false>(work, i, i, k, sum);
    }
  }
  return sum;
}

template <FocalTask kTask, Gamma kGamma, typename T>
struct ChunkBody {
  const std::vector<LevelImage<T>>& parts;
  double* chunk_sums;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    // The last part that begins at or before the first chunk.
    auto part = std::upper_bound(parts.begin(), parts.end(), begin, [](int64_t chunk, const LevelImage<T>& other) {
      return chunk < other.first_chunk;
    }) - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (part + 1 != parts.end() && (part + 1)->first_chunk <= chunk) ++part;
      const int64_t first = (chunk - part->first_chunk) * part->units_per_chunk;
      const int64_t last = std::min(part->units(), first + part->units_per_chunk);
      double sum = 0;
      if (part->layout == LevelLayout::kRows) {
        sum = index_rows<kTask, kGamma, false>(part->work, first, last);
      } else {
        const int64_t k = part->work.num_classes;
        for (int64_t i = first; i < last; ++i) sum += plane<kTask, kGamma>(*part, i / k, i % k);
      }
      if (sums(kTask)) chunk_sums[chunk] = sum;
    }
  }
};

// Evaluates every part; `image_sums` [B] are added to.
template <FocalTask kTask, Gamma kGamma, typename T>
void run_parts(const std::vector<LevelImage<T>>& parts, std::vector<double>& image_sums) {
  const int64_t chunks = parts.back().first_chunk + parts.back().chunks();
  std::vector<double> chunk_sums(sums(kTask) ? chunks : 0);
  const ChunkBody<kTask, kGamma, T> body{parts, chunk_sums.data()};
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    if constexpr (sizeof(T) == sizeof(float)) {
      run_on_best_isa(body, first, last);
    } else {
      run_baseline(body, first, last);
    }
    if (parts.front().work.streams) stream_fence();
  });
  if (!sums(kTask)) return;
  for (const LevelImage<T>& part : parts) {
    for (int64_t i = 0; i < part.chunks(); ++i) image_sums[part.image] += chunk_sums[part.first_chunk + i];
  }
}

// What each image's loss is multiplied by.
template <typename T>
std::vector<double> image_scales(const MultilevelArgs& args) {
  std::vector<double> scales(args.batch, args.scale);
  if (args.normalizer.has_value()) {
    const T* normalizer = static_cast<const T*>(args.normalizer->const_data_ptr());
    for (int64_t b = 0; b < args.batch; ++b) scales[b] /= normalizer[args.normalizer->numel() == 1 ? 0 : b];
  }
  return scales;
}

template <typename T>
LevelImage<T> describe(const MultilevelArgs& args, const LogitLevel& level, int64_t image, Tensor* gradient,
                       size_t gradient_bytes, double grad_scale) {
  const int64_t k = args.num_classes;
  const int64_t size = level.logits.element_size();
  const int64_t target_size = args.targets.element_size();
  LevelImage<T> part{};
  part.image = image;
  part.layout = level.layout;
  part.anchors = level.anchors;
  part.cells = level.cells;
  part.units_per_chunk =
      std::max<int64_t>(1, kFocalChunkElements / (level.layout == LevelLayout::kRows ? k : level.cells));
  FocalWork<T>& work = part.work;
  work.inputs = static_cast<const char*>(level.logits.const_data_ptr()) + image * level.image_stride * size;
  work.input_type = args.type;
  work.row_stride = k;
  work.num_rows = level.rows();
  work.num_classes = k;
  work.targets = static_cast<const char*>(args.targets.const_data_ptr()) +
                 (image * args.num_anchors + level.first_anchor) * target_size;
  work.target_type = args.targets.scalar_type();
  if (gradient != nullptr) {
    set_result(work, static_cast<char*>(gradient->mutable_data_ptr()) + image * level.rows() * k * size, args.type,
               gradient_bytes);
  }
  work.grad_scale = static_cast<T>(grad_scale);
  work.gamma = finite_cast<T>(args.gamma);
  work.alpha_positive = static_cast<T>(args.alpha_positive());
  work.alpha_negative = static_cast<T>(args.alpha_negative());
  work.ignore_index = kMultilevelIgnore;
  if (part.layout == LevelLayout::kPlanes) find_special_cells(part);
  return part;
}

// `gradients`: one tensor a level; empty for kSum. `upstream`: factor of every gradient. Returns the loss.
template <FocalTask kTask, typename T>
double run(const MultilevelArgs& args, double upstream, std::vector<Tensor>& gradients) {
  const std::vector<double> scales = image_scales<T>(args);
  size_t gradient_bytes = 0;
  for (const Tensor& gradient : gradients) {
    gradient_bytes += static_cast<size_t>(gradient.numel()) * gradient.element_size();
  }
  std::vector<LevelImage<T>> parts;
  for (size_t l = 0; l < args.levels.size(); ++l) {
    const LogitLevel& level = args.levels[l];
    if (level.rows() == 0) continue;
    Tensor* gradient = differentiates(kTask) ? &gradients[l] : nullptr;
    if (gradient != nullptr) {
      prefer_huge_pages(gradient->mutable_data_ptr(), static_cast<size_t>(gradient->numel()) * gradient->element_size());
    }
    for (int64_t image = 0; image < args.batch; ++image) {
      parts.push_back(describe<T>(args, level, image, gradient, gradient_bytes, upstream * scales[image]));
      const LevelImage<T>* before = parts.size() > 1 ? &parts[parts.size() - 2] : nullptr;
      parts.back().first_chunk = before != nullptr ? before->first_chunk + before->chunks() : 0;
    }
  }
  if (parts.empty()) return 0;
  std::vector<double> image_sums(args.batch);
  if (args.gamma == 2) {
    run_parts<kTask, Gamma::kTwo>(parts, image_sums);
  } else {
    run_parts<kTask, Gamma::kAny>(parts, image_sums);
  }
  double loss = 0;
  for (int64_t b = 0; b < args.batch; ++b) loss += image_sums[b] * scales[b];
  return loss;
}

template <FocalTask kTask>
double run(const MultilevelArgs& args, double upstream, std::vector<Tensor>& gradients) {
  return args.type == ScalarType::Double ? run<kTask, double>(args, upstream, gradients)
                                         : run<kTask, float>(args, upstream, gradients);
}

Tensor loss_tensor(const MultilevelArgs& args, double value) {
  Tensor loss = empty_scalar(args.targets, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(value);
  return loss;
}

Tensor multilevel_focal_loss_cpu(const std::vector<Tensor>& logits, const Tensor& targets,
                                 const std::optional<Tensor>& normalizer, int64_t num_classes, double alpha,
                                 double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  std::vector<Tensor> none;
  return loss_tensor(args, run<FocalTask::kSum>(args, 1, none));
}

std::vector<Tensor> multilevel_focal_loss_backward_cpu(const Tensor& grad, const std::vector<Tensor>& logits,
                                                       const Tensor& targets, const std::optional<Tensor>& normalizer,
                                                       int64_t num_classes, double alpha, double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  check_multilevel_grad(args, grad, "multilevel_focal_loss_backward");
  std::vector<Tensor> gradients = empty_gradients(logits, args);
  run<FocalTask::kGradient>(args, read_scalar<float>(grad), gradients);
  return gradients;
}

std::tuple<Tensor, std::vector<Tensor>> multilevel_focal_loss_with_grad_cpu(const std::vector<Tensor>& logits,
                                                                            const Tensor& targets,
                                                                            const std::optional<Tensor>& normalizer,
                                                                            int64_t num_classes, double alpha,
                                                                            double gamma, double scale) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  std::vector<Tensor> gradients = empty_gradients(logits, args);
  const double sum = run<FocalTask::kSumAndGradient>(args, 1, gradients);
  return {loss_tensor(args, sum), gradients};
}

void multilevel_focal_loss_refresh_grad_cpu(std::vector<Tensor> grad_logits, Tensor was_one, const Tensor& grad,
                                            const std::vector<Tensor>& logits, const Tensor& targets,
                                            const std::optional<Tensor>& normalizer, int64_t num_classes, double alpha,
                                            double gamma, double scale, bool filled) {
  const MultilevelArgs args = make_multilevel_args(logits, targets, normalizer, num_classes, alpha, gamma, scale);
  check_multilevel_refresh(args, grad, logits, grad_logits, was_one);
  const float upstream = read_scalar<float>(grad);
  *static_cast<int32_t*>(was_one.mutable_data_ptr()) = upstream == 1;
  if (filled && upstream == 1) return;
  run<FocalTask::kGradient>(args, upstream, grad_logits);
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("multilevel_focal_loss", TORCH_BOX(&multilevel_focal_loss_cpu));
  m.impl("multilevel_focal_loss_backward", TORCH_BOX(&multilevel_focal_loss_backward_cpu));
  m.impl("multilevel_focal_loss_with_grad", TORCH_BOX(&multilevel_focal_loss_with_grad_cpu));
  m.impl("multilevel_focal_loss_refresh_grad", TORCH_BOX(&multilevel_focal_loss_refresh_grad_cpu));
}

}  // namespace
}  // namespace retinanet_ext
