// Post-processing on CUDA: launchers and the operator around detect_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/workspace.cuh"
#include "postprocess/detect_args.h"
#include "postprocess/detect_kernel.cuh"
#include "postprocess/detect_plan.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "detect";
// For each multiprocessor: as many as make the last ones' share of the time small.
constexpr int64_t kPartsPerMultiprocessor = 4 * kFilterBlocks;

// The candidates of all images, level by level: each level's best, sorted.
struct Selected {
  Tensor keys;    // [B, room]
  Tensor counts;  // [B, levels]
};

// What the filter leaves: a list of candidates a part.
struct Filtered {
  Tensor candidates;
  Tensor counts;
};

template <typename S>
Filtered filter_logits(const CudaScope& scope, const DetectArgs& args, const DetectPlan& plan) {
  using T = compute_t<S>;
  using Key = rank_key_t<T>;
  Filtered found{workspace<Key>(args.anchors, plan.slots), workspace<uint32_t>(args.anchors, plan.parts)};
  FilterArgs<T> kernel = {};
  kernel.num_levels = static_cast<int>(args.logits.size());
  kernel.part = plan.part;
  kernel.smallest = smallest_logit_above<T>(args.score_thresh);
  kernel.classes = static_cast<uint32_t>(args.num_classes);
  kernel.topk = args.topk_per_level;
  kernel.candidates = data_of<Key>(found.candidates);
  kernel.counts = data_of<uint32_t>(found.counts);
  for (size_t i = 0; i < args.logits.size(); ++i) {
    const LogitLevel& level = args.logits[i];
    const LevelPlan& layout = plan.levels[i];
    kernel.levels[i] = {level.logits.const_data_ptr(),
                        level.image_stride,
                        level.rows() * args.num_classes,
                        static_cast<uint32_t>(level.first_anchor * args.num_classes),
                        static_cast<uint32_t>(level.anchors),
                        static_cast<uint32_t>(level.cells),
                        level.layout == LevelLayout::kPlanes,
                        static_cast<int>(layout.parts),
                        static_cast<int>(layout.first_part),
                        layout.capacity,
                        layout.first_slot};
  }
  if (plan.parts > 0) {
    detect_filter_kernel<S><<<grid_of(kOp, plan.parts), kFilterThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return found;
}

// T: of logits.
template <typename T>
void launch_select(const CudaScope& scope, const SelectArgs<T>& kernel, int64_t blocks) {
  detect_select_kernel<T><<<grid_of(kOp, blocks), kSortThreads, 0, scope.stream()>>>(kernel);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The best of every group of parts.
template <typename T>
Filtered select_from_groups(const CudaScope& scope, const DetectArgs& args, const DetectPlan& plan, Filtered& found) {
  using Key = rank_key_t<T>;
  Filtered left{workspace<Key>(args.anchors, plan.group_slots), workspace<uint32_t>(args.anchors, plan.groups)};
  SelectArgs<T> kernel = {};
  kernel.num_levels = static_cast<int>(plan.levels.size());
  kernel.candidates = data_of<Key>(found.candidates);
  kernel.counts = data_of<uint32_t>(found.counts);
  kernel.selected = data_of<Key>(left.candidates);
  kernel.selected_counts = data_of<uint32_t>(left.counts);
  for (size_t i = 0; i < plan.levels.size(); ++i) {
    const LevelPlan& level = plan.levels[i];
    kernel.levels[i] = {static_cast<int>(level.parts),
                        static_cast<int>(level.first_part),
                        level.capacity,
                        level.first_slot,
                        static_cast<int>(level.groups),
                        static_cast<int>(level.first_group),
                        level.most,
                        level.group_room,
                        level.first_left};
  }
  launch_select(scope, kernel, plan.groups);
  return left;
}

template <typename T>
Selected select_candidates(const CudaScope& scope, const DetectArgs& args, const DetectPlan& plan, Filtered found) {
  using Key = rank_key_t<T>;
  const int levels = static_cast<int>(plan.levels.size());
  const bool grouped = plan.groups > 0;
  if (grouped) found = select_from_groups<T>(scope, args, plan, found);
  bool sorts_in_memory = false;
  for (const LevelPlan& level : plan.levels) sorts_in_memory |= level.most > kSortChunk;
  Selected selected{workspace<Key>(args.anchors, args.batch * plan.room),
                    workspace<uint32_t>(args.anchors, args.batch * levels)};
  Tensor scratch = workspace<Key>(args.anchors, sorts_in_memory ? args.batch * plan.room : 0);
  SelectArgs<T> kernel = {};
  kernel.num_levels = levels;
  kernel.candidates = data_of<Key>(found.candidates);
  kernel.counts = data_of<uint32_t>(found.counts);
  kernel.sorted = true;
  kernel.image_room = plan.room;
  kernel.selected = data_of<Key>(selected.keys);
  kernel.scratch = data_of<Key>(scratch);
  kernel.selected_counts = data_of<uint32_t>(selected.counts);
  for (int i = 0; i < levels; ++i) {
    const LevelPlan& level = plan.levels[i];
    kernel.levels[i] = {static_cast<int>(grouped ? level.groups : level.parts),
                        static_cast<int>(grouped ? level.first_group : level.first_part),
                        grouped ? level.group_room : level.capacity,
                        grouped ? level.first_left : level.first_slot,
                        1,
                        static_cast<int>(args.batch) * i,
                        level.most,
                        level.most,
                        level.first};
  }
  launch_select(scope, kernel, args.batch * levels);
  return selected;
}

DeltaType delta_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DeltaType::kFloat64;
    case ScalarType::Float:
      return DeltaType::kFloat32;
    case ScalarType::Half:
      return DeltaType::kFloat16;
    default:
      return DeltaType::kBFloat16;
  }
}

