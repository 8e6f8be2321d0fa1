// Post-processing on the CPU: one pass over the logits, which keeps the best of each level, then image by image.
//
// The pass compares logits, not scores, with the smallest logit whose score is above the threshold; once as many as are
// wanted of a level are found, with the last of these. What a thread holds of a level is at most twice as many as are
// wanted. Which thread found what does not show: candidates have a strict order, by logit and then by index.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>

#include "common/cpu_dispatch.h"
#include "common/half_convert.h"
#include "common/parallel.h"
#include "nms/nms_walk.h"
#include "postprocess/detect_args.h"
#include "postprocess/detect_math.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 256;             // logits that are compared together
constexpr int64_t kChunkLogits = 1 << 16;   // what a thread takes at a time, about
constexpr int64_t kFewestBeforeCut = 1024;  // candidates are not thinned out below this

template <typename T>
struct Candidate {
  decltype(descending_key(T())) key;
  int64_t index;  // anchor * K + class: of the level, later of the image
  T logit;

  bool operator<(const Candidate& other) const {
    return key != other.key ? key < other.key : index < other.index;
  }
};

// The best `most` candidates of those added.
template <typename T>
class BestCandidates {
 public:
  BestCandidates(int64_t most, T smallest_logit) : most_(most), cut_(smallest_logit) {}

  // No logit below this can be among the best.
  T cut() const {
    return cut_;
  }

  void add(T logit, int64_t index) {
    found_.push_back({descending_key(logit), index, logit});
    if (static_cast<int64_t>(found_.size()) >= std::max(2 * most_, kFewestBeforeCut)) thin_out();
  }

  void thin_out() {
    if (static_cast<int64_t>(found_.size()) <= most_) return;
    std::nth_element(found_.begin(), found_.begin() + (most_ - 1), found_.end());
    found_.resize(static_cast<size_t>(most_));
    cut_ = found_.back().logit;
  }

  std::vector<Candidate<T>>& found() {
    return found_;
  }

 private:
  int64_t most_;
  T cut_;
  std::vector<Candidate<T>> found_;
};

// The logits of one image of one level: `lines` of `length` that lie one behind the other.
struct LogitBlock {
  const char* logits;
  ScalarType type;
  LevelLayout layout;
  int64_t anchors;
  int64_t classes;
  int64_t lines;  // rows (anchors), or planes (a class of an anchor)
  int64_t length;
  int64_t lines_per_chunk;
  int64_t first_chunk;

  int64_t chunks() const {
    return (lines + lines_per_chunk - 1) / lines_per_chunk;
  }
  // anchor * K + class, from where a logit lies.
  RNX_HD int64_t index_of(int64_t line, int64_t i) const {
    if (layout == LevelLayout::kRows) return line * length + i;
    const int64_t anchor = line / classes;
    return (i * anchors + anchor) * classes + line % classes;
  }
};

// `count` logits from `offset` on, in the compute type.
template <typename T>
RNX_HD const T* read_logits(const LogitBlock& block, int64_t offset, int64_t count, T* buffer) {
  if (block.type == ScalarType::Half) {
    const Float16* source = reinterpret_cast<const Float16*>(block.logits) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(to_float(source[i]));
    return buffer;
  }
  if (block.type == ScalarType::BFloat16) {
    const BFloat16* source = reinterpret_cast<const BFloat16*>(block.logits) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(to_float(source[i]));
    return buffer;
  }
  return reinterpret_cast<const T*>(block.logits) + offset;
}

// A NaN reaches nothing.
template <typename T>
RNX_HD bool any_reaches(const T* logits, int64_t count, T cut) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= logits[i] >= cut;
  return found != 0;
}

// Adds the candidates of some lines. Lines that lie one behind the other are read as one.
template <typename T>
RNX_HD void filter_lines(const LogitBlock& block, int64_t first, int64_t last, BestCandidates<T>& best) {
  T buffer[kBlock];
  const int64_t end = last * block.length;
  for (int64_t offset = first * block.length; offset < end; offset += kBlock) {
    const int64_t count = std::min(kBlock, end - offset);
    const T* logits = read_logits(block, offset, count, buffer);
    const T cut = best.cut();
    // The length of a whole block is known to the compiler.
    const bool found = count == kBlock ? any_reaches(logits, kBlock, cut) : any_reaches(logits, count, cut);
    if (!found) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (!(logits[i] >= best.cut())) continue;
      best.add(logits[i], block.index_of((offset + i) / block.length, (offset + i) % block.length));
    }
  }
}

// What was found of each level of each image; threads add to it.
template <typename T>
struct Found {
  std::mutex guard;
  std::vector<std::vector<Candidate<T>>> of_block;
};

