// Post-processing on CUDA: threshold, top-k of each level, decode, clip, suppression, in four launches and without a
// synchronisation. A candidate is a key (nms_math.h): its logit and its flat index anchor * K + class in the image, unique,
// so that neither ties nor the order of threads decide anything.
//
//   detect_filter_kernel  every logit once. A block has a part of one level of one image, and a buffer for its candidates;
//                         when that is full, it keeps the k best of it, and no logit below these is looked at again.
//   detect_select_kernel  a block a level and image: the k best of all its parts, sorted
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
    T most = -std::numeric_limits<T>::infinity();
    bool some = false;
#pragma unroll
    for (int v = 0; v < kFilterVectors; ++v) {
      const int64_t position = position_of(tile, v);
      if (position >= begin && position + kWidth <= end) {
        T values[kWidth];
        unpack(vectors[v], values);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) most = larger(values[i], most);
      } else {
        // Either end: looked at one by one below.
        some |= position < end;
      }
    }
    some |= most >= cut;
    if (__syncthreads_or(some) == 0) continue;

    uint32_t waiting = 0;  // a bit for each of the thread's logits that is to be added
    for (int i = 0; some && i < kFilterVectors * kWidth; ++i) {
      const int64_t position = position_of(tile, i / kWidth) + i % kWidth;
      if (position < begin || position >= end) continue;
      const T logit = load_value(logits[position]);
      if (!(logit >= cut)) continue;
      if (rank_key(logit, flat_index(level, args.classes, position)) <= bound) waiting |= 1u << i;
    }
    while (true) {
      if (waiting != 0) {
        uint32_t slot = atomicAdd(fill, static_cast<uint32_t>(count_bits(waiting)));
        for (; waiting != 0 && slot < level.capacity; ++slot, waiting &= waiting - 1) {
          const int i = first_bit(waiting);
          const int64_t position = position_of(tile, i / kWidth) + i % kWidth;
          candidates[slot] = rank_key(load_value(logits[position]), flat_index(level, args.classes, position));
        }
      }
      if (__syncthreads_or(waiting != 0) == 0) break;
      // The buffer is full: its k best stay.
      if (threadIdx.x == 0) kept[0] = 0;
      bound = bound_of_smallest<kFilterThreads, RankKey<T>::kBits, Key>(args.topk, [&](const auto& add) {
        for (int64_t i = threadIdx.x; i < level.capacity; i += kFilterThreads) add(candidates[i]);
      });
      compact_keys<kFilterThreads>(candidates, level.capacity, bound, kept);
      if (threadIdx.x == 0) fill[0] = kept[0];
      __syncthreads();  // there is room again
      cut = lowest_logit<T>(bound);
      for (uint32_t left = waiting; left != 0; left &= left - 1) {
        const int i = first_bit(left);
        const int64_t position = position_of(tile, i / kWidth) + i % kWidth;
        const Key key = rank_key(static_cast<T>(load_value(logits[position])), flat_index(level, args.classes, position));
        if (key > bound) waiting &= ~(1u << i);
      }
    }
  }
  if (threadIdx.x == 0) args.counts[block] = fill[0];
}

struct SelectLevel {
  int parts;  // of an image, as what follows the filter's
  int first_part;
  int64_t capacity;
  int64_t first_slot;
  int64_t first;  // of the level, among an image's selected candidates
  int64_t most;   // of them
};

template <typename T>
struct SelectArgs {
  SelectLevel levels[kDetectMaxLevels];
  int num_levels;
  const rank_key_t<T>* candidates;  // the filter's buffers
  const uint32_t* counts;           // [parts]
  int64_t room;             // of an image's selected candidates
  rank_key_t<T>* selected;  // [B, room]
  rank_key_t<T>* scratch;   // [B, room]; may be null where no level's `most` is above kSortChunk
  int32_t* selected_counts;  // [B, levels]
};

template <typename T>
__global__ void __launch_bounds__(kSortThreads) detect_select_kernel(const __grid_constant__ SelectArgs<T> args) {
  using Key = rank_key_t<T>;
  RNX_SHARED(Key, chunk, kSortChunk);
  RNX_SHARED(uint32_t, total, 1);
  RNX_SHARED(uint32_t, fill, 1);
  const int image = static_cast<int>(blockIdx.x) / args.num_levels;
  const SelectLevel& level = args.levels[static_cast<int>(blockIdx.x) - image * args.num_levels];
  const uint32_t* const counts = args.counts + level.first_part + static_cast<int64_t>(image) * level.parts;
  const Key* const candidates =
      args.candidates + level.first_slot + static_cast<int64_t>(image) * level.parts * level.capacity;
  const int lane = threadIdx.x % kWarpLanes;
  if (threadIdx.x == 0) {
    total[0] = 0;
    fill[0] = 0;
  }
  __syncthreads();  // nothing is counted yet
  for (int part = threadIdx.x; part < level.parts; part += kSortThreads) {
    const uint32_t count = counts[part];
    if (count > 0) atomicAdd(total, count);
  }
  __syncthreads();  // all parts are counted

  // A warp has 32 parts at a time, and looks only into those that found something.
  const auto for_each = [&](const auto& take) {
    for (int base = threadIdx.x - lane; base < level.parts; base += kSortThreads) {
      const int count = base + lane < level.parts ? static_cast<int>(counts[base + lane]) : 0;
      for (unsigned listed = __ballot_sync(kWholeWarp, count > 0); listed != 0; listed &= listed - 1) {
        const int source = first_bit(listed);
        const int size = __shfl_sync(kWholeWarp, count, source);
        const Key* keys = candidates + (base + source) * level.capacity;
        for (int i = lane; i < size; i += kWarpLanes) take(keys[i]);
      }
    }
  };
  Key bound = ~Key(0);
  if (total[0] > level.most) bound = bound_of_smallest<kSortThreads, RankKey<T>::kBits, Key>(level.most, for_each);
  const int64_t count = total[0] < level.most ? total[0] : level.most;
  Key* const selected = args.selected + image * args.room + level.first;
  Key* const gathered = level.most <= kSortChunk ? chunk : selected;
  for_each([&](Key key) {
    if (key <= bound) gathered[atomicAdd(fill, 1u)] = key;
  });
  if (level.most <= kSortChunk) {
    const int size = padded_size(static_cast<int>(count));
    for (int i = static_cast<int>(count) + threadIdx.x; i < size; i += kSortThreads) chunk[i] = ~Key(0);
    __syncthreads();  // the selected keys, and padding behind them
    sort_chunk(chunk, size);
    for (int i = threadIdx.x; i < count; i += kSortThreads) selected[i] = chunk[i];
  } else {
    __syncthreads();  // the selected keys are in memory
    sort_keys(selected, args.scratch + image * args.room + level.first, count, chunk);
  }
  if (threadIdx.x == 0) args.selected_counts[blockIdx.x] = static_cast<int32_t>(count);
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
  const int32_t* selected_counts;  // [B, levels]
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
  const int32_t* const counts = args.selected_counts + static_cast<int64_t>(image) * args.num_levels;
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
  const int32_t* selected_counts;  // [B, levels]
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
