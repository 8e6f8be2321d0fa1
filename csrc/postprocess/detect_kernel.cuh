// Post-processing on CUDA: threshold, top-k of each level, decode, clip, suppression, in four or five launches and without a
// synchronisation. A candidate is a key (nms_math.h): its logit and its flat index anchor * K + class in the image, unique,
// so that neither ties nor the order of threads decide anything.
//
//   detect_filter_kernel  every logit once. A block has a part of one level of one image, and a buffer for its candidates;
//                         when that is full, it keeps the best of it, k at least, and looks at no logit below them again.
//   detect_select_kernel  a block for each 64 parts of a level and image: their best; where there are more, another launch
//                         for the best of these. Last, the k best of the level and image, sorted.
//   detect_rank_kernel    a thread a candidate: its rank among all levels, its box
//   detect_walk_kernel    a block an image: suppression from the best to the worst, until D are kept (nms_walk.cuh)
//
// Bytes  Each logit once, by 16-byte loads, four of a thread in flight; the rest follows the candidates: 8 (float64: 16) a
//        key, three times; 28 a box. Logits are compared, not scores: a vector of 8 takes about 40 issue slots of the 113
//        that pass in the time of its load (H200), so the bound is memory.
// Parts  A part's buffer holds max(2k, k + 1024) keys, or all of its logits where these are fewer. The buffers take 64 MB
//        and one buffer a level and image more at most (detect_plan.h), however many logits there are.
#pragma once

#include <limits>

#include "common/box_math.h"
#include "cuda/block_select.cuh"
#include "cuda/block_sort.cuh"
#include "cuda/vec.cuh"
#include "nms/nms_walk.cuh"
#include "postprocess/detect_math.h"
#include "postprocess/detect_plan.h"

