// Anchor matching on the CPU: two passes over tiles of anchors, without the IoU matrix.
//
// The first pass finds each anchor's box and each box's best IoU, the second gives the boxes their best anchors. A tile
// is compared with the boxes that may matter to it (may_reach), all its anchors at once in vector registers. Tiles are
// taken from the last to the first: anchors come finest level first, and the few coarse ones show at once how well the
// large boxes can be met, so that the many fine ones are left out. Threads share tiles in turns and tell each other the
// best IoUs now and then; how far that has come changes which pairs are looked at, never a result.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "anchor_match/anchor_match_args.h"
#include "anchor_match/anchor_match_tiles.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kStrips = 64;          // tiles are dealt to so many strips, and strips to threads
constexpr int64_t kTilesPerExchange = 8;  // tiles between two looks at what other threads have found

// A pass over the tiles of some strips.
template <typename T, bool kFirstPass>
struct PassBody {
  MatchWork<T>& work;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    Scratch<T> scratch;
    scratch.flags.resize(kLanes);
    scratch.best.resize(static_cast<size_t>(work.num_boxes) + kLanes);
    exchange_best(work, scratch.best);
    std::vector<int64_t> foreground(work.images.size());
    MatchTile<T> tile;
    int64_t done = 0;
    const int64_t all = work.sets * work.tiles;
    for (int64_t index = all - 1; index >= 0; --index) {
      const int64_t strip = index % kStrips;
      if (strip < begin || strip >= end) continue;
      pass_tile(index / work.tiles, index % work.tiles, tile, scratch, foreground.data());
      if (kFirstPass && ++done % kTilesPerExchange == 0) exchange_best(work, scratch.best);
    }
    if (kFirstPass) exchange_best(work, scratch.best);
    for (size_t image = 0; image < foreground.size(); ++image) {
      work.foreground[image].fetch_add(static_cast<int32_t>(foreground[image]), std::memory_order_relaxed);
    }
  }

  RNX_HD void pass_tile(int64_t set, int64_t index, MatchTile<T>& tile, Scratch<T>& scratch,
                        int64_t* foreground) const {
    const int64_t first = index * kMatchTile;
    const int64_t count = std::min<int64_t>(kMatchTile, work.num_anchors - first);
    TileBounds<T>& bounds = work.bounds[set * work.tiles + index];
    bool loaded = kFirstPass;
    if (kFirstPass) {
      load_tile(work, set, index, tile);
      bounds = find_bounds(tile, count);
    }
    for (int64_t b = work.first_image(set); b < work.end_image(set); ++b) {
      const MatchImage<T>& image = work.images[b];
      int32_t* matched = work.matched + b * work.num_anchors + first;
      int32_t* labels = work.labels == nullptr ? nullptr : work.labels + b * work.num_anchors + first;
      if (kFirstPass) {
        foreground[b] += match_tile(work, image, tile, bounds, count, scratch, matched, labels);
      } else {
        foreground[b] += restore_tile(work, image, set, index, tile, loaded, count, scratch, matched, labels);
      }
    }
  }
};

template <bool kFirstPass, typename T>
void run_pass(MatchWork<T>& work) {
  const PassBody<T, kFirstPass> body{work};
  parallel_for(0, std::min(kStrips, work.sets * work.tiles), 1,
               [&](int64_t begin, int64_t end) { run_on_best_isa(body, begin, end); });
}

template <typename T>
MatchImage<T> describe_image(const AnchorMatchArgs& args, int64_t b) {
  const size_t source = args.packed() ? 0 : static_cast<size_t>(b);
  int64_t first = 0;
  int64_t last = args.gt_boxes[source].size(0);
  if (args.packed()) {
    const int32_t* offsets = static_cast<const int32_t*>(args.offsets->const_data_ptr());
    require(offsets[b] >= 0 && offsets[b] <= offsets[b + 1] && offsets[b + 1] <= last,
            args.op, ": gt_offsets must rise from 0 or more to at most the ", last, " rows of gt_boxes; image ", b,
            " has the rows ", offsets[b], ":", offsets[b + 1]);
    first = offsets[b];
    last = offsets[b + 1];
  }
  const T* values = static_cast<const T*>(args.gt_boxes[source].const_data_ptr());
  const bool* ignore =
      args.gt_ignore.empty() ? nullptr : static_cast<const bool*>(args.gt_ignore[source].const_data_ptr());
  const Tensor* labels = args.gt_labels.empty() ? nullptr : &args.gt_labels[source];
  MatchImage<T> image;
  for (int64_t row = first; row < last; ++row) {
    const Box<T> box{values[4 * row], values[4 * row + 1], values[4 * row + 2], values[4 * row + 3]};
    if (!is_proper_box(box)) continue;
    const int32_t own_row = static_cast<int32_t>(row - first);
    if (ignore != nullptr && ignore[row]) {
      image.regions.push_back(box, own_row);
      continue;
    }
    image.boxes.push_back(box, own_row);
    if (labels != nullptr) {
      image.labels.push_back(labels->scalar_type() == ScalarType::Long
                                 ? static_cast<int32_t>(static_cast<const int64_t*>(labels->const_data_ptr())[row])
                                 : static_cast<const int32_t*>(labels->const_data_ptr())[row]);
    }
  }
  image.boxes.pad();
  return image;
}

