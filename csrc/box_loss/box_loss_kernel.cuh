// Box regression loss on CUDA: sum and gradient over foreground anchors (formulas in box_loss_math.h). One launch reads
// the matches of every level and image; deltas are read in place, by strides, and each gradient is written in its
// level's own layout.
//
// Tiles     A tile is whole cells of one level and image, about 2048 anchors, walked by blocks of 256 threads.
// Threads   A thread looks at eight matches, all loaded before the first is used; neighbouring threads at neighbours.
//           Few anchors are foreground, and those few lie together: each warp counts its foreground by ballots and
//           shares it out to its lanes, so that neighbours are computed side by side and not one after the other.
// Gradient  A block first fills its tile with zeros, by 16-byte stores, and then writes its foreground rows over them:
//           one launch for all levels, where filling each level's memory beforehand would be a launch a level, for the
//           same bytes.
// Bytes     Forward: 4 an anchor (int32 matches; 8 if int64), and at foreground 48 more (float32): anchor, box, deltas.
//           Gradient: the matches again, and 4 deltas an anchor, of 2, 4 or 8 bytes, once.
// Bound     Memory; below some 100,000 anchors the latency of the launch and of a foreground anchor's chain of loads
//           (match, box, deltas).
// Sums      Of a thread, a warp, a block in double, then the blocks in order: the same bits on every run.
#pragma once

#include "box_loss/box_loss_math.h"
#include "focal_loss/focal_loss_device.cuh"