namespace retinanet_ext {

constexpr int kDetectMaxLevels = 32;  // their tables are kernel parameters
constexpr int kDetectMaxImages = 64;  // of a launch, where image sizes are kernel parameters
constexpr int kFilterThreads = 256;
constexpr int kFilterVectors = 4;    // of a thread in flight
constexpr int kFilterBlocks = 4;     // a multiprocessor: 64 registers a thread, 64 KB in flight
template <typename S>
constexpr int kFilterMinBlocks = sizeof(S) == sizeof(double) ? kFilterBlocks / 2 : kFilterBlocks;
template <typename S>
constexpr int kFilterTile = kFilterThreads * kFilterVectors * kVectorWidth<S>;

struct FilterLevel {
  const void* logits;
  int64_t image_stride;  // elements
  int64_t size;          // logits of an image
  uint32_t first_index;  // of the level, among the candidates of an image
  uint32_t anchors;      // A, of planes
  uint32_t cells;        // H*W, of planes
  bool planes;           // [A, K, H*W]; otherwise flat indices lie in order
  int parts;             // of an image
  int first_part;        // of the level
  int64_t capacity;      // of a part's buffer
  int64_t first_slot;    // of the level's buffers
};

template <typename T>
struct FilterArgs {
  FilterLevel levels[kDetectMaxLevels];
  int num_levels;
  int64_t part;         // logits, a multiple of the tile
  T smallest;           // logit that is a candidate; NaN where none is
  uint32_t classes;     // K
  int64_t topk;         // at least 1
  rank_key_t<T>* candidates;  // buffers, part by part
  uint32_t* counts;           // [parts]
};
static_assert(sizeof(FilterArgs<double>) <= 4096, "what every GPU takes as parameters of a kernel");

__device__ __forceinline__ uint32_t flat_index(const FilterLevel& level, uint32_t classes, int64_t position) {
  uint32_t index = static_cast<uint32_t>(position);
  if (level.planes) {
    const uint32_t plane = index / level.cells;
    const uint32_t cell = index - plane * level.cells;
    const uint32_t anchor = plane / classes;
    index = (cell * level.anchors + anchor) * classes + (plane - anchor * classes);
  }
  return level.first_index + index;
}

template <typename S>
__global__ void __launch_bounds__(kFilterThreads, kFilterMinBlocks<S>)
    detect_filter_kernel(const __grid_constant__ FilterArgs<compute_t<S>> args) {
  using T = compute_t<S>;
  using Key = rank_key_t<T>;
  constexpr int kWidth = kVectorWidth<S>;
  static_assert(kWidth * kFilterVectors <= 32, "a thread's logits are the bits of a word");
  RNX_SHARED(uint32_t, fill, 1);  // keys in the buffer; beyond its capacity, those that found no room
  RNX_SHARED(uint32_t, kept, 1);
  const int block = static_cast<int>(blockIdx.x);
  int index = 0;
  while (index + 1 < args.num_levels && block >= args.levels[index + 1].first_part) ++index;
  const FilterLevel& level = args.levels[index];
  const int part = block - level.first_part;
  const int image = part / level.parts;
  const S* const logits = static_cast<const S*>(level.logits) + image * level.image_stride;
  const int64_t begin = static_cast<int64_t>(part - image * level.parts) * args.part;
  const int64_t end = level.size - begin < args.part ? level.size : begin + args.part;
  Key* const candidates = args.candidates + level.first_slot + part * level.capacity;
  if (threadIdx.x == 0) fill[0] = 0;  // each tile has a vote, which is a barrier, before its keys

  // Whole vectors begin at 16-byte boundaries; the first and the last of the part may be cut.
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(logits + begin) % kVectorBytes / sizeof(S));
  const auto position_of = [&](int64_t tile, int vector) {
    return tile + (vector * kFilterThreads + static_cast<int>(threadIdx.x)) * kWidth;
  };
  T cut = args.smallest;
  Key bound = ~Key(0);
  for (int64_t tile = begin - skew; tile < end; tile += kFilterTile<S>) {
    Vec<S> vectors[kFilterVectors];
#pragma unroll
    for (int v = 0; v < kFilterVectors; ++v) {
      const int64_t position = position_of(tile, v);
      if (position >= begin && position + kWidth <= end) vectors[v] = load_vector(logits + position);
    }
    uint32_t waiting = 0;  // a bit for each of the thread's logits that is to be added
#pragma unroll
    for (int v = 0; v < kFilterVectors; ++v) {
      const int64_t position = position_of(tile, v);
      if (position >= begin && position + kWidth <= end) {
        T values[kWidth];
        unpack(vectors[v], values);
        T most = -std::numeric_limits<T>::infinity();
#pragma unroll
        for (int i = 0; i < kWidth; ++i) most = larger(values[i], most);
        if (most >= cut) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) waiting |= static_cast<uint32_t>(values[i] >= cut) << (v * kWidth + i);
        }
      } else {
        // Either end of the part.
        for (int i = 0; i < kWidth; ++i) {
          const bool exists = position + i >= begin && position + i < end;
          if (exists && load_value(logits[position + i]) >= cut) waiting |= 1u << (v * kWidth + i);
        }
      }
    }
    if (__syncthreads_or(waiting != 0) == 0) continue;

    const auto key_of = [&](int bit) {
      const int64_t position = position_of(tile, bit / kWidth) + bit % kWidth;
      return rank_key(static_cast<T>(load_value(logits[position])), flat_index(level, args.classes, position));
    };
    // A logit that equals the cut may still be worse by its index.
    const auto drop_worse = [&] {
      for (uint32_t left = waiting; left != 0; left &= left - 1) {
        if (key_of(first_bit(left)) > bound) waiting &= ~(left & (0u - left));
      }
    };
    if (bound != ~Key(0)) drop_worse();
    while (true) {
      if (waiting != 0) {
        uint32_t slot = atomicAdd(fill, static_cast<uint32_t>(count_bits(waiting)));
        for (; waiting != 0 && slot < level.capacity; ++slot, waiting &= waiting - 1) {
          candidates[slot] = key_of(first_bit(waiting));
        }
      }
      if (__syncthreads_or(waiting != 0) == 0) break;
      // The buffer is full: its best stay, and make room for half as many as there is beyond the k best.
      if (threadIdx.x == 0) kept[0] = 0;
      const int64_t room = args.topk + (level.capacity - args.topk) / 2;
      bound = bound_of_smallest<kFilterThreads, RankKey<T>::kBits, Key>(args.topk, room, [&](const auto& add) {
        for (int64_t i = threadIdx.x; i < level.capacity; i += kFilterThreads) add(candidates[i]);
      });
      compact_keys<kFilterThreads>(candidates, level.capacity, bound, kept);
      if (threadIdx.x == 0) fill[0] = kept[0];
      __syncthreads();  // there is room again
      cut = lowest_logit<T>(bound);
      drop_worse();
    }
  }
  if (threadIdx.x == 0) args.counts[block] = fill[0];
}