template <typename T>
struct FilterBody {
  const std::vector<LogitBlock>& blocks;
  int64_t topk;
  T smallest_logit;
  Found<T>& found;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    size_t at = 0;
    while (begin < end) {
      while (at + 1 < blocks.size() && blocks[at + 1].first_chunk <= begin) ++at;
      const LogitBlock& block = blocks[at];
      const int64_t last_chunk = std::min(end, block.first_chunk + block.chunks());
      const int64_t first = (begin - block.first_chunk) * block.lines_per_chunk;
      const int64_t last = std::min(block.lines, (last_chunk - block.first_chunk) * block.lines_per_chunk);
      BestCandidates<T> best(topk, smallest_logit);
      filter_lines(block, first, last, best);
      best.thin_out();
      append(at, best.found());
      begin = last_chunk;
    }
  }

  void append(size_t block, const std::vector<Candidate<T>>& more) const {
    const std::lock_guard<std::mutex> lock(found.guard);
    std::vector<Candidate<T>>& all = found.of_block[block];
    all.insert(all.end(), more.begin(), more.end());
  }
};

std::vector<LogitBlock> list_blocks(const DetectArgs& args) {
  std::vector<LogitBlock> blocks;
  for (int64_t image = 0; image < args.batch; ++image) {
    for (const LogitLevel& level : args.logits) {
      const bool rows = level.layout == LevelLayout::kRows;
      LogitBlock block{};
      block.logits = static_cast<const char*>(level.logits.const_data_ptr()) +
                     image * level.image_stride * level.logits.element_size();
      block.type = args.logit_type;
      block.layout = level.layout;
      block.anchors = level.anchors;
      block.classes = args.num_classes;
      block.lines = rows ? level.rows() : level.anchors * args.num_classes;
      block.length = rows ? args.num_classes : level.cells;
      block.lines_per_chunk = std::max<int64_t>(1, kChunkLogits / std::max<int64_t>(block.length, 1));
      block.first_chunk = blocks.empty() ? 0 : blocks.back().first_chunk + blocks.back().chunks();
      if (level.rows() == 0) block.lines = 0;
      blocks.push_back(block);
    }
  }
  return blocks;
}

double load_number(const Tensor& tensor, int64_t offset) {
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return static_cast<const double*>(data)[offset];
    case ScalarType::Float:
      return static_cast<const float*>(data)[offset];
    case ScalarType::Half:
      return to_float(static_cast<const Float16*>(data)[offset]);
    default:
      return to_float(static_cast<const BFloat16*>(data)[offset]);
  }
}

// The box of one anchor of an image, as its deltas say.
template <typename T>
Box<T> decode_anchor(const DetectArgs& args, int64_t image, int64_t anchor) {
  size_t index = 0;
  while (index + 1 < args.deltas.size() && args.deltas[index + 1].first_anchor <= anchor) ++index;
  const DeltaLevel& level = args.deltas[index];
  const int64_t row = anchor - level.first_anchor;
  const int64_t cell = row / level.anchors;
  const int64_t offset = image * level.image_stride + 4 * (row % level.anchors) * level.channel_stride +
                         cell / level.width * level.row_stride + cell % level.width * level.column_stride;
  T deltas[4];
  for (int i = 0; i < 4; ++i) deltas[i] = static_cast<T>(load_number(level.deltas, offset + i * level.channel_stride));
  const int64_t set = args.anchors.dim() == 3 ? image * args.num_anchors : 0;
  const T* box = static_cast<const T*>(args.anchors.const_data_ptr()) + (set + anchor) * 4;
  return decode_box<T>({deltas[0], deltas[1], deltas[2], deltas[3]}, {box[0], box[1], box[2], box[3]},
                       {T(1), T(1), T(1), T(1)}, static_cast<T>(kDeltaClip));
}

template <typename T>
Box<T> clip_to_image(const DetectArgs& args, int64_t image, const Box<T>& box) {
  T size[2];
  for (int i = 0; i < 2; ++i) {
    size[i] = args.image_sizes.has_value()
                  ? static_cast<const T*>(args.image_sizes->const_data_ptr())[2 * image + i]
                  : static_cast<T>(args.size_list[2 * image + i]);
  }
  return clip_box(box, size[0], size[1]);
}

// Where one image's results go.
template <typename L, typename T>
struct Outputs {
  T* boxes;
  L* scores;
  int64_t* labels;
  int64_t* indices;
  int32_t* count;
};

