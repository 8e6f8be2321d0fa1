// Focal loss over the levels of a feature pyramid on the CPU: sum, gradient, and both in one pass.
//
// Each image of each level is cut into chunks, by rows (anchors) or by planes (a class of an anchor at every cell); all
// chunks of all levels are one list that the threads share, and their sums are added in order: the same bits for any
// number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/huge_pages.h"
#include "focal_loss/focal_loss_blocks.h"
#include "focal_loss/multilevel_focal_loss_args.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

// A cell whose anchor is not background: its class, or kMultilevelIgnore.
struct SpecialCell {
  int64_t cell;
  int64_t target;
};

// One image of one level.
template <typename T>
struct Job {
  FocalWork<T> work;
  LevelLayout layout;
  int64_t anchors;
  int64_t cells;
  int64_t first_chunk;
  int64_t planes_per_chunk;
  double scale;                               // of the image's losses
  std::vector<std::vector<SpecialCell>> special;  // planes: [A], by cell
};

// The targets of the planes layout are A apart, and each serves K planes: read once, in order, and only what is not
// background is kept.
template <typename T>
void find_special_cells(Job<T>& job) {
  job.special.resize(job.anchors);
  for (int64_t row = 0; row < job.work.num_rows; ++row) {
    const int64_t target = row_class(job.work, row);
    if (target == job.work.ignore_index || (target >= 0 && target < job.work.num_classes)) {
      job.special[row % job.anchors].push_back({row / job.anchors, target});
    }
  }
}

// One plane: class `k` of one anchor at every cell.
template <FocalTask kTask, Gamma kGamma, typename T>
RNX_HD double plane(const Job<T>& job, int64_t anchor, int64_t k) {
  const FocalWork<T>& work = job.work;
  const std::vector<SpecialCell>& special = job.special[anchor];
  const int64_t offset = (anchor * work.num_classes + k) * job.cells;
  T buffer[kFocalBlock];
  FocalBlock<T> block;
  double sum = 0;
  size_t first = 0;
  for (int64_t start = 0; start < job.cells; start += kFocalBlock) {
    const int64_t count = std::min(kFocalBlock, job.cells - start);
    const T* x = read_block(work.inputs, work.input_type, offset + start, count, buffer);
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
  const std::vector<Job<T>>& jobs;
  int64_t rows_per_chunk;
  double* partial_sums;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    // The last job that begins at or before the first chunk.
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t chunk, const Job<T>& other) { return chunk < other.first_chunk; }) -
               1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (job + 1 != jobs.end() && (job + 1)->first_chunk <= chunk) ++job;
      const int64_t index = chunk - job->first_chunk;
      double sum;
      if (job->layout == LevelLayout::kRows) {
        const int64_t first = index * rows_per_chunk;
        sum = index_rows<kTask, kGamma, false>(job->work, first, std::min(job->work.num_rows, first + rows_per_chunk));
      } else {
        const int64_t planes = job->anchors * job->work.num_classes;
        const int64_t begin_plane = index * job->planes_per_chunk;
        sum = 0;
        for (int64_t i = begin_plane; i < std::min(planes, begin_plane + job->planes_per_chunk); ++i) {
          sum += plane<kTask, kGamma>(*job, i / job->work.num_classes, i % job->work.num_classes);
        }
      }
      if (sums(kTask)) partial_sums[chunk] = sum * job->scale;
    }
  }
};

template <FocalTask kTask, Gamma kGamma, typename T>
double run_jobs(const std::vector<Job<T>>& jobs, int64_t chunks, int64_t rows_per_chunk) {
  std::vector<double> partial_sums(sums(kTask) ? chunks : 0);
  const ChunkBody<kTask, kGamma, T> body{jobs, rows_per_chunk, partial_sums.data()};
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

// `gradients`: one tensor a level; empty for kSum. `upstream`: factor of every gradient.
template <FocalTask kTask, typename T>
double run(const MultilevelArgs& args, double upstream, std::vector<Tensor>& gradients) {
  const int64_t k = args.num_classes;
  const int64_t rows_per_chunk = std::max<int64_t>(1, kFocalChunkElements / k);
  const T* normalizer = args.normalizer ? static_cast<const T*>(args.normalizer->const_data_ptr()) : nullptr;
  const size_t target_size = args.targets.scalar_type() == ScalarType::Long ? sizeof(int64_t) : sizeof(int32_t);
  std::vector<Job<T>> jobs;
  int64_t chunks = 0;
  for (size_t l = 0; l < args.levels.size(); ++l) {
    const FocalLevel& level = args.levels[l];
    if (level.rows() == 0) continue;
    const size_t size = level.logits.element_size();
    if (differentiates(kTask)) {
      prefer_huge_pages(gradients[l].mutable_data_ptr(), static_cast<size_t>(gradients[l].numel()) * size);
    }
    for (int64_t image = 0; image < args.batch; ++image) {
      Job<T> job{};
      job.layout = level.layout;
      job.anchors = level.anchors;
      job.cells = level.cells;
      job.first_chunk = chunks;
      job.scale = args.scale;
      if (normalizer != nullptr) job.scale /= normalizer[args.normalizer->numel() == 1 ? 0 : image];
      FocalWork<T>& work = job.work;
      work.inputs = static_cast<const char*>(level.logits.const_data_ptr()) + image * level.image_stride * size;
      work.input_type = args.type;
      work.row_stride = k;
      work.num_rows = level.rows();
      work.num_classes = k;
      work.targets = static_cast<const char*>(args.targets.const_data_ptr()) +
                     (image * args.num_anchors + level.first_anchor) * target_size;
      work.target_type = args.targets.scalar_type();
      if (differentiates(kTask)) {
        work.result = static_cast<char*>(gradients[l].mutable_data_ptr()) + image * level.rows() * k * size;
        work.result_type = args.type;
      }
      work.grad_scale = static_cast<T>(upstream * job.scale);
      work.gamma = static_cast<T>(args.gamma);
      work.alpha_positive = static_cast<T>(args.alpha_positive());
      work.alpha_negative = static_cast<T>(args.alpha_negative());
      work.ignore_index = kMultilevelIgnore;
      job.planes_per_chunk = std::max<int64_t>(1, kFocalChunkElements / level.cells);
      chunks += level.layout == LevelLayout::kRows
                    ? (level.rows() + rows_per_chunk - 1) / rows_per_chunk
                    : (level.anchors * k + job.planes_per_chunk - 1) / job.planes_per_chunk;
      jobs.push_back(std::move(job));
    }
  }
  if (chunks == 0) return 0;
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (jobs[i].layout == LevelLayout::kPlanes) find_special_cells(jobs[i]);
    }
  });
  return args.gamma == 2 ? run_jobs<kTask, Gamma::kTwo>(jobs, chunks, rows_per_chunk)
                         : run_jobs<kTask, Gamma::kAny>(jobs, chunks, rows_per_chunk);
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
  check_multilevel_grad(args, grad);
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
