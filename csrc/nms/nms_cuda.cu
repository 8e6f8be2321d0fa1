// Non-maximum suppression on CUDA: launchers and operators around nms_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/launch.cuh"
#include "cuda/workspace.cuh"
#include "nms/nms_args.h"
#include "nms/nms_kernel.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

// Every image's boxes and labels from the best to the worst, and the keys that tell their rows.
struct Ranked {
  Tensor keys;
  Tensor boxes;
  Tensor labels;
};

// Boxes are read 16 (float64: 32) bytes at a time.
template <typename T>
Tensor aligned_boxes(const Tensor& boxes) {
  const bool aligned = reinterpret_cast<uintptr_t>(boxes.const_data_ptr()) % sizeof(Box<T>) == 0;
  return aligned ? boxes : torch::stable::clone(boxes);
}

template <typename T>
NmsKeysArgs<T> keys_args(const NmsArgs& args) {
  return {static_cast<const T*>(args.scores.const_data_ptr()),
          args.num_valid.has_value() ? static_cast<const int32_t*>(args.num_valid->const_data_ptr()) : nullptr,
          args.num_boxes, args.batch};
}

template <typename T>
Ranked rank_boxes(const char* op, const CudaScope& scope, const NmsArgs& args) {
  using Key = rank_key_t<T>;
  const int64_t count = args.batch * args.num_boxes;
  Ranked ranked{workspace<Key>(args.boxes, count), workspace<Box<T>>(args.boxes, count),
                workspace<int64_t>(args.boxes, count)};
  const NmsKeysArgs<T> keys = keys_args<T>(args);
  const int64_t chunks = blocks_of(args.num_boxes, kSortChunk);
  nms_sort_kernel<T><<<grid_of(op, args.batch * chunks), kSortThreads, 0, scope.stream()>>>(keys, chunks,
                                                                                        data_of<Key>(ranked.keys));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned blocks = grid_of(op, blocks_of(count, kSortThreads));
  if (args.num_boxes > kSortChunk) {
    Tensor merged = workspace<Key>(args.boxes, count);
    for (int64_t run = kSortChunk; run < args.num_boxes; run *= 2) {
      nms_merge_kernel<T><<<blocks, kSortThreads, 0, scope.stream()>>>(keys, run, data_of<Key>(ranked.keys),
                                                                       data_of<Key>(merged));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      std::swap(ranked.keys, merged);
    }
  }
  const Tensor boxes = aligned_boxes<T>(args.boxes);
  const NmsGatherArgs<T> gather{
      data_of<Key>(ranked.keys), static_cast<const Box<T>*>(boxes.const_data_ptr()),
      args.labels.has_value() ? static_cast<const int64_t*>(args.labels->const_data_ptr()) : nullptr,
      data_of<Box<T>>(ranked.boxes), data_of<int64_t>(ranked.labels)};
  nms_gather_kernel<T><<<blocks, kSortThreads, 0, scope.stream()>>>(keys, gather);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return ranked;
}

