// Box regression loss on the CPU: sum and gradient over foreground anchors.
//
// Each image's matches are cut into chunks that the threads share. A chunk is scanned by blocks, of which most hold no
// foreground and cost the reading of their matches alone; the sums of an image's chunks are added in order: the same
// bits for any number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "box_loss/box_loss_args.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kScanBlock = 64;  // matches looked at together
constexpr int64_t kChunkAnchors = 1 << 13;
constexpr int64_t kChunkBytes = 1 << 20;  // of a gradient that is zeroed
constexpr int64_t kChunksPerThread = 4;   // at least: less does not pay for waking a thread
constexpr int64_t kNone = -1;

template <typename T>
struct GtBoxes {
  const T* boxes;  // [count, 4]
  int64_t count;
};

// T is the compute type, In that of the deltas.
template <typename In>
struct Work {
  using T = compute_t<In>;
  const BoxLossArgs& args;
  BoxLossOptions<T> options;
  std::vector<GtBoxes<T>> gt;   // of each image
  std::vector<double> factors;  // of each image's loss
  std::vector<In*> gradients;   // of each level; empty for the sum
  double upstream;              // factor of every gradient

  int64_t chunks_per_image() const {
    return (args.num_anchors + kChunkAnchors - 1) / kChunkAnchors;
  }
};

template <typename T>
std::vector<GtBoxes<T>> find_gt_boxes(const BoxLossArgs& args) {
  std::vector<GtBoxes<T>> found;
  if (!args.gt_offsets.has_value()) {
    for (const Tensor& boxes : args.gt_boxes) {
      found.push_back({static_cast<const T*>(boxes.const_data_ptr()), boxes.size(0)});
    }
    return found;
  }
  const T* boxes = static_cast<const T*>(args.gt_boxes[0].const_data_ptr());
  const int32_t* offsets = static_cast<const int32_t*>(args.gt_offsets->const_data_ptr());
  const int64_t capacity = args.gt_boxes[0].size(0);
  for (int64_t b = 0; b < args.batch; ++b) {
    require(0 <= offsets[b] && offsets[b] <= offsets[b + 1] && offsets[b + 1] <= capacity, kBoxLossOp,
            ": gt_offsets must not fall, and lie in [0, ", capacity, "], the rows of gt_boxes; image ", b, " has [",
            offsets[b], ", ", offsets[b + 1], "]");
    found.push_back({boxes + 4 * static_cast<int64_t>(offsets[b]), offsets[b + 1] - offsets[b]});
  }
  return found;
}

template <typename T>
std::vector<double> image_factors(const BoxLossArgs& args) {
  std::vector<double> factors(args.batch, args.scale);
  if (args.normalizer.has_value()) {
    const T* normalizer = static_cast<const T*>(args.normalizer->const_data_ptr());
    for (int64_t b = 0; b < args.batch; ++b) factors[b] /= normalizer[args.normalizer->numel() == 1 ? 0 : b];
  }
  return factors;
}

template <typename T>
Box<T> read_box(const T* boxes, int64_t row) {
  const T* box = boxes + 4 * row;
  return {box[0], box[1], box[2], box[3]};
}

// One foreground anchor, `row` of its level: its loss, or its gradient written.
template <bool kGradient, typename In>
double foreground_anchor(const Work<In>& work, size_t level_index, int64_t image, int64_t row, int64_t gt_row) {
  using T = compute_t<In>;
  const BoxLossArgs& args = work.args;
  const DeltaLevel& level = args.levels[level_index];
  const int64_t cell = row / level.anchors;
  const int64_t channel = 4 * (row % level.anchors);
  const In* source = static_cast<const In*>(level.deltas.const_data_ptr()) + image * level.image_stride +
                     channel * level.channel_stride + cell / level.width * level.row_stride +
                     cell % level.width * level.column_stride;
  const int64_t step = level.channel_stride;
  const Deltas<T> deltas = {load_value(source[0]), load_value(source[step]), load_value(source[2 * step]),
                            load_value(source[3 * step])};
  const Box<T> anchor =
      read_box(static_cast<const T*>(args.anchors.const_data_ptr()) + image * args.anchor_image_stride(),
               level.first_anchor + row);
  const Box<T> gt = read_box(work.gt[image].boxes, gt_row);
  if (!kGradient) return box_loss(deltas, anchor, gt, work.options);
  const T upstream = static_cast<T>(work.upstream * work.factors[image]);
  const Deltas<T> gradient = box_loss_gradient(deltas, anchor, gt, work.options, upstream);
  const int64_t cell_stride = level.planes() ? 1 : 4 * level.anchors;
  const int64_t channel_stride = level.planes() ? level.cells() : 1;
  In* target = work.gradients[level_index] + image * 4 * level.rows() + cell * cell_stride + channel * channel_stride;
  store_value(gradient.dx, target[0]);
  store_value(gradient.dy, target[channel_stride]);
  store_value(gradient.dw, target[2 * channel_stride]);
  store_value(gradient.dh, target[3 * channel_stride]);
  return 0;
}

// Whether one of the matches is not negative: whether the sign bit is not set in all.
template <typename Index>
bool any_foreground(const Index* matched, int64_t count) {
  Index all = -1;
  for (int64_t i = 0; i < count; ++i) all &= matched[i];
  return all >= 0;
}