namespace retinanet_ext {

constexpr int kBoxThreads = kFocalThreads;  // what block_sum sums over
constexpr int kBoxWarps = kBoxThreads / kWarpSize;
constexpr int kMatchesPerThread = 8;
constexpr int kBoxBatch = kBoxThreads * kMatchesPerThread;  // matches that a block has in flight
constexpr int kBoxBlocks = 4;                               // resident blocks a multiprocessor: 64 registers a thread
template <typename In>
constexpr int kBoxMinBlocks = sizeof(In) == sizeof(double) ? kBoxBlocks / 2 : kBoxBlocks;
constexpr int kCellStep = 16;  // a tile's cells are a multiple: each of its planes is whole vectors where it begins so
constexpr int kBoxMaxLevels = 16;  // of one launch
constexpr int kBoxMaxImages = 64;  // of one launch whose boxes are a list

enum class BoxTask { kSum, kGradient };

struct BoxLevelArgs {
  const void* deltas;
  void* gradient;
  int64_t image_stride;  // of deltas: elements from one image to the next, and so on
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t first_anchor;  // of the level, among the N of an image
  int anchors;           // A: anchors a cell
  int width;
  int cells;  // H*W
  int cells_per_tile;
  int tiles_per_image;
  int first_tile;  // of the level
  bool planes;     // of the gradient: [4 * A, H*W]; otherwise [H*W, 4 * A]
};

template <typename T>
struct GtBoxList {
  const T* boxes;  // [count, 4]
  int64_t count;
};

// T is the compute type, float or double.
template <typename T>
struct BoxKernelArgs {
  BoxLevelArgs levels[kBoxMaxLevels];
  GtBoxList<T> gt[kBoxMaxImages];  // of the launch's images; of packed boxes the first alone, all of them
  const int32_t* gt_offsets;       // [B + 1], or null: boxes are a list
  int num_levels;
  int tiles;
  int first_image;              // of the launch
  int images;                   // of the launch
  const T* anchors;             // [N, 4] or [B, N, 4]
  int64_t anchor_image_stride;  // 0 where all images share them
  const void* matched;          // [B, N]
  bool wide_matches;            // int64 rather than int32
  int64_t num_anchors;          // N
  BoxLossOptions<T> options;
  const T* normalizer;        // [1] or [B], or null
  bool normalizer_per_image;  // [B]
  double scale;               // of the loss
  const T* grad;              // kGradient: the upstream gradient
  double* block_sums;         // kSum: [blocks]
};
static_assert(sizeof(BoxKernelArgs<double>) <= 4096, "what every GPU takes as parameters of a kernel");

// Where a level's deltas lie, and where its gradient goes.
struct DeltaMemory {
  const void* deltas;
  void* gradient;        // contiguous in its layout, or null
  int64_t image_stride;  // of deltas, as below
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t first_anchor;
  int64_t anchors;  // A; 1 for [B, n, 4]
  int64_t height;   // n for [B, n, 4]
  int64_t width;    // 1 for [B, n, 4]
  bool planes;      // of the gradient
};

// Appends a level's tiles to those before it; false where they are too many to be counted.
template <typename T>
bool add_delta_level(const DeltaMemory& level, BoxKernelArgs<T>& args) {
  constexpr int64_t kMaxCount = 1 << 28;
  const int64_t cells = level.height * level.width;
  if (cells > kMaxCount / level.anchors) return false;
  const int64_t steps = kBoxBatch / (level.anchors * kCellStep);
  const int64_t cells_per_tile = kCellStep * (steps > 1 ? steps : 1);
  const int64_t tiles_per_image = (cells + cells_per_tile - 1) / cells_per_tile;
  if (args.tiles + tiles_per_image * args.images > kMaxCount) return false;
  BoxLevelArgs& entry = args.levels[args.num_levels++];
  entry.deltas = level.deltas;
  entry.gradient = level.gradient;
  entry.image_stride = level.image_stride;
  entry.channel_stride = level.channel_stride;
  entry.row_stride = level.row_stride;
  entry.column_stride = level.column_stride;
  entry.first_anchor = level.first_anchor;
  entry.anchors = static_cast<int>(level.anchors);
  entry.width = static_cast<int>(level.width);
  entry.cells = static_cast<int>(cells);
  entry.planes = level.planes;
  entry.cells_per_tile = static_cast<int>(cells_per_tile);
  entry.tiles_per_image = static_cast<int>(tiles_per_image);
  entry.first_tile = args.tiles;
  args.tiles += static_cast<int>(tiles_per_image * args.images);
  return true;
}

// What a block works on: whole cells of one level of one image.
struct BoxTile {
  const BoxLevelArgs& level;
  int image;  // of the batch
  int first_cell;
  int cells;
  int64_t first_match;  // of the tile's anchors, in [B, N]
};

template <typename T>
__device__ __forceinline__ BoxTile box_tile(const BoxKernelArgs<T>& args, int tile) {
  int index = 0;
  while (index + 1 < args.num_levels && tile >= args.levels[index + 1].first_tile) ++index;
  const BoxLevelArgs& level = args.levels[index];
  const int level_tile = tile - level.first_tile;
  const int image = level_tile / level.tiles_per_image;
  const int first_cell = (level_tile - image * level.tiles_per_image) * level.cells_per_tile;
  const int rest = level.cells - first_cell;
  const int cells = rest < level.cells_per_tile ? rest : level.cells_per_tile;
  const int64_t image_first = (args.first_image + image) * args.num_anchors + level.first_anchor;
  return {level, args.first_image + image, first_cell, cells,
          image_first + static_cast<int64_t>(first_cell) * level.anchors};
}

template <typename T>
__device__ __forceinline__ int64_t match_of(const BoxKernelArgs<T>& args, int64_t index) {
  return args.wide_matches ? static_cast<const int64_t*>(args.matched)[index]
                           : static_cast<int64_t>(static_cast<const int32_t*>(args.matched)[index]);
}

// Whether each of the thread's matches is foreground: a block's threads apart from `matched`
// on, while their distance from it is below `count`.
template <typename Index>
__device__ __forceinline__ void find_foreground(const Index* matched, int count, bool (&found)[kMatchesPerThread]) {
  Index matches[kMatchesPerThread];
#pragma unroll
  for (int u = 0; u < kMatchesPerThread; ++u) {
    matches[u] = u * kBoxThreads < count ? matched[u * kBoxThreads] : -1;
  }
#pragma unroll
  for (int u = 0; u < kMatchesPerThread; ++u) found[u] = matches[u] >= 0;
}

template <typename T>
__device__ __forceinline__ void find_foreground(const BoxKernelArgs<T>& args, int64_t first, int count,
                                                bool (&found)[kMatchesPerThread]) {
  if (args.wide_matches) {
    find_foreground(static_cast<const int64_t*>(args.matched) + first, count, found);
  } else {
    find_foreground(static_cast<const int32_t*>(args.matched) + first, count, found);
  }
}

// Zeros by `threads` threads, of which this is `thread`: whole vectors, and element by element before and after them.
template <typename In>
__device__ __forceinline__ void fill_with_zeros(In* first, int count, int thread, int threads) {
  constexpr int kWidth = kVectorWidth<In>;
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(In) % kWidth);
  const int before = (kWidth - beyond) % kWidth;
  const int head = before < count ? before : count;
  const int vectors = (count - head) / kWidth;
  const int tail = head + vectors * kWidth;
  if (thread < head) first[thread] = In{};
  Vec<In>* const aligned = reinterpret_cast<Vec<In>*>(first + head);
  for (int i = thread; i < vectors; i += threads) {
    Vec<In>& vector = aligned[i];
    store_vector(reinterpret_cast<In*>(&vector), Vec<In>{});
  }
  if (thread < count - tail) first[tail + thread] = In{};
}

