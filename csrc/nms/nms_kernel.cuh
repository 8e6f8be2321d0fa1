// Non-maximum suppression on CUDA. Keys are ranked first: a key is a score and a row (nms_math.h), unique, so that ties
// and the order of threads decide nothing.
//
//   nms_sort_kernel    a block sorts 2048 keys of an image in shared memory
//   nms_merge_kernel   doubles the sorted runs: each key looks up its rank in the run beside its own
//   nms_gather_kernel  boxes and labels in that order
//
// batched_nms_padded, one block an image:
//   nms_walk_kernel    from the best to the worst, until max_detections are kept (nms_walk.cuh)
//
// nms and batched_nms, where everything that is kept counts, by bands of 8192 ranked boxes:
//   nms_mask_kernel    all pairs of a band, by tiles of 64 by 64: which later boxes each box would suppress, a bit each
//   nms_settle_kernel  one block goes through the band, 64 boxes at a time, and appends the rows that are kept
//   nms_sweep_kernel   every box after the band against the band's kept ones
//
// Bytes  Keys 8 (float64: 16) a box, written and read once a pass; a band's masks 8 MB, in L2; what is kept 20 or 24 a
//        box. Bound: 21 issue slots a pair, 56 where it takes the division, 2 of other labels; few boxes: the launches.
#pragma once

#include "cuda/block_sort.cuh"
#include "nms/nms_walk.cuh"

namespace retinanet_ext {

// Ranked keys of every image lie in [B, N]; of an image's, the first `valid` count.
template <typename T>
struct NmsKeysArgs {
  const T* scores;           // [B, N]
  const int32_t* num_valid;  // [B], or null
  int64_t num_boxes;         // N
  int64_t batch;             // B
};

// How many of an image's rows count: what num_valid says, but never a row that is not there.
__device__ __forceinline__ int64_t valid_rows(const int32_t* num_valid, int64_t num_boxes, int64_t image) {
  if (num_valid == nullptr) return num_boxes;
  const int64_t valid = num_valid[image];
  return valid < 0 ? 0 : (valid > num_boxes ? num_boxes : valid);
}

template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    nms_sort_kernel(NmsKeysArgs<T> args, int64_t chunks, rank_key_t<T>* keys) {
  RNX_SHARED(rank_key_t<T>, chunk, kSortChunk);
  const int64_t image = blockIdx.x / chunks;
  const int64_t first = (blockIdx.x - image * chunks) * kSortChunk;
  const int64_t valid = valid_rows(args.num_valid, args.num_boxes, image);
  if (first >= valid) return;  // the whole block
  const int count = valid - first < kSortChunk ? static_cast<int>(valid - first) : kSortChunk;
  const int size = padded_size(count);
  for (int i = threadIdx.x; i < size; i += kSortThreads) {
    const int64_t row = first + i;
    chunk[i] = i < count ? rank_key(args.scores[image * args.num_boxes + row], static_cast<uint32_t>(row))
                         : ~rank_key_t<T>(0);
  }
  __syncthreads();  // all keys are there
  sort_chunk(chunk, size);
  for (int i = threadIdx.x; i < count; i += kSortThreads) keys[image * args.num_boxes + first + i] = chunk[i];
}

// A thread a key. `run`: how many keys a sorted run has.
template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    nms_merge_kernel(NmsKeysArgs<T> args, int64_t run, const rank_key_t<T>* keys, rank_key_t<T>* merged) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  const int64_t image = thread / args.num_boxes;
  const int64_t position = thread - image * args.num_boxes;
  if (image >= args.batch) return;
  const int64_t valid = valid_rows(args.num_valid, args.num_boxes, image);
  if (position >= valid) return;
  const int64_t first = image * args.num_boxes;
  merged[first + merged_position(keys + first, valid, run, position)] = keys[thread];
}

template <typename T>
struct NmsGatherArgs {
  const rank_key_t<T>* keys;  // [B, N], ranked
  const Box<T>* boxes;        // [B, N]
  const int64_t* labels;      // [B, N], or null: all of one label
  Box<T>* ranked_boxes;       // [B, N]
  int64_t* ranked_labels;     // [B, N]
};

template <typename T>
__global__ void __launch_bounds__(kSortThreads) nms_gather_kernel(NmsKeysArgs<T> args, NmsGatherArgs<T> gather) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  const int64_t image = thread / args.num_boxes;
  if (image >= args.batch) return;
  if (thread - image * args.num_boxes >= valid_rows(args.num_valid, args.num_boxes, image)) return;
  const int64_t row = image * args.num_boxes + index_of(gather.keys[thread]);
  gather.ranked_boxes[thread] = gather.boxes[row];
  gather.ranked_labels[thread] = gather.labels == nullptr ? 0 : gather.labels[row];
}