// Boxes that overlap no anchor, which two of the policies take for having every anchor as their best.
template <typename T>
void find_restored_by_all(MatchWork<T>& work) {
  for (MatchImage<T>& image : work.images) {
    for (int64_t i = 0; i < image.boxes.size; ++i) {
      const bool zero = work.best[image.first + i].load(std::memory_order_relaxed) == T(0);
      if (!zero || work.policy == MatchPolicy::kSafe) continue;
      if (work.policy == MatchPolicy::kMmdet && !(T(0) >= work.min_pos_iou)) continue;
      image.restores_all = true;
      image.restored_by = i;
    }
  }
}

template <typename T>
void run(const AnchorMatchArgs& args, int32_t* matched, int32_t* labels, int32_t* num_foreground) {
  MatchWork<T> work{};
  work.anchors = static_cast<const T*>(args.anchors.const_data_ptr());
  work.num_anchors = args.num_anchors;
  work.tiles = (args.num_anchors + kMatchTile - 1) / kMatchTile;
  work.sets = args.anchor_sets();
  for (int64_t b = 0; b < args.batch; ++b) {
    work.images.push_back(describe_image<T>(args, b));
    work.images.back().first = work.num_boxes;
    work.num_boxes += work.images.back().boxes.size;
  }
  work.fg_iou_thresh = static_cast<T>(args.fg_iou_thresh);
  work.bg_iou_thresh = static_cast<T>(args.bg_iou_thresh);
  work.min_pos_iou = static_cast<T>(args.min_pos_iou);
  work.policy = args.policy;
  work.bounds.resize(static_cast<size_t>(work.sets * work.tiles));
  work.best = std::make_unique<std::atomic<T>[]>(static_cast<size_t>(work.num_boxes));
  work.foreground = std::make_unique<std::atomic<int32_t>[]>(static_cast<size_t>(args.batch));
  // Where the boxes' best IoUs are not wanted, they are no reason to look at a pair.
  const T least = args.allow_low_quality_matches ? T(0) : std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < work.num_boxes; ++i) work.best[i].store(least, std::memory_order_relaxed);
  for (int64_t b = 0; b < args.batch; ++b) work.foreground[b].store(0, std::memory_order_relaxed);
  work.matched = matched;
  work.labels = labels;
  if (args.batch > 0 && args.num_anchors > 0) {
    run_pass<true>(work);
    if (args.allow_low_quality_matches) {
      find_restored_by_all(work);
      run_pass<false>(work);
    }
  }
  if (num_foreground == nullptr) return;
  for (int64_t b = 0; b < args.batch; ++b) num_foreground[b] = work.foreground[b].load(std::memory_order_relaxed);
}

void run(const AnchorMatchArgs& args, Tensor& matched, Tensor* labels, Tensor* num_foreground) {
  const auto data = [](Tensor* tensor) {
    return tensor == nullptr ? nullptr : static_cast<int32_t*>(tensor->mutable_data_ptr());
  };
  if (args.anchors.scalar_type() == ScalarType::Double) {
    run<double>(args, data(&matched), data(labels), data(num_foreground));
  } else {
    run<float>(args, data(&matched), data(labels), data(num_foreground));
  }
}

Tensor match_anchors_cpu(const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
                         const std::vector<Tensor>& gt_ignore, const std::optional<Tensor>& gt_offsets,
                         double fg_iou_thresh, double bg_iou_thresh, bool allow_low_quality_matches, int64_t policy,
                         double min_pos_iou) {
  const AnchorMatchArgs args =
      make_anchor_match_args("match_anchors", anchors, gt_boxes, {}, gt_ignore, gt_offsets, fg_iou_thresh,
                             bg_iou_thresh, allow_low_quality_matches, policy, min_pos_iou);
  Tensor matched = empty_matched(args);
  run(args, matched, nullptr, nullptr);
  return matched;
}

AssignedTargets assign_targets_cpu(const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
                                   const std::vector<Tensor>& gt_labels, const std::vector<Tensor>& gt_ignore,
                                   const std::optional<Tensor>& gt_offsets, double fg_iou_thresh, double bg_iou_thresh,
                                   bool allow_low_quality_matches, int64_t policy, double min_pos_iou) {
  const AnchorMatchArgs args =
      make_anchor_match_args("assign_targets", anchors, gt_boxes, gt_labels, gt_ignore, gt_offsets, fg_iou_thresh,
                             bg_iou_thresh, allow_low_quality_matches, policy, min_pos_iou);
  AssignedTargets targets = empty_targets(args);
  run(args, std::get<1>(targets), &std::get<0>(targets), &std::get<2>(targets));
  return targets;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("match_anchors", TORCH_BOX(&match_anchors_cpu));
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cpu));
}

}  // namespace
}  // namespace retinanet_ext