struct SelectLevel {
  int lists;          // of an image: the parts' buffers, or what an earlier launch selected
  int first_list;     // of the level
  int64_t capacity;   // keys of a list
  int64_t first_slot;  // of the level's lists, in keys
  int groups;         // of an image's lists: a block each
  int first_group;    // of the level
  int64_t most;       // keys that are wanted of the level and image
  int64_t room;       // keys that a group's result may hold, `most` at least
  int64_t first;      // of the level's results: sorted ones lie by image, others by group
};

template <typename T>
struct SelectArgs {
  SelectLevel levels[kDetectMaxLevels];
  int num_levels;
  const rank_key_t<T>* candidates;  // lists
  const uint32_t* counts;           // of keys in each list
  bool sorted;                      // results are an image's, sorted; each level has one group
  int64_t image_room;               // sorted: of an image's results
  rank_key_t<T>* selected;
  rank_key_t<T>* scratch;     // as much; sorted alone, may be null where no level's `most` is above kSortChunk
  uint32_t* selected_counts;  // of each group; sorted: [B, levels]
};
static_assert(sizeof(SelectArgs<double>) <= 4096, "what every GPU takes as parameters of a kernel");

constexpr int kSelectLoads = 4;  // keys of a thread in flight

// Calls take(key) for every key of some lists, from counts and keys of the first on. A warp has 32 lists at a time, one
// behind the other, and its lanes neighbouring keys.
template <typename Key, typename Take>
__device__ __forceinline__ void for_each_key(const Key* keys, int64_t capacity, const uint32_t* counts, int lists,
                                             const Take& take) {
  const int lane = threadIdx.x % kWarpLanes;
  for (int base = threadIdx.x - lane; base < lists; base += kSortThreads) {
    const uint32_t count = base + lane < lists ? counts[base + lane] : 0;
    const uint32_t before = warp_sum_before(count);
    const uint32_t total = __shfl_sync(kWholeWarp, before + count, kWarpLanes - 1);
    for (uint32_t first = 0; first < total; first += kSelectLoads * kWarpLanes) {
      Key loaded[kSelectLoads];
#pragma unroll
      for (int i = 0; i < kSelectLoads; ++i) {
        const uint32_t place = first + i * kWarpLanes + lane;
        // The last list that begins at or before the place.
        int list = 0;
        for (int step = kWarpLanes / 2; step > 0; step /= 2) {
          if (__shfl_sync(kWholeWarp, before, list + step) <= place) list += step;
        }
        const uint32_t list_begin = __shfl_sync(kWholeWarp, before, list);
        if (place < total) loaded[i] = keys[(base + list) * capacity + (place - list_begin)];
      }
#pragma unroll
      for (int i = 0; i < kSelectLoads; ++i) {
        if (first + i * kWarpLanes + lane < total) take(loaded[i]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSortThreads, 2) detect_select_kernel(const __grid_constant__ SelectArgs<T> args) {
  using Key = rank_key_t<T>;
  RNX_SHARED(Key, chunk, kSortChunk);
  RNX_SHARED(uint32_t, total, 1);
  RNX_SHARED(uint32_t, fill, 1);
  const int block = static_cast<int>(blockIdx.x);
  int index = 0;
  while (index + 1 < args.num_levels && block >= args.levels[index + 1].first_group) ++index;
  const SelectLevel& level = args.levels[index];
  const int group = block - level.first_group;
  const int image = group / level.groups;
  // The group's lists, among the image's.
  const int first = (group - image * level.groups) * static_cast<int>(kSelectLists);
  const int after = first + static_cast<int>(kSelectLists);
  const int last = args.sorted || after > level.lists ? level.lists : after;
  const int64_t first_list = static_cast<int64_t>(image) * level.lists + first;
  const uint32_t* const counts = args.counts + level.first_list + first_list;
  const Key* const candidates = args.candidates + level.first_slot + first_list * level.capacity;
  if (threadIdx.x == 0) {
    total[0] = 0;
    fill[0] = 0;
  }
  __syncthreads();  // nothing is counted yet
  for (int list = threadIdx.x; list < last - first; list += kSortThreads) {
    const uint32_t count = counts[list];
    if (count > 0) atomicAdd(total, count);
  }
  __syncthreads();  // all lists are counted

  const auto for_each = [&](const auto& take) { for_each_key(candidates, level.capacity, counts, last - first, take); };
  const bool in_chunk = args.sorted && level.most <= kSortChunk;
  const int64_t room = in_chunk ? kSortChunk : level.room;
  Key bound = ~Key(0);
  if (total[0] > room) bound = bound_of_smallest<kSortThreads, RankKey<T>::kBits, Key>(level.most, room, for_each);
  Key* const selected = args.selected + (args.sorted ? image * args.image_room + level.first
                                                     : level.first + group * level.room);
  Key* const gathered = in_chunk ? chunk : selected;
  for_each([&](Key key) {
    if (key <= bound) gathered[atomicAdd(fill, 1u)] = key;
  });
  __syncthreads();  // the selected keys are gathered
  const int64_t found = fill[0];
  const int64_t count = found < level.most ? found : level.most;
  if (in_chunk) {
    const int size = padded_size(static_cast<int>(found));
    for (int i = static_cast<int>(found) + threadIdx.x; i < size; i += kSortThreads) chunk[i] = ~Key(0);
    __syncthreads();  // padding stands behind them
    sort_chunk(chunk, size);
    for (int i = threadIdx.x; i < count; i += kSortThreads) selected[i] = chunk[i];
  } else if (args.sorted) {
    sort_keys(selected, args.scratch + image * args.image_room + level.first, count, chunk);
  }
  if (threadIdx.x != 0) return;
  if (args.sorted) {
    args.selected_counts[static_cast<int64_t>(image) * args.num_levels + index] = static_cast<uint32_t>(count);
  } else {
    args.selected_counts[block] = static_cast<uint32_t>(found);
  }
}

enum class DeltaType { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct RankLevel {
  const void* deltas;
  int64_t image_stride;  // elements from one image to the next, and so on
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t first_anchor;  // of the level, among the N of an image
  int64_t first;         // of the level, among an image's selected candidates
  int64_t most;          // of them
  int anchors;           // A: anchors a cell
  int width;
};

// (height, width) of each image.
template <typename T>
struct ImageSizes {
  const T* tensor;               // [B, 2], or null: the list
  T list[2 * kDetectMaxImages];  // of the launch's images
};

// L: of logits and scores; T: of boxes.
template <typename L, typename T>
struct RankArgs {
  RankLevel levels[kDetectMaxLevels];
  int num_levels;
  DeltaType delta_type;
  bool clip;
  int first_image;            // of the launch
  int blocks_per_image;
  uint32_t classes;           // K
  int64_t room;               // of an image's candidates
  const rank_key_t<L>* selected;   // [B, room]
  const uint32_t* selected_counts;  // [B, levels]
  const T* anchors;                // [N, 4] or [B, N, 4]
  int64_t anchor_image_stride;     // 0 where all images share them
  ImageSizes<T> sizes;
  rank_key_t<L>* keys;  // [B, room], ranked, as what follows
  Box<T>* boxes;
  int32_t* labels;
};
static_assert(sizeof(RankArgs<double, double>) <= 4096, "what every GPU takes as parameters of a kernel");

template <typename T>
__device__ __forceinline__ T load_delta(const void* deltas, DeltaType type, int64_t offset) {
  switch (type) {
    case DeltaType::kFloat64:
      return static_cast<T>(static_cast<const double*>(deltas)[offset]);
    case DeltaType::kFloat32:
      return static_cast<T>(static_cast<const float*>(deltas)[offset]);
    case DeltaType::kFloat16:
      return static_cast<T>(load_value(static_cast<const Float16*>(deltas)[offset]));
    default:
      return static_cast<T>(load_value(static_cast<const BFloat16*>(deltas)[offset]));
  }
}

template <typename T>
__device__ __forceinline__ Box<T> clip_to_image(const ImageSizes<T>& sizes, int first_image, int image,
                                                const Box<T>& box) {
  const T* size = sizes.tensor != nullptr ? sizes.tensor + 2 * static_cast<int64_t>(image)
                                          : sizes.list + 2 * (image - first_image);
  return clip_box(box, size[0], size[1]);
}

template <typename L, typename T>
__global__ void __launch_bounds__(kSortThreads) detect_rank_kernel(const __grid_constant__ RankArgs<L, T> args) {
  const int of_launch = static_cast<int>(blockIdx.x) / args.blocks_per_image;
  const int image = args.first_image + of_launch;
  const int64_t place = (static_cast<int64_t>(blockIdx.x) - static_cast<int64_t>(of_launch) * args.blocks_per_image) *
                            kSortThreads + threadIdx.x;
  int index = 0;
  while (index + 1 < args.num_levels && place >= args.levels[index + 1].first) ++index;
  const RankLevel& level = args.levels[index];
  const uint32_t* const counts = args.selected_counts + static_cast<int64_t>(image) * args.num_levels;
  int64_t rank = place - level.first;
  if (rank >= counts[index]) return;  // so do all places behind the last level's
  const int64_t first = image * args.room;
  const rank_key_t<L> key = args.selected[first + place];
  for (int other = 0; other < args.num_levels; ++other) {
    if (other != index) rank += count_below(args.selected + first + args.levels[other].first, counts[other], key);
  }

  const uint32_t anchor = index_of(key) / args.classes;
  const int64_t row = anchor - level.first_anchor;
  const int64_t cell = row / level.anchors;
  const int64_t offset = image * level.image_stride + 4 * (row - cell * level.anchors) * level.channel_stride +
                         cell / level.width * level.row_stride + cell % level.width * level.column_stride;
  T deltas[4];
  T corners[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    deltas[i] = load_delta<T>(level.deltas, args.delta_type, offset + i * level.channel_stride);
    corners[i] = args.anchors[image * args.anchor_image_stride + 4 * static_cast<int64_t>(anchor) + i];
  }
  Box<T> box = decode_box<T>({deltas[0], deltas[1], deltas[2], deltas[3]},
                             {corners[0], corners[1], corners[2], corners[3]}, {T(1), T(1), T(1), T(1)},
                             static_cast<T>(kDeltaClip));
  if (args.clip) box = clip_to_image(args.sizes, args.first_image, image, box);
  args.keys[first + rank] = key;
  args.boxes[first + rank] = box;
  args.labels[first + rank] = static_cast<int32_t>(index_of(key) - anchor * args.classes);
}

template <typename L, typename T>
struct DetectWalkArgs {
  const rank_key_t<L>* keys;       // [B, room], ranked, as what follows
  const Box<T>* boxes;
  const int32_t* labels;
  const uint32_t* selected_counts;  // [B, levels]
  int num_levels;
  int first_image;  // of the launch
  int64_t room;     // of an image's candidates
  T threshold;
  int64_t most;  // D
  bool clip;     // what is kept
  ImageSizes<T> sizes;
  Box<T>* kept_boxes;    // [B, D], before clipping
  int32_t* kept_labels;  // [B, D]
  Box<T>* out_boxes;     // [B, D], as what follows
  L* out_scores;
  int64_t* out_labels;
  int64_t* out_indices;
  int32_t* out_counts;  // [B]
};

template <typename L, typename T>
__global__ void __launch_bounds__(kWalkThreads, 1) detect_walk_kernel(const __grid_constant__ DetectWalkArgs<L, T> args) {
  const int image = args.first_image + static_cast<int>(blockIdx.x);
  const int64_t first = image * args.room;
  const int64_t out = image * args.most;
  int64_t count = 0;
  for (int level = 0; level < args.num_levels; ++level) {
    count += args.selected_counts[static_cast<int64_t>(image) * args.num_levels + level];
  }
  const int64_t kept = walk_ranked<T, int32_t>(
      {args.boxes + first, args.labels + first, count}, {args.kept_boxes + out, args.kept_labels + out},
      args.threshold, args.most, [&](int64_t slot, int64_t position) {
        const rank_key_t<L> key = args.keys[first + position];
        const Box<T> box = args.boxes[first + position];
        args.out_boxes[out + slot] = args.clip ? clip_to_image(args.sizes, args.first_image, image, box) : box;
        args.out_scores[out + slot] = score_of(score_of_key<L>(key));
        args.out_labels[out + slot] = args.labels[first + position];
        args.out_indices[out + slot] = index_of(key);
      });
  for (int64_t slot = kept + threadIdx.x; slot < args.most; slot += kWalkThreads) {
    args.out_boxes[out + slot] = {T(0), T(0), T(0), T(0)};
    args.out_scores[out + slot] = L(0);
    args.out_labels[out + slot] = -1;
    args.out_indices[out + slot] = -1;
  }
  if (threadIdx.x == 0) args.out_counts[image] = static_cast<int32_t>(kept);
}

}  // namespace retinanet_ext