// The image's gradient of a level, from the first cell of the tile on.
template <typename In>
__device__ __forceinline__ In* tile_gradient(const BoxTile& tile) {
  const BoxLevelArgs& level = tile.level;
  const int64_t image_size = 4 * static_cast<int64_t>(level.cells) * level.anchors;
  return static_cast<In*>(level.gradient) + tile.image * image_size +
         static_cast<int64_t>(tile.first_cell) * (level.planes ? 1 : 4 * level.anchors);
}

template <typename In>
__device__ __forceinline__ void fill_tile_with_zeros(const BoxTile& tile) {
  In* const gradient = tile_gradient<In>(tile);
  if (!tile.level.planes) {
    fill_with_zeros(gradient, 4 * tile.level.anchors * tile.cells, threadIdx.x, kBoxThreads);
    return;
  }
  for (int channel = threadIdx.x / kWarpSize; channel < 4 * tile.level.anchors; channel += kBoxWarps) {
    fill_with_zeros(gradient + channel * static_cast<int64_t>(tile.level.cells), tile.cells, threadIdx.x % kWarpSize,
                    kWarpSize);
  }
}

template <typename T>
__device__ __forceinline__ Box<T> read_box(const T* boxes, int64_t row) {
  const T* const box = boxes + 4 * row;
  return {box[0], box[1], box[2], box[3]};
}

// The ground-truth box that `match` names, a row of the image's; null where it names none.
template <typename T>
__device__ __forceinline__ const T* matched_box(const BoxKernelArgs<T>& args, int image, int64_t match) {
  int64_t first = 0;
  const GtBoxList<T>& list = args.gt[args.gt_offsets == nullptr ? image - args.first_image : 0];
  int64_t end = list.count;
  if (args.gt_offsets != nullptr) {
    first = args.gt_offsets[image];
    const int64_t offset = args.gt_offsets[image + 1];
    end = offset < end ? offset : end;
    if (first < 0) return nullptr;
  }
  // Not first + match: the sum of any two numbers may be beyond what it can be.
  return match < end - first ? list.boxes + 4 * (first + match) : nullptr;
}

// The factor of an image's loss.
template <typename T>
__device__ __forceinline__ double image_factor(const BoxKernelArgs<T>& args, int image) {
  if (args.normalizer == nullptr) return args.scale;
  return args.scale / static_cast<double>(args.normalizer[args.normalizer_per_image ? image : 0]);
}

// One anchor of the tile that may be foreground. Returns its part of the loss, or writes its gradient.
template <typename In, BoxTask kTask, typename T>
__device__ __forceinline__ double foreground_anchor(const BoxKernelArgs<T>& args, const BoxTile& tile, int index) {
  const T* const gt_row = matched_box(args, tile.image, match_of(args, tile.first_match + index));
  if (gt_row == nullptr) return 0;
  const BoxLevelArgs& level = tile.level;
  const int cell_of_tile = index / level.anchors;
  const int channel = 4 * (index - cell_of_tile * level.anchors);
  const int cell = tile.first_cell + cell_of_tile;
  const int row = cell / level.width;
  const In* const source = static_cast<const In*>(level.deltas) + tile.image * level.image_stride +
                           channel * level.channel_stride + row * level.row_stride +
                           (cell - row * level.width) * level.column_stride;
  const int64_t step = level.channel_stride;
  const Deltas<T> deltas = {load_value(source[0]), load_value(source[step]), load_value(source[2 * step]),
                            load_value(source[3 * step])};
  const int64_t anchor_row = level.first_anchor + static_cast<int64_t>(tile.first_cell) * level.anchors + index;
  const Box<T> anchor = read_box(args.anchors + tile.image * args.anchor_image_stride, anchor_row);
  const Box<T> gt = read_box(gt_row, 0);
  const double factor = image_factor(args, tile.image);
  if (kTask == BoxTask::kSum) return box_loss(deltas, anchor, gt, args.options) * factor;

  const T upstream = static_cast<T>(static_cast<double>(*args.grad) * factor);
  const Deltas<T> gradient = box_loss_gradient(deltas, anchor, gt, args.options, upstream);
  const int64_t channel_stride = level.planes ? level.cells : 1;
  In* const target = tile_gradient<In>(tile) + cell_of_tile * (level.planes ? 1 : 4 * level.anchors) +
                     channel * channel_stride;
  store_value(gradient.dx, target[0]);
  store_value(gradient.dy, target[channel_stride]);
  store_value(gradient.dw, target[2 * channel_stride]);
  store_value(gradient.dh, target[3 * channel_stride]);
  return 0;
}

