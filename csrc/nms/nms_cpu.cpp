// Non-maximum suppression on the CPU: labels apart, each label's boxes from the best to the worst.
//
// A label with many boxes is taken a tile of candidates at a time: all threads compare the tile's candidates with what
// is kept already, then the tile is settled in order. Labels with few boxes are shared among the threads.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/parallel.h"
#include "nms/nms_args.h"
#include "nms/nms_walk.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTileCandidates = 512;
constexpr int64_t kCandidatesPerTask = 32;
constexpr int64_t kManyBoxes = 1024;  // of one label: worth all threads

// The boxes of an image, and the threshold between them.
template <typename T>
struct Candidates {
  const T* boxes;  // [N, 4]
  T threshold;

  Box<T> box(int32_t row) const {
    const T* box = boxes + 4 * static_cast<int64_t>(row);
    return {box[0], box[1], box[2], box[3]};
  }
};

// Whether each candidate of a tile is suppressed by what is kept.
template <typename T>
struct TileBody {
  const Candidates<T>& candidates;
  const KeptBoxes<T>& kept;
  const int32_t* rows;
  uint8_t* suppressed;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const Box<T> box = candidates.box(rows[i]);
      suppressed[i] = kept.suppress(box, box_area(box), candidates.threshold, 0, kept.size());
    }
  }
};

// Settles candidates in order: each against what was kept from `first` on.
template <typename T>
struct SettleBody {
  const Candidates<T>& candidates;
  KeptBoxes<T>& kept;
  const int32_t* rows;
  uint8_t* suppressed;
  int64_t first;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (suppressed[i] != 0) continue;
      const Box<T> box = candidates.box(rows[i]);
      const T area = box_area(box);
      suppressed[i] = kept.suppress(box, area, candidates.threshold, first, kept.size());
      if (suppressed[i] == 0) kept.push_back(box, area);
    }
  }
};

// rows [count]: one label's boxes, best first. suppressed [count]: the result.
template <typename T>
void suppress_label(const Candidates<T>& candidates, const int32_t* rows, int64_t count, uint8_t* suppressed) {
  KeptBoxes<T> kept;
  std::fill(suppressed, suppressed + count, uint8_t{0});
  for (int64_t start = 0; start < count; start += kTileCandidates) {
    const int64_t size = std::min(kTileCandidates, count - start);
    if (kept.size() > 0) {
      const TileBody<T> body{candidates, kept, rows + start, suppressed + start};
      parallel_for(0, size, kCandidatesPerTask,
                   [&](int64_t begin, int64_t end) { run_on_best_isa(body, begin, end); });
    }
    run_on_best_isa(SettleBody<T>{candidates, kept, rows + start, suppressed + start, kept.size()}, 0, size);
  }
}

// The positions in `order` of each label's boxes, label by label; `starts` has one more entry than there are labels.
struct LabelGroups {
  std::vector<int32_t> positions;
  std::vector<int64_t> starts;
};

LabelGroups group_by_label(const std::vector<int32_t>& order, const int64_t* labels) {
  const int64_t count = static_cast<int64_t>(order.size());
  std::unordered_map<int64_t, int32_t> numbers;
  std::vector<int32_t> number_of(order.size());
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) {
    const auto [entry, added] = numbers.try_emplace(labels[order[i]], static_cast<int32_t>(sizes.size()));
    if (added) sizes.push_back(0);
    number_of[i] = entry->second;
    ++sizes[entry->second];
  }
  LabelGroups groups;
  groups.starts.assign(1, 0);
  for (const int64_t size : sizes) groups.starts.push_back(groups.starts.back() + size);
  groups.positions.resize(order.size());
  std::vector<int64_t> next(groups.starts.begin(), groups.starts.end() - 1);
  for (int64_t i = 0; i < count; ++i) groups.positions[next[number_of[i]]++] = static_cast<int32_t>(i);
  return groups;
}

// suppressed [N], by position in `order`.
template <typename T>
void suppress_labels(const Candidates<T>& candidates, const std::vector<int32_t>& order, const int64_t* labels,
                     uint8_t* suppressed) {
  const LabelGroups groups = group_by_label(order, labels);
  std::vector<int32_t> rows(order.size());
  for (size_t i = 0; i < order.size(); ++i) rows[i] = order[groups.positions[i]];
  std::vector<uint8_t> by_group(order.size());
  const int64_t num_groups = static_cast<int64_t>(groups.starts.size()) - 1;
  const auto run = [&](int64_t group) {
    const int64_t start = groups.starts[group];
    suppress_label(candidates, rows.data() + start, groups.starts[group + 1] - start, by_group.data() + start);
  };
  const auto is_large = [&](int64_t group) { return groups.starts[group + 1] - groups.starts[group] >= kManyBoxes; };
  for (int64_t group = 0; group < num_groups; ++group) {
    if (is_large(group)) run(group);
  }
  parallel_for(0, num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      if (!is_large(group)) run(group);
    }
  });
  for (size_t i = 0; i < order.size(); ++i) suppressed[groups.positions[i]] = by_group[i];
}