// Anchors [first, last) of an image. `wrong` becomes the first whose match is no row of the image's boxes.
template <bool kGradient, typename Index, typename In>
double scan(const Work<In>& work, int64_t image, int64_t first, int64_t last, int64_t& wrong) {
  const std::vector<DeltaLevel>& levels = work.args.levels;
  const Index* matched =
      static_cast<const Index*>(work.args.matched.const_data_ptr()) + image * work.args.num_anchors;
  double sum = 0;
  size_t level = 0;
  for (int64_t start = first; start < last; start += kScanBlock) {
    const int64_t end = std::min(last, start + kScanBlock);
    if (!any_foreground(matched + start, end - start)) continue;
    for (int64_t i = start; i < end; ++i) {
      if (matched[i] < 0) continue;
      if (matched[i] >= work.gt[image].count) {
        if (wrong == kNone) wrong = i;
        continue;
      }
      while (level + 1 < levels.size() && levels[level + 1].first_anchor <= i) ++level;
      sum += foreground_anchor<kGradient>(work, level, image, i - levels[level].first_anchor, matched[i]);
    }
  }
  return sum;
}

// Every image's loss before its factor (nothing for gradients); an error where a match is no row of the boxes.
template <bool kGradient, typename In>
std::vector<double> scan_all(const Work<In>& work) {
  const BoxLossArgs& args = work.args;
  const int64_t per_image = work.chunks_per_image();
  const int64_t chunks = per_image * args.batch;
  std::vector<double> sums(chunks);
  std::vector<int64_t> wrong(chunks, kNone);
  const bool wide = args.matched.scalar_type() == ScalarType::Long;
  parallel_for(0, chunks, kChunksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t image = chunk / per_image;
      const int64_t first = chunk % per_image * kChunkAnchors;
      const int64_t last = std::min(args.num_anchors, first + kChunkAnchors);
      sums[chunk] = wide ? scan<kGradient, int64_t>(work, image, first, last, wrong[chunk])
                         : scan<kGradient, int32_t>(work, image, first, last, wrong[chunk]);
    }
  });
  std::vector<double> image_sums(args.batch);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t image = chunk / per_image;
    require(wrong[chunk] == kNone, kBoxLossOp, ": matched names a row that gt_boxes lack: anchor ", wrong[chunk],
            " of image ", image, ", which has ", work.gt[image].count, " boxes");
    image_sums[image] += sums[chunk];
  }
  return image_sums;
}

void fill_with_zeros(void* data, int64_t bytes) {
  prefer_huge_pages(data, static_cast<size_t>(bytes));
  const int64_t chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
  parallel_for(0, chunks, kChunksPerThread, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunkBytes;
    std::memset(static_cast<char*>(data) + first, 0, std::min(bytes, end * kChunkBytes) - first);
  });
}

template <typename In>
Work<In> describe(const BoxLossArgs& args) {
  using T = compute_t<In>;
  return {args, args.options<T>(), find_gt_boxes<T>(args), image_factors<T>(args), {}, 1};
}

Tensor box_regression_loss_cpu(const std::vector<Tensor>& deltas, const Tensor& anchors,
                               const std::vector<Tensor>& gt_boxes, const std::optional<Tensor>& gt_offsets,
                               const Tensor& matched, const std::optional<Tensor>& normalizer, int64_t loss,
                               double beta, double wx, double wy, double ww, double wh, double scale) {
  const BoxLossArgs args = make_box_loss_args(deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, loss, beta,
                                              wx, wy, ww, wh, scale);
  Tensor result = torch::stable::new_empty(matched, {}, compute_type(args.type));
  with_delta_type(args.type, [&](auto storage) {
    using In = decltype(storage);
    const Work<In> work = describe<In>(args);
    const std::vector<double> image_sums = scan_all<false>(work);
    double total = 0;
    for (int64_t b = 0; b < args.batch; ++b) total += image_sums[b] * work.factors[b];
    *static_cast<compute_t<In>*>(result.mutable_data_ptr()) = static_cast<compute_t<In>>(total);
  });
  return result;
}

std::vector<Tensor> box_regression_loss_backward_cpu(const Tensor& grad, const std::vector<Tensor>& deltas,
                                                     const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
                                                     const std::optional<Tensor>& gt_offsets, const Tensor& matched,
                                                     const std::optional<Tensor>& normalizer, int64_t loss, double beta,
                                                     double wx, double wy, double ww, double wh, double scale) {
  const BoxLossArgs args = make_box_loss_args(deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, loss, beta,
                                              wx, wy, ww, wh, scale);
  check_box_loss_grad(args, grad);
  std::vector<Tensor> gradients = empty_delta_gradients(args);
  with_delta_type(args.type, [&](auto storage) {
    using In = decltype(storage);
    Work<In> work = describe<In>(args);
    work.upstream = static_cast<double>(*static_cast<const compute_t<In>*>(grad.const_data_ptr()));
    for (Tensor& gradient : gradients) {
      fill_with_zeros(gradient.mutable_data_ptr(), gradient.numel() * static_cast<int64_t>(sizeof(In)));
      work.gradients.push_back(static_cast<In*>(gradient.mutable_data_ptr()));
    }
    scan_all<true>(work);
  });
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("box_regression_loss", TORCH_BOX(&box_regression_loss_cpu));
  m.impl("box_regression_loss_backward", TORCH_BOX(&box_regression_loss_backward_cpu));
}

}  // namespace
}  // namespace retinanet_ext