template <typename T>
Tensor keep_rows(const CudaScope& scope, const NmsArgs& args) {
  constexpr const char* kOp = "nms";
  Ranked ranked = rank_boxes<T>(kOp, scope, args);
  const int64_t total = args.num_boxes;
  const int64_t band = std::min(total, kBandBoxes);
  Tensor masks = workspace<int64_t>(args.boxes, band * band_words(band));
  Tensor suppressed = torch::stable::new_empty(args.boxes, {total}, ScalarType::Bool);
  Tensor band_kept = torch::stable::new_empty(args.boxes, {band}, ScalarType::Int);
  Tensor keep = torch::stable::new_empty(args.boxes, {total}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(args.boxes, {2}, ScalarType::Long);
  for (int64_t first = 0; first < total; first += band) {
    const int64_t count = std::min(band, total - first);
    const NmsBandArgs<T> kernel{data_of<rank_key_t<T>>(ranked.keys),
                                data_of<Box<T>>(ranked.boxes),
                                data_of<int64_t>(ranked.labels),
                                total,
                                first,
                                count,
                                threshold_below<T>(args.iou_threshold),
                                data_of<unsigned long long>(masks),
                                data_of<bool>(suppressed),
                                data_of<int32_t>(band_kept),
                                data_of<int64_t>(keep),
                                data_of<int64_t>(counts)};
    const int words = band_words(count);
    nms_mask_kernel<T><<<words * words, kMaskThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    nms_settle_kernel<T><<<1, kSettleThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const int64_t rest = total - first - count;
    if (rest == 0) break;
    nms_sweep_kernel<T><<<grid_of(kOp, blocks_of(rest, kSweepThreads)), kSweepThreads, 0, scope.stream()>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  // The one synchronisation: the result's size.
  int64_t kept = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&kept, counts.const_data_ptr(), sizeof(kept), cudaMemcpyDeviceToHost, scope.stream()));
  STD_CUDA_CHECK(cudaStreamSynchronize(scope.stream()));
  const Tensor rows = torch::stable::narrow(keep, 0, 0, kept);
  // A few rows do not keep the memory of all.
  return 2 * kept < total ? torch::stable::clone(rows) : rows;
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double iou_threshold) {
  constexpr const char* kOp = "nms";
  const NmsArgs args = make_nms_args(kOp, boxes, scores, labels, std::nullopt, iou_threshold);
  require(args.batch == 1, kOp, ": boxes must have shape [1, N, 4], and have shape ", shape_text(boxes));
  require(args.num_boxes <= std::numeric_limits<int32_t>::max(), kOp, ": boxes must have at most 2^31 - 1 rows");
  if (args.num_boxes == 0) return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  const CudaScope scope(boxes);
  return args.type() == ScalarType::Double ? keep_rows<double>(scope, args) : keep_rows<float>(scope, args);
}

template <typename T>
void keep_best(const CudaScope& scope, const char* op, const NmsArgs& args, int64_t most, Tensor& indices,
               Tensor& counts) {
  Ranked ranked = rank_boxes<T>(op, scope, args);
  Tensor kept_boxes = workspace<Box<T>>(args.boxes, args.batch * most);
  Tensor kept_labels = workspace<int64_t>(args.boxes, args.batch * most);
  const NmsWalkArgs<T> walk{data_of<rank_key_t<T>>(ranked.keys),
                            data_of<Box<T>>(ranked.boxes),
                            data_of<int64_t>(ranked.labels),
                            data_of<Box<T>>(kept_boxes),
                            data_of<int64_t>(kept_labels),
                            threshold_below<T>(args.iou_threshold),
                            most,
                            data_of<int64_t>(indices),
                            data_of<int32_t>(counts)};
  nms_walk_kernel<T><<<grid_of(op, args.batch), kWalkThreads, 0, scope.stream()>>>(keys_args<T>(args), walk);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> batched_nms_padded_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& labels,
                                                   const std::optional<Tensor>& num_valid, double iou_threshold,
                                                   int64_t max_detections) {
  constexpr const char* kOp = "batched_nms_padded";
  const NmsArgs args = make_nms_args(kOp, boxes, scores, labels, num_valid, iou_threshold);
  require(args.num_boxes <= std::numeric_limits<int32_t>::max(), kOp, ": boxes must have at most 2^31 - 1 rows");
  require(max_detections >= 0, kOp, ": max_detections must be at least 0, and is ", max_detections);
  Tensor indices = torch::stable::new_empty(args.boxes, {args.batch, max_detections}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(args.boxes, {args.batch}, ScalarType::Int);
  if (args.batch == 0) return {indices, counts};
  const CudaScope scope(boxes);
  if (args.num_boxes == 0 || max_detections == 0) {
    if (max_detections > 0) torch::stable::fill_(indices, -1.0);
    torch::stable::fill_(counts, 0.0);
  } else if (args.type() == ScalarType::Double) {
    keep_best<double>(scope, kOp, args, max_detections, indices, counts);
  } else {
    keep_best<float>(scope, kOp, args, max_detections, indices, counts);
  }
  return {indices, counts};
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded_cuda));
  m.impl("nms", TORCH_BOX(&nms_cuda));
}

}  // namespace
}  // namespace retinanet_ext
