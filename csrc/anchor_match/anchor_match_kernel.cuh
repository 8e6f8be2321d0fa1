// Anchor matching on CUDA, in three launches and without the IoU matrix:
//
//   anchor_tiles_kernel   the bounds of every tile of 128 anchors (anchor_match_math.h); zeroes what the others add up
//   anchor_match_kernel   each anchor's best box, where one can reach the background threshold; each box's best IoU
//   anchor_restore_kernel low-quality matches: boxes get the anchors that they have their best IoU with
//
// In all three a warp has a tile, and a lane kAnchorsPerLane consecutive anchors of it, so that a lane's results are
// one 16-byte store. A warp asks the tile's bounds about 32 boxes at once (a box a lane, one ballot); only what may
// matter is compared with the anchors, and only then are these read. No shared memory, no barrier.
//
// A box's best IoU is the maximum of non-negative numbers, taken by an atomic on their bits: any order gives the same.
// How far it has come when a tile is asked decides how many pairs are looked at, never a result. Tiles are taken from
// the last, the coarse levels, to the first.
//
// Bytes an image: 4 or 8 an anchor written; per image set, 16 an anchor read once for the bounds, and by tiles that
// meet a box. A tile that meets none costs a warp about 60 instructions; bound: the stores, where boxes are few.
#pragma once

#include <cstdint>

#include "anchor_match/anchor_match_math.h"
#include "cuda/vec.cuh"
#include "cuda/warp.cuh"

namespace retinanet_ext {

constexpr int kMatchThreads = 256;
constexpr int kMatchWarps = kMatchThreads / kWarpLanes;
// Blocks a multiprocessor: what leaves the registers that a lane's anchors take.
template <typename T>
constexpr int kMatchMinBlocks = sizeof(T) == sizeof(float) ? 3 : 1;
constexpr int kMatchMaxImages = 64;  // of a launch: their table is a kernel parameter
constexpr int kAnchorsPerLane = kMatchTile / kWarpLanes;
static_assert(kAnchorsPerLane * sizeof(int32_t) == kVectorBytes, "a lane's results are one vector");

// Non-negative IoUs compare as their bits do.
template <typename T>
struct IouBits;
template <>
struct IouBits<float> {
  using type = uint32_t;
};
template <>
struct IouBits<double> {
  using type = unsigned long long;
};
template <typename T>
using iou_bits_t = typename IouBits<T>::type;

struct MatchImageMemory {
  const void* boxes;   // [M, 4]
  const void* labels;  // [M], or null
  const bool* ignore;  // [M], or null
  int32_t first;       // of the image's boxes in `best`
  int32_t count;       // M
};

template <typename T>
struct MatchKernelArgs {
  const Box<T>* anchors;  // [sets, N]
  int64_t num_anchors;
  int tiles;  // of one set
  bool per_image;
  TileBounds<T>* bounds;  // [sets, tiles]
  iou_bits_t<T>* best;    // of each box, zero at first
  int32_t* matched;       // [B, N]
  int32_t* labels;        // [B, N], or null
  int32_t* foreground;    // [B], zero at first, or null
  T fg_iou_thresh;
  T bg_iou_thresh;
  T min_pos_iou;
  bool low_quality;
  MatchPolicy policy;
  bool wide_labels;        // int64
  const int32_t* offsets;  // [B + 1]: all images' boxes are in images[0]; or null
  int first_image;
  int num_images;
  MatchImageMemory images[kMatchMaxImages];
};

// An image's boxes, and where its results go.
template <typename T>
struct ImageBoxes {
  const T* boxes;
  const void* labels;
  const bool* ignore;
  iou_bits_t<T>* best;
  int count;
  int64_t image;
};

__device__ __forceinline__ int clamp_row(int row, int most) {
  return row < 0 ? 0 : (row > most ? most : row);
}

template <typename T>
__device__ __forceinline__ ImageBoxes<T> image_boxes(const MatchKernelArgs<T>& args, int index) {
  const int64_t image = args.first_image + index;
  const MatchImageMemory& memory = args.images[args.offsets == nullptr ? index : 0];
  int first = 0;
  int count = memory.count;
  if (args.offsets != nullptr) {
    // Whatever the offsets say, nothing outside the tensor is read.
    const int last = clamp_row(args.offsets[image + 1], count);
    first = clamp_row(args.offsets[image], last);
    count = last - first;
  }
  const size_t label_size = args.wide_labels ? sizeof(int64_t) : sizeof(int32_t);
  return {static_cast<const T*>(memory.boxes) + 4 * static_cast<int64_t>(first),
          memory.labels == nullptr ? nullptr : static_cast<const char*>(memory.labels) + first * label_size,
          memory.ignore == nullptr ? nullptr : memory.ignore + first,
          args.best + memory.first + first,
          count,
          image};
}

template <typename T>
__device__ __forceinline__ Box<T> load_gt(const T* boxes, int row) {
  const T* box = boxes + 4 * static_cast<int64_t>(row);
  return {box[0], box[1], box[2], box[3]};
}

template <typename T>
__device__ __forceinline__ Box<T> shuffle_box(const Box<T>& box, int lane) {
  return {__shfl_sync(kWholeWarp, box.x1, lane), __shfl_sync(kWholeWarp, box.y1, lane),
          __shfl_sync(kWholeWarp, box.x2, lane), __shfl_sync(kWholeWarp, box.y2, lane)};
}

template <typename T>
__device__ __forceinline__ int32_t label_of(const MatchKernelArgs<T>& args, const ImageBoxes<T>& image, int row) {
  return args.wide_labels ? static_cast<int32_t>(static_cast<const int64_t*>(image.labels)[row])
                          : static_cast<const int32_t*>(image.labels)[row];
}

// The lane's anchors; beyond the last, boxes without area.
template <typename T>
struct LaneAnchors {
  Box<T> boxes[kAnchorsPerLane];
  T areas[kAnchorsPerLane];
};

template <typename T>
__device__ __forceinline__ LaneAnchors<T> load_anchors(const MatchKernelArgs<T>& args, int64_t set, int64_t first) {
  LaneAnchors<T> lane;
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) {
    lane.boxes[i] = first + i < args.num_anchors ? args.anchors[set * args.num_anchors + first + i]
                                                 : Box<T>{T(0), T(0), T(0), T(0)};
    lane.areas[i] = box_area(lane.boxes[i]);
  }
  return lane;
}