__device__ __forceinline__ int count_bits(unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The place of the bit that has `rank` others below it; `bits` holds more than `rank`.
__device__ __forceinline__ int bit_of_rank(unsigned bits, int rank) {
  int place = 0;
#pragma unroll
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const int below = count_bits(bits >> place & ((1u << half) - 1));
    if (rank >= below) {
      rank -= below;
      place += half;
    }
  }
  return place;
}

// What a warp has found to be foreground in one batch: of each of a thread's matches one bit a lane.
struct Foreground {
  unsigned ballots[kMatchesPerThread];

  __device__ __forceinline__ explicit Foreground(const bool (&found)[kMatchesPerThread]) {
#pragma unroll
    for (int u = 0; u < kMatchesPerThread; ++u) ballots[u] = __ballot_sync(0xffffffffu, found[u]);
  }

  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll
    for (int u = 0; u < kMatchesPerThread; ++u) sum += count_bits(ballots[u]);
    return sum;
  }

  // The one of `rank`, as its place in the batch.
  __device__ __forceinline__ int operator[](int rank) const {
    unsigned bits = ballots[0];
    int first = 0;
#pragma unroll
    for (int u = 1; u < kMatchesPerThread; ++u) {
      const int before = count_bits(bits);
      if (rank < before) break;
      rank -= before;
      bits = ballots[u];
      first = u * kBoxThreads;
    }
    return first + static_cast<int>(threadIdx.x) / kWarpSize * kWarpSize + bit_of_rank(bits, rank);
  }
};

template <typename In, BoxTask kTask>
__global__ void __launch_bounds__(kBoxThreads, kBoxMinBlocks<In>)
    box_loss_kernel(const __grid_constant__ BoxKernelArgs<compute_t<In>> args) {
  RNX_SHARED(double, shared, kFocalWarps);
  double sum = 0;
  for (int t = blockIdx.x; t < args.tiles; t += gridDim.x) {
    const BoxTile tile = box_tile(args, t);
    const int count = tile.cells * tile.level.anchors;
    for (int start = 0; start < count; start += kBoxBatch) {
      const int own = start + static_cast<int>(threadIdx.x);
      bool found[kMatchesPerThread];
      find_foreground(args, tile.first_match + own, count - own, found);
      if (kTask == BoxTask::kGradient && start == 0) {
        fill_tile_with_zeros<In>(tile);
        // The whole tile is zero before any thread writes foreground over it.
        __syncthreads();
      }
      bool any = false;
#pragma unroll
      for (const bool one : found) any |= one;
      if (__ballot_sync(0xffffffffu, any) == 0) continue;
      const Foreground foreground(found);
      const int foregrounds = foreground.count();
      for (int rank = threadIdx.x % kWarpSize; rank < foregrounds; rank += kWarpSize) {
        sum += foreground_anchor<In, kTask>(args, tile, start + foreground[rank]);
      }
    }
  }
  if (kTask == BoxTask::kSum) {
    const double total = block_sum(sum, shared);
    if (threadIdx.x == 0) args.block_sums[blockIdx.x] = total;
  }
}

// Second stage of the sum: one block adds the blocks' numbers in a fixed order, and zero times each factor. That is NaN
// where a normalizer is zero or NaN, so that the loss shows it even if the image has no foreground.
template <typename T>
__global__ void __launch_bounds__(kBoxThreads)
    box_loss_finish_kernel(const double* block_sums, int blocks, const T* normalizer, int factors, double scale,
                           T* result) {
  RNX_SHARED(double, shared, kFocalWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += kBoxThreads) sum += block_sums[i];
  for (int i = threadIdx.x; i < factors; i += kBoxThreads) {
    sum += 0 * (normalizer == nullptr ? scale : scale / static_cast<double>(normalizer[i]));
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *result = static_cast<T>(sum);
}

}  // namespace retinanet_ext