template <typename T>
struct NmsWalkArgs {
  const rank_key_t<T>* keys;     // [B, N], ranked
  const Box<T>* ranked_boxes;    // [B, N]
  const int64_t* ranked_labels;  // [B, N]
  Box<T>* kept_boxes;            // [B, D]
  int64_t* kept_labels;          // [B, D]
  T threshold;
  int64_t most;      // D
  int64_t* indices;  // [B, D]
  int32_t* counts;   // [B]
};

template <typename T>
__global__ void __launch_bounds__(kWalkThreads, 1) nms_walk_kernel(NmsKeysArgs<T> args, NmsWalkArgs<T> walk) {
  const int64_t image = blockIdx.x;
  const int64_t first = image * args.num_boxes;
  int64_t* const indices = walk.indices + image * walk.most;
  const int64_t kept = walk_ranked<T, int64_t>(
      {walk.ranked_boxes + first, walk.ranked_labels + first, valid_rows(args.num_valid, args.num_boxes, image)},
      {walk.kept_boxes + image * walk.most, walk.kept_labels + image * walk.most}, walk.threshold, walk.most,
      [&](int64_t slot, int64_t position) { indices[slot] = index_of(walk.keys[first + position]); });
  for (int64_t slot = kept + threadIdx.x; slot < walk.most; slot += kWalkThreads) indices[slot] = -1;
  if (threadIdx.x == 0) walk.counts[image] = static_cast<int32_t>(kept);
}

constexpr int kBandTile = 2 * kWarpLanes;  // boxes whose pairs a block of the mask kernel has, and a word of a mask
constexpr int kMaskThreads = 256;
constexpr int kSettleThreads = 512;
constexpr int kSweepThreads = 256;
constexpr int64_t kBandBoxes = 8192;
constexpr int kBandWords = static_cast<int>(kBandBoxes / kBandTile);
constexpr int kSettleParts = kSettleThreads / kBandWords;  // threads that share a word of the masks
static_assert(kBandTile % kSettleParts == 0, "each has as many rows of a tile");

// One band of the ranked boxes of an image.
template <typename T>
struct NmsBandArgs {
  const rank_key_t<T>* keys;   // [N], ranked
  const Box<T>* boxes;         // [N], ranked
  const int64_t* labels;       // [N], ranked
  int64_t num_boxes;           // N
  int64_t first;               // of the band
  int64_t count;               // of its boxes, at most kBandBoxes
  T threshold;
  unsigned long long* masks;   // [count, words of the band]
  bool* suppressed;            // [N], by earlier bands: read from the second band on
  int32_t* band_kept;          // [count]: ranked positions that the band keeps
  int64_t* keep;               // [N]: rows that are kept, best first
  int64_t* counts;             // [2]: rows that are kept in all, and those that the band keeps
};

RNX_HD int band_words(int64_t count) {
  return static_cast<int>((count + kBandTile - 1) / kBandTile);
}