template <typename T>
__global__ void __launch_bounds__(kMatchThreads) anchor_tiles_kernel(MatchKernelArgs<T> args, int64_t sets,
                                                                     int64_t boxes, int64_t images) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kMatchThreads;
  for (int64_t i = thread; i < boxes; i += threads) args.best[i] = 0;
  if (args.foreground != nullptr) {
    for (int64_t i = thread; i < images; i += threads) args.foreground[i] = 0;
  }
  const int lane = threadIdx.x % kWarpLanes;
  for (int64_t tile = thread / kWarpLanes; tile < sets * args.tiles; tile += threads / kWarpLanes) {
    const int64_t set = tile / args.tiles;
    TileBounds<T> bounds = no_anchors<T>();
    for (int i = 0; i < kAnchorsPerLane; ++i) {
      const int64_t anchor = (tile - set * args.tiles) * kMatchTile + i * kWarpLanes + lane;
      if (anchor < args.num_anchors) {
        const Box<T> box = args.anchors[set * args.num_anchors + anchor];
        include_anchor(bounds, box, box_area(box));
      }
    }
    for (int step = kWarpLanes / 2; step > 0; step /= 2) {
      TileBounds<T> other;
      other.x1 = __shfl_xor_sync(kWholeWarp, bounds.x1, step);
      other.y1 = __shfl_xor_sync(kWholeWarp, bounds.y1, step);
      other.x2 = __shfl_xor_sync(kWholeWarp, bounds.x2, step);
      other.y2 = __shfl_xor_sync(kWholeWarp, bounds.y2, step);
      other.max_width = __shfl_xor_sync(kWholeWarp, bounds.max_width, step);
      other.max_height = __shfl_xor_sync(kWholeWarp, bounds.max_height, step);
      other.min_area = __shfl_xor_sync(kWholeWarp, bounds.min_area, step);
      other.max_area = __shfl_xor_sync(kWholeWarp, bounds.max_area, step);
      include_bounds(bounds, other);
    }
    if (lane == 0) args.bounds[tile] = bounds;
  }
}

// Which tile of which image this warp has; false where it has none. A block has tiles of one image, whose boxes then
// stay in its cache; blocks go through the images first, and through the tiles from the last to the first.
template <typename T>
__device__ __forceinline__ bool find_tile(const MatchKernelArgs<T>& args, int& image, int& tile) {
  const int group = static_cast<int>(blockIdx.x) / args.num_images;
  image = static_cast<int>(blockIdx.x) - group * args.num_images;
  tile = args.tiles - 1 - (group * kMatchWarps + static_cast<int>(threadIdx.x) / kWarpLanes);
  return tile >= 0;
}

