// Anchor matching on CUDA: launchers and operators. The host reads no box and no offset, and copies nothing to the
// device: where the boxes of each image lie travels in the kernels' parameters.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "anchor_match/anchor_match_args.h"
#include "anchor_match/anchor_match_kernel.cuh"
#include "cuda/launch.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

// The kernels read an anchor by one or two vectors.
template <typename T>
Tensor aligned_anchors(const Tensor& anchors) {
  const bool aligned = reinterpret_cast<uintptr_t>(anchors.const_data_ptr()) % alignof(Box<T>) == 0;
  return aligned ? anchors : torch::stable::clone(anchors);
}

template <typename T>
MatchImageMemory image_memory(const AnchorMatchArgs& args, size_t index, int64_t first) {
  return {args.gt_boxes[index].const_data_ptr(),
          args.gt_labels.empty() ? nullptr : args.gt_labels[index].const_data_ptr(),
          args.gt_ignore.empty() ? nullptr : static_cast<const bool*>(args.gt_ignore[index].const_data_ptr()),
          static_cast<int32_t>(first), static_cast<int32_t>(args.gt_boxes[index].size(0))};
}

// Calls `launch` for all images, as many at a time as the table holds; packed boxes need one entry for all.
template <typename T, typename Launch>
void for_each_group(const AnchorMatchArgs& args, MatchKernelArgs<T>& kernel, const Launch& launch) {
  if (args.packed()) {
    kernel.first_image = 0;
    kernel.num_images = static_cast<int>(args.batch);
    kernel.images[0] = image_memory<T>(args, 0, 0);
    launch();
    return;
  }
  int64_t row = 0;
  for (int64_t start = 0; start < args.batch; start += kMatchMaxImages) {
    kernel.first_image = static_cast<int>(start);
    kernel.num_images = static_cast<int>(std::min<int64_t>(kMatchMaxImages, args.batch - start));
    for (int i = 0; i < kernel.num_images; ++i) {
      kernel.images[i] = image_memory<T>(args, static_cast<size_t>(start + i), row);
      row += kernel.images[i].count;
    }
    launch();
  }
}

template <typename T>
void run(const AnchorMatchArgs& args, Tensor& matched, Tensor* labels, Tensor* num_foreground) {
  if (args.batch == 0) return;
  const CudaScope scope(args.anchors);
  const Tensor anchors = aligned_anchors<T>(args.anchors);
  const int64_t sets = args.anchor_sets();
  const int64_t tiles = (args.num_anchors + kMatchTile - 1) / kMatchTile;
  const int64_t rows = args.gt_rows();
  require(rows <= std::numeric_limits<int32_t>::max(), args.op, ": gt_boxes must have at most 2^31 - 1 rows in all on "
          "CUDA, and have ", rows);
  require(tiles < std::numeric_limits<int32_t>::max() - kMatchWarps, args.op, ": ", args.num_anchors,
          " anchors are too many for CUDA");
  constexpr int64_t kBoundsNumbers = sizeof(TileBounds<T>) / sizeof(T);
  Tensor bounds = torch::stable::new_empty(anchors, {sets * tiles * kBoundsNumbers});
  Tensor best = torch::stable::new_empty(anchors, {std::max<int64_t>(rows, 1)});

  MatchKernelArgs<T> kernel = {};
  kernel.anchors = static_cast<const Box<T>*>(anchors.const_data_ptr());
  kernel.num_anchors = args.num_anchors;
  kernel.tiles = static_cast<int>(tiles);
  kernel.per_image = args.per_image;
  kernel.bounds = static_cast<TileBounds<T>*>(bounds.mutable_data_ptr());
  kernel.best = static_cast<iou_bits_t<T>*>(best.mutable_data_ptr());
  kernel.matched = static_cast<int32_t*>(matched.mutable_data_ptr());
  if (labels != nullptr) kernel.labels = static_cast<int32_t*>(labels->mutable_data_ptr());
  if (num_foreground != nullptr) kernel.foreground = static_cast<int32_t*>(num_foreground->mutable_data_ptr());
  kernel.fg_iou_thresh = static_cast<T>(args.fg_iou_thresh);
  kernel.bg_iou_thresh = static_cast<T>(args.bg_iou_thresh);
  kernel.min_pos_iou = static_cast<T>(args.min_pos_iou);
  kernel.low_quality = args.allow_low_quality_matches;
  kernel.policy = args.policy;
  kernel.wide_labels = !args.gt_labels.empty() && args.gt_labels[0].scalar_type() == ScalarType::Long;
  if (args.packed()) kernel.offsets = static_cast<const int32_t*>(args.offsets->const_data_ptr());

  const int64_t prepare_warps = std::max({sets * tiles, (std::max(rows, args.batch) + kWarpLanes - 1) / kWarpLanes});
  const int prepare_blocks = scope.blocks_for(kMatchMinBlocks<T>, (prepare_warps + kMatchWarps - 1) / kMatchWarps);
  anchor_tiles_kernel<T><<<prepare_blocks, kMatchThreads, 0, scope.stream()>>>(kernel, sets, rows, args.batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (tiles == 0) return;

  const int64_t groups = (tiles + kMatchWarps - 1) / kMatchWarps;
  const auto grid = [&] {
    const int64_t blocks = groups * kernel.num_images;
    require(blocks <= std::numeric_limits<int32_t>::max(), args.op, ": ", args.num_anchors, " anchors of ",
            kernel.num_images, " images are too many for CUDA");
    return static_cast<unsigned>(blocks);
  };
  for_each_group(args, kernel, [&] {
    anchor_match_kernel<T><<<grid(), kMatchThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (!args.allow_low_quality_matches) return;
  // After every match kernel: a box's best IoU must be known before it is met.
  for_each_group(args, kernel, [&] {
    anchor_restore_kernel<T><<<grid(), kMatchThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void run(const AnchorMatchArgs& args, Tensor& matched, Tensor* labels, Tensor* num_foreground) {
  if (args.anchors.scalar_type() == ScalarType::Double) {
    run<double>(args, matched, labels, num_foreground);
  } else {
    run<float>(args, matched, labels, num_foreground);
  }
}

Tensor match_anchors_cuda(const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
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

AssignedTargets assign_targets_cuda(const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
                                    const std::vector<Tensor>& gt_labels, const std::vector<Tensor>& gt_ignore,
                                    const std::optional<Tensor>& gt_offsets, double fg_iou_thresh,
                                    double bg_iou_thresh, bool allow_low_quality_matches, int64_t policy,
                                    double min_pos_iou) {
  const AnchorMatchArgs args =
      make_anchor_match_args("assign_targets", anchors, gt_boxes, gt_labels, gt_ignore, gt_offsets, fg_iou_thresh,
                             bg_iou_thresh, allow_low_quality_matches, policy, min_pos_iou);
  AssignedTargets targets = empty_targets(args);
  run(args, std::get<1>(targets), &std::get<0>(targets), &std::get<2>(targets));
  return targets;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("match_anchors", TORCH_BOX(&match_anchors_cuda));
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace
}  // namespace retinanet_ext