template <typename T>
__global__ void __launch_bounds__(kMaskThreads) nms_mask_kernel(NmsBandArgs<T> args) {
  RNX_SHARED(Box<T>, row_boxes, kBandTile);
  RNX_SHARED(int64_t, row_labels, kBandTile);
  const int words = band_words(args.count);
  const int row_tile = static_cast<int>(blockIdx.x) / words;
  const int word = static_cast<int>(blockIdx.x) - row_tile * words;
  if (word < row_tile) return;  // the whole block: its boxes come before the rows
  const int64_t first_row = static_cast<int64_t>(row_tile) * kBandTile;
  if (threadIdx.x < kBandTile && first_row + threadIdx.x < args.count) {
    row_boxes[threadIdx.x] = args.boxes[args.first + first_row + threadIdx.x];
    row_labels[threadIdx.x] = args.labels[args.first + first_row + threadIdx.x];
  }
  const int lane = threadIdx.x % kWarpLanes;
  Box<T> boxes[2];
  int64_t labels[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t column = static_cast<int64_t>(word) * kBandTile + half * kWarpLanes + lane;
    boxes[half] = column < args.count ? args.boxes[args.first + column] : Box<T>{T(0), T(0), T(0), T(0)};
    labels[half] = column < args.count ? args.labels[args.first + column] : 0;
  }
  __syncthreads();  // the rows are in shared memory
  for (int row = threadIdx.x / kWarpLanes; row < kBandTile; row += kMaskThreads / kWarpLanes) {
    if (first_row + row >= args.count) break;  // the whole warp
    const T area = box_area(row_boxes[row]);
    unsigned long long mask = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = static_cast<int64_t>(word) * kBandTile + half * kWarpLanes + lane;
      const bool would = column > first_row + row && column < args.count && labels[half] == row_labels[row] &&
                         suppresses(row_boxes[row], area, boxes[half], box_area(boxes[half]), args.threshold);
      mask |= static_cast<unsigned long long>(__ballot_sync(kWholeWarp, would)) << (half * kWarpLanes);
    }
    if (lane == 0) args.masks[(first_row + row) * words + word] = mask;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSettleThreads) nms_settle_kernel(NmsBandArgs<T> args) {
  RNX_SHARED(uint32_t, removed, 2 * kBandWords);  // a bit a box, low halves of words first
  RNX_SHARED(unsigned long long, settled, 1);
  const int words = band_words(args.count);
  const int thread = threadIdx.x;
  const int lane = thread % kWarpLanes;
  for (int64_t start = thread / kWarpLanes * kWarpLanes; start < words * kBandTile; start += kSettleThreads) {
    const int64_t box = start + lane;
    const bool out = box >= args.count || (args.first > 0 && args.suppressed[args.first + box]);
    const unsigned bits = __ballot_sync(kWholeWarp, out);
    if (lane == 0) removed[start / kWarpLanes] = bits;
  }
  int64_t kept = args.first > 0 ? args.counts[0] : 0;
  int64_t band_kept = 0;
  __syncthreads();  // what earlier bands removed is known; everyone has read the count

  for (int tile = 0; tile < words; ++tile) {
    const int64_t first_row = static_cast<int64_t>(tile) * kBandTile;
    if (thread < kWarpLanes) {
      unsigned long long alive =
          ~(static_cast<unsigned long long>(removed[2 * tile + 1]) << kWarpLanes | removed[2 * tile]);
      unsigned long long rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * kWarpLanes + lane;
        rows[half] = (alive >> row & 1u) != 0 ? args.masks[(first_row + row) * words + tile] : 0;
      }
      const unsigned long long high = __ballot_sync(kWholeWarp, rows[1] != 0);
      // In order; only those that suppress another need a step.
      for (unsigned long long pending = high << kWarpLanes | __ballot_sync(kWholeWarp, rows[0] != 0); pending != 0;) {
        const int row = first_bit(pending);
        const unsigned long long mask = __shfl_sync(kWholeWarp, row < kWarpLanes ? rows[0] : rows[1], row % kWarpLanes);
        alive &= ~mask;
        pending &= alive & (pending - 1);
      }
      if (lane == 0) settled[0] = alive;
    }
    __syncthreads();  // the tile is settled
    const unsigned long long alive = settled[0];
    if (thread < kBandTile && (alive >> thread & 1u) != 0) {
      const int before = count_bits(alive & ((1ull << thread) - 1));
      args.keep[kept + before] = index_of(args.keys[args.first + first_row + thread]);
      args.band_kept[band_kept + before] = static_cast<int32_t>(args.first + first_row + thread);
    }
    kept += count_bits(alive);
    band_kept += count_bits(alive);
    const int word = thread % kBandWords;
    if (word > tile && word < words) {
      unsigned long long mask = 0;
      for (int i = 0; i < kBandTile / kSettleParts; ++i) {
        const int row = i * kSettleParts + thread / kBandWords;
        if ((alive >> row & 1u) != 0) mask |= args.masks[(first_row + row) * words + word];
      }
      if (mask != 0) {
        atomicOr(removed + 2 * word, static_cast<uint32_t>(mask));
        atomicOr(removed + 2 * word + 1, static_cast<uint32_t>(mask >> kWarpLanes));
      }
    }
    __syncthreads();  // what the tile removes is noted
  }
  if (thread == 0) {
    args.counts[0] = kept;
    args.counts[1] = band_kept;
  }
}

// A thread a box after the band.
template <typename T>
__global__ void __launch_bounds__(kSweepThreads) nms_sweep_kernel(NmsBandArgs<T> args) {
  RNX_SHARED(Box<T>, boxes, kSweepThreads);
  RNX_SHARED(int64_t, labels, kSweepThreads);
  const int64_t position =
      args.first + args.count + static_cast<int64_t>(blockIdx.x) * kSweepThreads + threadIdx.x;
  const bool exists = position < args.num_boxes;
  bool suppressed = exists && args.first > 0 && args.suppressed[position];
  const Box<T> own = exists ? args.boxes[position] : Box<T>{T(0), T(0), T(0), T(0)};
  const int64_t label = exists ? args.labels[position] : 0;
  const T area = box_area(own);
  const int64_t kept = args.counts[1];
  for (int64_t start = 0; start < kept; start += kSweepThreads) {
    // Also a barrier: the last kept boxes have been used.
    if (__syncthreads_or(exists && !suppressed) == 0) break;
    const int size = kept - start < kSweepThreads ? static_cast<int>(kept - start) : kSweepThreads;
    if (static_cast<int>(threadIdx.x) < size) {
      const int64_t other = args.band_kept[start + threadIdx.x];
      boxes[threadIdx.x] = args.boxes[other];
      labels[threadIdx.x] = args.labels[other];
    }
    __syncthreads();  // the kept boxes are in shared memory
    for (int i = 0; i < size && !suppressed; ++i) {
      suppressed = labels[i] == label && suppresses(boxes[i], box_area(boxes[i]), own, area, args.threshold);
    }
  }
  if (exists) args.suppressed[position] = suppressed;
}

}  // namespace retinanet_ext