template <typename T>
ImageSizes<T> image_sizes(const DetectArgs& args, int64_t first_image, int64_t images) {
  ImageSizes<T> sizes = {};
  if (args.image_sizes.has_value()) {
    sizes.tensor = static_cast<const T*>(args.image_sizes->const_data_ptr());
  } else {
    for (int64_t i = 0; i < 2 * images; ++i) sizes.list[i] = static_cast<T>(args.size_list[2 * first_image + i]);
  }
  return sizes;
}

// L: of logits and scores; T: of boxes.
template <typename L, typename T>
void finish(const CudaScope& scope, const DetectArgs& args, const DetectPlan& plan, Selected& selected,
            DetectResult& result) {
  using Key = rank_key_t<L>;
  const int levels = static_cast<int>(args.logits.size());
  const int64_t candidates = args.batch * plan.room;
  const int64_t kept = args.batch * args.max_detections;
  Tensor keys = workspace<Key>(args.anchors, candidates);
  Tensor boxes = workspace<Box<T>>(args.anchors, candidates);
  Tensor labels = workspace<int32_t>(args.anchors, candidates);
  Tensor kept_boxes = workspace<Box<T>>(args.anchors, kept);
  Tensor kept_labels = workspace<int32_t>(args.anchors, kept);

  RankArgs<L, T> rank = {};
  rank.num_levels = levels;
  rank.delta_type = delta_type(args.delta_type);
  rank.clip = args.clip_before_nms;
  rank.blocks_per_image = static_cast<int>(grid_of(kOp, blocks_of(plan.room, kSortThreads)));
  rank.classes = static_cast<uint32_t>(args.num_classes);
  rank.room = plan.room;
  rank.selected = data_of<Key>(selected.keys);
  rank.selected_counts = data_of<uint32_t>(selected.counts);
  rank.anchors = static_cast<const T*>(args.anchors.const_data_ptr());
  rank.anchor_image_stride = args.anchors.dim() == 3 ? 4 * args.num_anchors : 0;
  rank.keys = data_of<Key>(keys);
  rank.boxes = data_of<Box<T>>(boxes);
  rank.labels = data_of<int32_t>(labels);
  for (int i = 0; i < levels; ++i) {
    const DeltaLevel& level = args.deltas[i];
    rank.levels[i] = {level.deltas.const_data_ptr(),
                      level.image_stride,
                      level.channel_stride,
                      level.row_stride,
                      level.column_stride,
                      level.first_anchor,
                      plan.levels[i].first,
                      plan.levels[i].most,
                      static_cast<int>(level.anchors),
                      static_cast<int>(level.width)};
  }

  DetectWalkArgs<L, T> walk = {};
  walk.keys = rank.keys;
  walk.boxes = rank.boxes;
  walk.labels = rank.labels;
  walk.selected_counts = rank.selected_counts;
  walk.num_levels = levels;
  walk.room = plan.room;
  walk.threshold = threshold_below<T>(args.nms_thresh);
  walk.most = args.max_detections;
  walk.clip = !args.clip_before_nms;
  walk.kept_boxes = data_of<Box<T>>(kept_boxes);
  walk.kept_labels = data_of<int32_t>(kept_labels);
  walk.out_boxes = data_of<Box<T>>(std::get<0>(result));
  walk.out_scores = data_of<L>(std::get<1>(result));
  walk.out_labels = data_of<int64_t>(std::get<2>(result));
  walk.out_indices = data_of<int64_t>(std::get<3>(result));
  walk.out_counts = data_of<int32_t>(std::get<4>(result));

  const int64_t images_at_once = args.image_sizes.has_value() ? args.batch : kDetectMaxImages;
  for (int64_t first = 0; first < args.batch; first += images_at_once) {
    const int64_t images = std::min(images_at_once, args.batch - first);
    rank.first_image = walk.first_image = static_cast<int>(first);
    rank.sizes = walk.sizes = image_sizes<T>(args, first, images);
    if (plan.room > 0) {
      detect_rank_kernel<L, T><<<grid_of(kOp, images * rank.blocks_per_image), kSortThreads, 0, scope.stream()>>>(rank);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    detect_walk_kernel<L, T><<<grid_of(kOp, images), kWalkThreads, 0, scope.stream()>>>(walk);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename S>
void run(const DetectArgs& args, DetectResult& result) {
  using L = compute_t<S>;
  const CudaScope scope(args.anchors);
  std::vector<int64_t> sizes;
  for (const LogitLevel& level : args.logits) sizes.push_back(level.rows() * args.num_classes);
  const DetectPlan plan = plan_detect(sizes, args.batch, args.topk_per_level, sizeof(rank_key_t<L>), kFilterTile<S>,
                                      kPartsPerMultiprocessor * scope.multiprocessors());
  Selected selected = select_candidates<L>(scope, args, plan, filter_logits<S>(scope, args, plan));
  if (args.box_type == ScalarType::Double) {
    finish<L, double>(scope, args, plan, selected, result);
  } else {
    finish<L, float>(scope, args, plan, selected, result);
  }
}

DetectResult detect_cuda(const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
                         const Tensor& anchors, const std::optional<Tensor>& image_sizes,
                         const std::vector<double>& size_list, int64_t num_classes, double score_thresh,
                         int64_t topk_per_level, double nms_thresh, int64_t max_detections, bool clip_before_nms) {
  const DetectArgs args =
      make_detect_args(cls_logits, box_deltas, anchors, image_sizes, size_list, num_classes, score_thresh,
                       topk_per_level, nms_thresh, max_detections, clip_before_nms);
  require(args.logits.size() <= kDetectMaxLevels, kOp, ": at most ", kDetectMaxLevels, " levels on CUDA, not ",
          args.logits.size());
  require(args.num_anchors * args.num_classes <= std::numeric_limits<int32_t>::max(), kOp, ": at most 2^31 - 1 logits "
          "an image on CUDA, not ", args.num_anchors, " x ", args.num_classes);
  DetectResult result = empty_detections(args);
  if (args.batch == 0) return result;
  switch (args.logit_type) {
    case ScalarType::Double:
      run<double>(args, result);
      break;
    case ScalarType::Float:
      run<float>(args, result);
      break;
    case ScalarType::Half:
      run<Float16>(args, result);
      break;
    default:
      run<BFloat16>(args, result);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("detect", TORCH_BOX(&detect_cuda));
}

}  // namespace
}  // namespace retinanet_ext