// Kept rows of one image, best first.
template <typename T>
std::vector<int32_t> keep_rows(const NmsArgs& args) {
  const int64_t count = args.num_boxes;
  const Candidates<T> candidates{static_cast<const T*>(args.boxes.const_data_ptr()),
                                 threshold_below<T>(args.iou_threshold)};
  std::vector<int32_t> order = rank_scores(static_cast<const T*>(args.scores.const_data_ptr()), count);
  std::vector<uint8_t> suppressed(order.size());
  if (args.labels.has_value()) {
    suppress_labels(candidates, order, static_cast<const int64_t*>(args.labels->const_data_ptr()), suppressed.data());
  } else {
    suppress_label(candidates, order.data(), count, suppressed.data());
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (suppressed[i] == 0) order[kept++] = order[i];
  }
  order.resize(kept);
  return order;
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double iou_threshold) {
  const NmsArgs args = make_nms_args("nms", boxes, scores, labels, std::nullopt, iou_threshold);
  require(args.batch == 1, "nms: boxes must be those of one image, [1, N, 4], and have shape ", shape_text(boxes));
  require(args.num_boxes <= std::numeric_limits<int32_t>::max(), "nms: boxes must have at most 2^31 - 1 rows");
  const std::vector<int32_t> rows =
      args.type() == ScalarType::Double ? keep_rows<double>(args) : keep_rows<float>(args);
  Tensor result = torch::stable::new_empty(args.boxes, {static_cast<int64_t>(rows.size())}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

// The best rows of one image that are kept, at most `most` of them.
template <typename T>
std::vector<int32_t> keep_best(const NmsArgs& args, int64_t image, int64_t count, int64_t most) {
  const Candidates<T> candidates{static_cast<const T*>(args.boxes.const_data_ptr()) + image * args.num_boxes * 4, T(0)};
  const int64_t* labels = static_cast<const int64_t*>(args.labels->const_data_ptr()) + image * args.num_boxes;
  const std::vector<int32_t> order =
      rank_scores(static_cast<const T*>(args.scores.const_data_ptr()) + image * args.num_boxes, count);
  std::vector<Box<T>> boxes(order.size());
  std::vector<int64_t> ranked_labels(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    boxes[i] = candidates.box(order[i]);
    ranked_labels[i] = labels[order[i]];
  }
  std::vector<int32_t> kept;
  run_on_best_isa(GreedyWalk<T, int64_t>{boxes.data(), ranked_labels.data(), threshold_below<T>(args.iou_threshold),
                                         most, kept},
                  0, count);
  for (int32_t& position : kept) position = order[position];
  return kept;
}

std::tuple<Tensor, Tensor> batched_nms_padded_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& labels,
                                                  const std::optional<Tensor>& num_valid, double iou_threshold,
                                                  int64_t max_detections) {
  constexpr const char* kOp = "batched_nms_padded";
  const NmsArgs args = make_nms_args(kOp, boxes, scores, labels, num_valid, iou_threshold);
  require(args.num_boxes <= std::numeric_limits<int32_t>::max(), kOp, ": boxes must have at most 2^31 - 1 rows");
  require(max_detections >= 0, kOp, ": max_detections must be at least 0, and is ", max_detections);
  Tensor indices = torch::stable::new_empty(args.boxes, {args.batch, max_detections}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(args.boxes, {args.batch}, ScalarType::Int);
  int64_t* index_data = static_cast<int64_t*>(indices.mutable_data_ptr());
  int32_t* count_data = static_cast<int32_t*>(counts.mutable_data_ptr());
  const int32_t* valid =
      args.num_valid.has_value() ? static_cast<const int32_t*>(args.num_valid->const_data_ptr()) : nullptr;
  parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t count =
          valid == nullptr ? args.num_boxes : std::clamp<int64_t>(valid[image], 0, args.num_boxes);
      const std::vector<int32_t> rows = args.type() == ScalarType::Double
                                            ? keep_best<double>(args, image, count, max_detections)
                                            : keep_best<float>(args, image, count, max_detections);
      int64_t* target = index_data + image * max_detections;
      std::fill(std::copy(rows.begin(), rows.end(), target), target + max_detections, int64_t{-1});
      count_data[image] = static_cast<int32_t>(rows.size());
    }
  });
  return {indices, counts};
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded_cpu));
  m.impl("nms", TORCH_BOX(&nms_cpu));
}

}  // namespace
}  // namespace retinanet_ext