// L: of logits and scores; T: of boxes.
template <typename L, typename T>
void finish_image(const DetectArgs& args, int64_t image, Found<L>& found, const Outputs<L, T>& out) {
  std::vector<Candidate<L>> candidates;
  for (size_t level = 0; level < args.logits.size(); ++level) {
    std::vector<Candidate<L>>& more = found.of_block[image * args.logits.size() + level];
    if (static_cast<int64_t>(more.size()) > args.topk_per_level) {
      std::nth_element(more.begin(), more.begin() + args.topk_per_level, more.end());
      more.resize(static_cast<size_t>(args.topk_per_level));
    }
    for (Candidate<L> candidate : more) {
      candidate.index += args.logits[level].first_anchor * args.num_classes;
      candidates.push_back(candidate);
    }
  }
  std::sort(candidates.begin(), candidates.end());
  std::vector<Box<T>> boxes(candidates.size());
  std::vector<int64_t> labels(candidates.size());
  for (size_t i = 0; i < candidates.size(); ++i) {
    boxes[i] = decode_anchor<T>(args, image, candidates[i].index / args.num_classes);
    if (args.clip_before_nms) boxes[i] = clip_to_image(args, image, boxes[i]);
    labels[i] = candidates[i].index % args.num_classes;
  }
  std::vector<int32_t> kept;
  run_on_best_isa(GreedyWalk<T, int64_t>{boxes.data(), labels.data(), threshold_below<T>(args.nms_thresh),
                                         args.max_detections, kept},
                  0, static_cast<int64_t>(candidates.size()));
  for (size_t i = 0; i < kept.size(); ++i) {
    const Candidate<L>& candidate = candidates[kept[i]];
    const Box<T> box = args.clip_before_nms ? boxes[kept[i]] : clip_to_image(args, image, boxes[kept[i]]);
    const T coordinates[4] = {box.x1, box.y1, box.x2, box.y2};
    std::copy(coordinates, coordinates + 4, out.boxes + 4 * i);
    out.scores[i] = score_of(candidate.logit);
    out.labels[i] = labels[kept[i]];
    out.indices[i] = candidate.index;
  }
  std::fill(out.boxes + 4 * kept.size(), out.boxes + 4 * args.max_detections, T(0));
  std::fill(out.scores + kept.size(), out.scores + args.max_detections, L(0));
  std::fill(out.labels + kept.size(), out.labels + args.max_detections, int64_t{-1});
  std::fill(out.indices + kept.size(), out.indices + args.max_detections, int64_t{-1});
  *out.count = static_cast<int32_t>(kept.size());
}

template <typename L, typename T>
DetectResult run(const DetectArgs& args) {
  DetectResult result = empty_detections(args);
  const std::vector<LogitBlock> blocks = list_blocks(args);
  Found<L> found;
  found.of_block.resize(blocks.size());
  const int64_t chunks = blocks.empty() ? 0 : blocks.back().first_chunk + blocks.back().chunks();
  const FilterBody<L> body{blocks, args.topk_per_level, smallest_logit_above<L>(args.score_thresh), found};
  if (args.topk_per_level > 0) {
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { run_on_best_isa(body, begin, end); });
  }
  const int64_t d = args.max_detections;
  T* boxes = static_cast<T*>(std::get<0>(result).mutable_data_ptr());
  L* scores = static_cast<L*>(std::get<1>(result).mutable_data_ptr());
  int64_t* labels = static_cast<int64_t*>(std::get<2>(result).mutable_data_ptr());
  int64_t* indices = static_cast<int64_t*>(std::get<3>(result).mutable_data_ptr());
  int32_t* counts = static_cast<int32_t*>(std::get<4>(result).mutable_data_ptr());
  parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      finish_image<L, T>(args, image, found,
                         {boxes + 4 * d * image, scores + d * image, labels + d * image, indices + d * image,
                          counts + image});
    }
  });
  return result;
}

DetectResult detect_cpu(const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
                        const Tensor& anchors, const std::optional<Tensor>& image_sizes,
                        const std::vector<double>& size_list, int64_t num_classes, double score_thresh,
                        int64_t topk_per_level, double nms_thresh, int64_t max_detections, bool clip_before_nms) {
  const DetectArgs args =
      make_detect_args(cls_logits, box_deltas, anchors, image_sizes, size_list, num_classes, score_thresh,
                       topk_per_level, nms_thresh, max_detections, clip_before_nms);
  const bool wide_logits = args.logit_type == ScalarType::Double;
  if (args.box_type == ScalarType::Double) {
    return wide_logits ? run<double, double>(args) : run<float, double>(args);
  }
  return wide_logits ? run<double, float>(args) : run<float, float>(args);
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("detect", TORCH_BOX(&detect_cpu));
}

}  // namespace
}  // namespace retinanet_ext