__device__ __forceinline__ void store_states(int32_t* target, const int32_t (&states)[kAnchorsPerLane], int64_t left) {
  if (left >= kAnchorsPerLane && is_vector_aligned(target)) {
    Vec<int32_t> vector;
#pragma unroll
    for (int i = 0; i < kAnchorsPerLane; ++i) vector.words[i] = static_cast<uint32_t>(states[i]);
    store_vector(target, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) {
    if (i < left) target[i] = states[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kMatchThreads, kMatchMinBlocks<T>)
    anchor_match_kernel(const __grid_constant__ MatchKernelArgs<T> args) {
  int index;
  int tile;
  if (!find_tile(args, index, tile)) return;  // the whole warp
  const ImageBoxes<T> image = image_boxes(args, index);
  const int64_t set = args.per_image ? image.image : 0;
  const TileBounds<T> bounds = args.bounds[set * args.tiles + tile];
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t first = static_cast<int64_t>(tile) * kMatchTile + lane * kAnchorsPerLane;

  LaneAnchors<T> anchors;
  bool loaded = false;
  T best_iou[kAnchorsPerLane] = {};
  int best_row[kAnchorsPerLane] = {};
  unsigned ignored = 0;  // a bit an anchor
  int first_row = -1;  // of the boxes that take part

  for (int start = 0; start < image.count; start += kWarpLanes) {
    const int row = start + lane;
    Box<T> gt = {T(0), T(0), T(0), T(0)};
    bool is_region = false;
    T known = T(0);  // read with the box, not after it: a tile that meets no box waits for memory once
    if (row < image.count) {
      gt = load_gt(image.boxes, row);
      known = bit_cast<T>(load_shared_with_others(image.best + row));
      is_region = image.ignore != nullptr && image.ignore[row];
    }
    if (!args.low_quality) known = std::numeric_limits<T>::infinity();
    const bool proper = is_proper_box(gt);
    const T area = box_area(gt);
    const T threshold = smaller(known, args.bg_iou_thresh);
    const unsigned taking_part = __ballot_sync(kWholeWarp, proper && !is_region);
    if (first_row < 0 && taking_part != 0) {
      first_row = start + first_bit(taking_part);
#pragma unroll
      for (int i = 0; i < kAnchorsPerLane; ++i) best_row[i] = first_row;
    }
    const bool matters = proper && (is_region ? touches(bounds, gt) : may_reach(bounds, gt, area, threshold));
    unsigned listed = __ballot_sync(kWholeWarp, matters);
    if (listed == 0) continue;
    if (!loaded) anchors = load_anchors(args, set, first);
    loaded = true;
    const unsigned regions = __ballot_sync(kWholeWarp, is_region);
    // In rising order: the first box of highest IoU stays.
    for (; listed != 0; listed &= listed - 1) {
      const int source = first_bit(listed);
      const Box<T> box = shuffle_box(gt, source);
      if ((regions >> source & 1u) != 0) {
#pragma unroll
        for (int i = 0; i < kAnchorsPerLane; ++i) {
          ignored |= static_cast<unsigned>(is_mostly_inside(anchors.boxes[i], anchors.areas[i], box)) << i;
        }
        continue;
      }
      const T gt_area = box_area(box);
      T most = T(0);
#pragma unroll
      for (int i = 0; i < kAnchorsPerLane; ++i) {
        const T iou = match_iou(box, gt_area, anchors.boxes[i], anchors.areas[i]);
        const bool better = iou > best_iou[i];
        best_iou[i] = better ? iou : best_iou[i];
        best_row[i] = better ? start + source : best_row[i];
        most = larger(iou, most);
      }
      const iou_bits_t<T> bits = warp_max(bit_cast<iou_bits_t<T>>(most));
      if (lane == source && bit_cast<T>(bits) > known) atomicMax(image.best + row, bits);
    }
  }

  int32_t states[kAnchorsPerLane];
  int foreground = 0;
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) {
    states[i] = kMatchBackground;
    if (first_row >= 0) {
      if (best_iou[i] >= args.fg_iou_thresh) {
        states[i] = best_row[i];
      } else if (best_iou[i] >= args.bg_iou_thresh) {
        states[i] = kMatchLeftOut;
      }
    }
    if (states[i] < 0 && (ignored >> i & 1u) != 0) states[i] = kMatchLeftOut;
    foreground += states[i] >= 0 && first + i < args.num_anchors;
  }
  const int64_t left = args.num_anchors - first;
  store_states(args.matched + image.image * args.num_anchors + first, states, left);
  if (args.labels == nullptr) return;
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) {
    if (states[i] >= 0) states[i] = label_of(args, image, states[i]);
  }
  store_states(args.labels + image.image * args.num_anchors + first, states, left);
  foreground = warp_sum(foreground);
  if (lane == 0 && foreground > 0) atomicAdd(args.foreground + image.image, foreground);
}

// The first row of highest IoU with one anchor, which all lanes have.
template <typename T>
__device__ int best_row_of(const ImageBoxes<T>& image, const Box<T>& anchor, T area, int lane) {
  T best_iou = T(-1);
  int best_row = 0;
  for (int row = lane; row < image.count; row += kWarpLanes) {
    const Box<T> gt = load_gt(image.boxes, row);
    if (!is_proper_box(gt) || (image.ignore != nullptr && image.ignore[row])) continue;
    const T iou = match_iou(gt, box_area(gt), anchor, area);
    if (iou > best_iou) {
      best_iou = iou;
      best_row = row;
    }
  }
  // Of the lanes that have the highest IoU (bits of -1 become 0, which is below those of +0 plus one), the lowest row.
  const iou_bits_t<T> bits = best_iou < T(0) ? 0 : bit_cast<iou_bits_t<T>>(best_iou) + 1;
  const iou_bits_t<T> most = warp_max(bits);
  const uint32_t from_last = bits == most ? 0xffffffffu - static_cast<uint32_t>(best_row) : 0u;
  return static_cast<int>(0xffffffffu - warp_max(from_last));
}

template <typename T>
__global__ void __launch_bounds__(kMatchThreads, kMatchMinBlocks<T>)
    anchor_restore_kernel(const __grid_constant__ MatchKernelArgs<T> args) {
  int index;
  int tile;
  if (!find_tile(args, index, tile)) return;  // the whole warp
  const ImageBoxes<T> image = image_boxes(args, index);
  const int64_t set = args.per_image ? image.image : 0;
  const TileBounds<T> bounds = args.bounds[set * args.tiles + tile];
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t first = static_cast<int64_t>(tile) * kMatchTile + lane * kAnchorsPerLane;
  const bool mmdet = args.policy == MatchPolicy::kMmdet;

  LaneAnchors<T> anchors;
  bool loaded = false;
  int restored[kAnchorsPerLane];  // the last row that restores the anchor, or -1
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) restored[i] = -1;
  int restores_all = -1;  // the last row of a box that overlaps no anchor and counts as the best of all

  for (int start = 0; start < image.count; start += kWarpLanes) {
    const int row = start + lane;
    Box<T> gt = {T(0), T(0), T(0), T(0)};
    bool takes_part = false;
    T best = T(0);
    if (row < image.count) {
      gt = load_gt(image.boxes, row);
      best = bit_cast<T>(image.best[row]);
      takes_part = is_proper_box(gt) && (image.ignore == nullptr || !image.ignore[row]);
    }
    const bool is_enough = takes_part && (!mmdet || best >= args.min_pos_iou);
    const unsigned of_all =
        __ballot_sync(kWholeWarp, is_enough && best == T(0) && args.policy != MatchPolicy::kSafe);
    if (of_all != 0) restores_all = start + last_bit(of_all);
    const bool matters = is_enough && best > T(0) && may_reach(bounds, gt, box_area(gt), best);
    unsigned listed = __ballot_sync(kWholeWarp, matters);
    if (listed == 0) continue;
    if (!loaded) anchors = load_anchors(args, set, first);
    loaded = true;
    for (; listed != 0; listed &= listed - 1) {
      const int source = first_bit(listed);
      const Box<T> box = shuffle_box(gt, source);
      const T box_best = __shfl_sync(kWholeWarp, best, source);
      const T gt_area = box_area(box);
#pragma unroll
      for (int i = 0; i < kAnchorsPerLane; ++i) {
        const T iou = match_iou(box, gt_area, anchors.boxes[i], anchors.areas[i]);
        restored[i] = iou == box_best ? start + source : restored[i];
      }
    }
  }
  if (!loaded && restores_all < 0) return;  // the whole warp
  if (!loaded) anchors = load_anchors(args, set, first);

  int grown = 0;
#pragma unroll
  for (int i = 0; i < kAnchorsPerLane; ++i) {
    const int by = restored[i] > restores_all ? restored[i] : restores_all;
    const bool exists = first + i < args.num_anchors;
    int32_t* matched = args.matched + image.image * args.num_anchors + first + i;
    const bool was_foreground = exists && by >= 0 && *matched >= 0;
    // An anchor that is foreground has its own best box already.
    const bool changes = exists && by >= 0 && (mmdet || !was_foreground);
    int chosen = by;
    if (!mmdet) {
      for (unsigned left = __ballot_sync(kWholeWarp, changes); left != 0; left &= left - 1) {
        const int source = first_bit(left);
        const Box<T> anchor = shuffle_box(anchors.boxes[i], source);
        const int own = best_row_of(image, anchor, box_area(anchor), lane);
        if (lane == source) chosen = own;
      }
    }
    if (changes) {
      *matched = chosen;
      if (args.labels != nullptr) {
        args.labels[image.image * args.num_anchors + first + i] = label_of(args, image, chosen);
      }
      grown += !was_foreground;
    }
  }
  if (args.foreground == nullptr) return;
  grown = warp_sum(grown);
  if (lane == 0 && grown > 0) atomicAdd(args.foreground + image.image, grown);
}

}  // namespace retinanet_ext
