// Focal loss over the levels of a feature pyramid on CUDA: sum, gradient, both in one pass (formulas in
// common/focal_math.h). One launch reads every level as the head's convolution leaves it; each gradient is written in
// its level's own layout.
//
// Tiles     The tiles of all levels and images are one list, walked by blocks of 256 threads. In the rows layout (the K
//           logits of an anchor together) a tile is whole rows, about 16 KiB of logits. In the planes layout
//           ([A, K, H*W]) it is 32 vectors of neighbouring cells of one anchor through all K planes: each warp takes every
//           eighth plane, and the cells' targets are read once for all of them.
// Threads   Four 16-byte vectors each in flight, 64 bytes. A level whose images or planes do not begin on 16-byte
//           boundaries is read element by element, neighbouring threads neighbouring elements.
// Background  A tile without a positive or ignored anchor evaluates every element as background: no row, no column, no
//           division. In any other, each element compares its anchor's target with its class.
// Math, bytes, bound  As focal_loss_kernel.cuh; the targets of the planes layout are read once a tile, through shared
//           memory.
// Sums      As there: thread (float), warp, block (double), blocks in order; the same bits on every run.
#pragma once

#include "focal_loss/focal_loss_device.cuh"

namespace retinanet_ext {

constexpr int kMaxLevels = 16;  // of one launch

struct LevelKernelArgs {
  const void* logits;
  void* gradient;
  int64_t image_stride;           // elements from one image's logits to the next
  int64_t gradient_image_stride;  // likewise
  int64_t first_anchor;           // of the level, among the N of an image
  int rows;                       // anchors of an image
  int cells;                      // planes: H*W
  int first_tile;                 // of the level
  int tiles_per_image;
  int tiles_per_anchor;  // planes
  int anchors;           // planes: A
  bool planes;
  bool aligned;  // every image, and every plane, begins on a 16-byte boundary, of logits and gradient
};

// T is the compute type, float or double.
template <typename T>
struct MultilevelKernelArgs {
  LevelKernelArgs levels[kMaxLevels];
  int num_levels;
  int tiles;
  const void* targets;  // [B, N]
  bool wide_targets;    // int64 rather than int32
  int64_t num_anchors;  // N
  int classes;
  int rows_per_tile;          // focal_rows_per_tile
  const T* normalizer;        // [1] or [B], or null
  bool normalizer_per_image;  // [B]
  T scale;                    // of the loss
  T gamma;
  T alpha_positive;
  T alpha_negative;
  int64_t ignore_index;
  const float* grad;    // kGradient: the upstream gradient
  bool filled;          // kGradient: the gradients are those for an upstream gradient of 1
  int32_t* was_one;     // kGradient: notes whether it was 1; or null
  double* block_sums;   // sums: [blocks]
};

// Cells of a tile of the planes layout.
template <typename In>
constexpr int kPlaneTileCells = kWarpSize * kVectorWidth<In>;

// Where a level's logits lie, and where its gradient goes.
struct LevelMemory {
  const void* logits;
  void* gradient;        // contiguous in the layout of the logits, or null
  int64_t image_stride;  // elements from one image's logits to the next
  int64_t first_anchor;
  int64_t anchors;  // A; 1 for [B, n, K]
  int64_t cells;    // H*W; n for [B, n, K]
  bool planes;
};

// Appends a level's tiles to those before it; false where they are too many to be counted.
template <typename In>
bool add_level(const LevelMemory& level, int64_t batch, MultilevelKernelArgs<compute_t<In>>& args) {
  constexpr int64_t kMaxCount = 1 << 30;
  const int64_t rows = level.anchors * level.cells;
  const int64_t image_size = rows * args.classes;
  const int64_t tiles_per_anchor = (level.cells + kPlaneTileCells<In> - 1) / kPlaneTileCells<In>;
  const int64_t tiles_per_image =
      level.planes ? level.anchors * tiles_per_anchor : (rows + args.rows_per_tile - 1) / args.rows_per_tile;
  if (rows > kMaxCount || level.anchors * args.classes > kMaxCount) return false;
  if (args.tiles + tiles_per_image * batch > kMaxCount) return false;
  const auto whole = [](int64_t elements) { return elements % kVectorWidth<In> == 0; };
  LevelKernelArgs& entry = args.levels[args.num_levels++];
  entry.logits = level.logits;
  entry.gradient = level.gradient;
  entry.image_stride = level.image_stride;
  entry.gradient_image_stride = image_size;
  entry.first_anchor = level.first_anchor;
  entry.rows = static_cast<int>(rows);
  entry.cells = static_cast<int>(level.cells);
  entry.anchors = static_cast<int>(level.anchors);
  entry.planes = level.planes;
  entry.aligned = is_vector_aligned(level.logits) && is_vector_aligned(level.gradient) &&
                  (batch == 1 || (whole(level.image_stride) && whole(image_size))) &&
                  (!level.planes || whole(level.cells));
  entry.first_tile = args.tiles;
  entry.tiles_per_anchor = static_cast<int>(tiles_per_anchor);
  entry.tiles_per_image = static_cast<int>(tiles_per_image);
  args.tiles += static_cast<int>(tiles_per_image * batch);
  return true;
}

constexpr int kBackgroundTarget = -1;
constexpr int kIgnoredTarget = -2;

// An anchor's target as its class, kBackgroundTarget or kIgnoredTarget.
template <typename T>
__device__ __forceinline__ int anchor_target(const MultilevelKernelArgs<T>& args, int64_t index) {
  const int64_t target = args.wide_targets ? static_cast<const int64_t*>(args.targets)[index]
                                           : static_cast<int64_t>(static_cast<const int32_t*>(args.targets)[index]);
  if (target == args.ignore_index) return kIgnoredTarget;
  return target >= 0 && target < args.classes ? static_cast<int>(target) : kBackgroundTarget;
}

template <typename T>
__device__ __forceinline__ bool is_background(const MultilevelKernelArgs<T>& args, int64_t index) {
  return anchor_target(args, index) == kBackgroundTarget;
}

// What the elements of one image share.
template <typename T>
struct ImageFactors {
  T loss;      // of each loss, before alpha
  T gradient;  // of each gradient, before alpha
};

// Where the elements of one thread's vector lie: side by side, or `stride` apart where vectors cannot be loaded.
struct Slots {
  int first;
  int stride;

  __device__ __forceinline__ int operator[](int i) const {
    return first + i * stride;
  }
};

// Elements one by one; those at or beyond `count` are absent.
template <typename In, typename T, int kWidth>
__device__ __forceinline__ void read_slots(const In* base, Slots slots, int count, T (&x)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = slots[i] < count ? T(load_value(base[slots[i]])) : -static_cast<T>(INFINITY);
}

// What a thread has read and not yet used, and how many of it are in flight: whole vectors where aligned, and otherwise
// elements, each of which takes a register.
template <bool kAligned, typename In>
struct Loaded {
  static constexpr int kInFlight = kFocalVectorsPerThread;
  static constexpr int kWidth = kVectorWidth<In>;
  Vec<In> vector;

  // Whether the fast path takes the slots.
  static __device__ __forceinline__ bool takes(Slots slots, int count) {
    return slots.first + kWidth <= count;
  }
  __device__ __forceinline__ void read(const In* base, Slots slots, int count) {
    if (takes(slots, count)) vector = load_vector(base + slots.first);
  }
  __device__ __forceinline__ void get(compute_t<In> (&x)[kWidth]) const {
    unpack(vector, x);
  }
};

template <typename In>
struct Loaded<false, In> {
  static constexpr int kInFlight = 1;
  static constexpr int kWidth = kVectorWidth<In>;
  compute_t<In> values[kWidth];

  static __device__ __forceinline__ bool takes(Slots slots, int count) {
    return slots.first < count;
  }
  __device__ __forceinline__ void read(const In* base, Slots slots, int count) {
    read_slots(base, slots, count, values);
  }
  __device__ __forceinline__ void get(compute_t<In> (&x)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = values[i];
  }
};

// Aligned vectors are whole ones.
template <bool kAligned, typename In, typename T, int kWidth>
__device__ __forceinline__ void store_slots(In* base, Slots slots, int count, const T (&values)[kWidth]) {
  if constexpr (kAligned) {
    store_vector(base + slots.first, pack<In>(values));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (slots[i] < count) store_value(values[i], base[slots[i]]);
    }
  }
}

// Sums a vector of background elements, and stores its gradients.
template <FocalTask kTask, Gamma kGamma, bool kAligned, typename In, typename T, int kWidth>
__device__ __forceinline__ void process_background(const MultilevelKernelArgs<T>& args, const T (&x)[kWidth],
                                                   Slots slots, int count, ImageFactors<T> factors, In* gradient,
                                                   T& sum) {
  FocalVector<T, kWidth> vector;
  evaluate_background<kGamma>(x, args.gamma, vector);
  if (sums(kTask)) sum += vector_sum(vector) * (args.alpha_negative * factors.loss);
  if (differentiates(kTask)) {
    const T scale = args.alpha_negative * factors.gradient;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vector.gradients[i] *= scale;
    store_slots<kAligned>(gradient, slots, count, vector.gradients);
  }
}

// The same of any one element: `target` is its anchor's target, `column` its own class.
template <FocalTask kTask, Gamma kGamma, typename In, typename T>
__device__ __forceinline__ void process_element(const MultilevelKernelArgs<T>& args, const In* logits, int64_t offset,
                                                int target, int column, ImageFactors<T> factors, In* gradient, T& sum) {
  const bool positive = target == column;
  const bool counts = target != kIgnoredTarget;
  const T x = T(load_value(logits[offset]));
  const LossAndGradient<T> element = hard_element<T, kGamma>(positive ? -x : x, args.gamma);
  const T a = positive ? args.alpha_positive : args.alpha_negative;
  if (sums(kTask) && counts) sum += a * element.loss * factors.loss;
  if (differentiates(kTask)) {
    const T value = (positive ? -a : a) * factors.gradient * element.gradient;
    store_value(counts ? value : T(0), gradient[offset]);
  }
}

// One tile of whole rows. `logits` and `gradient`: of the image.
template <FocalTask kTask, Gamma kGamma, bool kAligned, typename In, typename T>
__device__ __forceinline__ void rows_tile(const MultilevelKernelArgs<T>& args, const LevelKernelArgs& level,
                                          int tile, int64_t targets_base, ImageFactors<T> factors,
                                          const In* logits, In* gradient, T& sum) {
  constexpr int kWidth = kVectorWidth<In>;
  const int first_row = tile * args.rows_per_tile;
  const int rest = level.rows - first_row;
  const int rows = rest < args.rows_per_tile ? rest : args.rows_per_tile;
  const int count = rows * args.classes;
  targets_base += first_row;
  const int64_t offset = static_cast<int64_t>(first_row) * args.classes;
  logits += offset;
  if (differentiates(kTask)) gradient += offset;
  const auto slots_of = [](int start) {
    return kAligned ? Slots{start + static_cast<int>(threadIdx.x) * kWidth, 1}
                    : Slots{start + static_cast<int>(threadIdx.x), kFocalThreads};
  };
  constexpr int kStep = kFocalThreads * kWidth;
  using Fast = Loaded<kAligned, In>;
  bool mixed = false;

  for (int start = 0; start < count; start += Fast::kInFlight * kStep) {
    Fast loaded[Fast::kInFlight];
#pragma unroll
    for (int u = 0; u < Fast::kInFlight; ++u) loaded[u].read(logits, slots_of(start + u * kStep), count);
    if (start == 0) {
      // The loads above are under way while the rows' targets are read.
      bool found = false;
#pragma unroll 2
      for (int row = threadIdx.x; row < rows; row += kFocalThreads) {
        found |= anchor_target(args, targets_base + row) != kBackgroundTarget;
      }
      // One row that is not background sends the whole block down the general path.
      mixed = __syncthreads_or(found) != 0;
    }
    if (mixed) break;
#pragma unroll
    for (int u = 0; u < Fast::kInFlight; ++u) {
      const Slots slots = slots_of(start + u * kStep);
      if (!Fast::takes(slots, count)) continue;
      T x[kWidth];
      loaded[u].get(x);
      process_background<kTask, kGamma, kAligned>(args, x, slots, count, factors, gradient, sum);
    }
  }

  // What is left, the whole tile or an image's partial vector, is loaded anew, a vector at a time, which leaves the
  // registers to the path above. Vectors whose rows are all background take the fast arithmetic here too.
  const int fast = kAligned ? count / kWidth * kWidth : count;
#pragma unroll 1
  for (int start = mixed ? 0 : fast; start < count; start += kStep) {
    const Slots slots = slots_of(start);
    if (slots.first >= count) break;
    if (kAligned && slots.first + kWidth <= count) {
      const int row = slots.first / args.classes;
      const int column = slots.first - row * args.classes;
      const bool one_row = column + kWidth <= args.classes;
      if (column + kWidth <= 2 * args.classes && is_background(args, targets_base + row) &&
          (one_row || is_background(args, targets_base + row + 1))) {
        T x[kWidth];
        unpack(load_vector(logits + slots.first), x);
        process_background<kTask, kGamma, kAligned>(args, x, slots, count, factors, gradient, sum);
        continue;
      }
    }
#pragma unroll 1
    for (int i = 0; i < kWidth; ++i) {
      const int element = slots[i];
      if (element >= count) break;
      const int row = element / args.classes;
      process_element<kTask, kGamma>(args, logits, element, anchor_target(args, targets_base + row),
                                     element - row * args.classes, factors, gradient, sum);
    }
  }
}

// One tile of an anchor's cells through all planes. `logits` and `gradient`: of the image.
template <FocalTask kTask, Gamma kGamma, bool kAligned, typename In, typename T>
__device__ __forceinline__ void planes_tile(const MultilevelKernelArgs<T>& args, const LevelKernelArgs& level,
                                            int tile, int64_t targets_base, ImageFactors<T> factors,
                                            const In* logits, In* gradient, int* cell_targets, T& sum) {
  constexpr int kWidth = kVectorWidth<In>;
  constexpr int kCells = kPlaneTileCells<In>;
  static_assert(kCells <= kFocalThreads);
  const int anchor = tile / level.tiles_per_anchor;
  const int first_cell = (tile - anchor * level.tiles_per_anchor) * kCells;
  const int rest = level.cells - first_cell;
  const int count = rest < kCells ? rest : kCells;
  const int64_t cells = level.cells;
  const int64_t offset = anchor * args.classes * cells + first_cell;
  logits += offset;
  if (differentiates(kTask)) gradient += offset;
  const int cell = threadIdx.x;
  bool found = false;
  // The previous tile's targets have been read by every warp before they are overwritten.
  __syncthreads();
  if (cell < kCells) {
    int target = kBackgroundTarget;
    if (cell < count) target = anchor_target(args, targets_base + static_cast<int64_t>(first_cell + cell) * level.anchors + anchor);
    cell_targets[cell] = target;
    found = target != kBackgroundTarget;
  }
  // The targets are there; one that is not background sends the whole block down the general path.
  const bool mixed = __syncthreads_or(found) != 0;

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const Slots slots = kAligned ? Slots{lane * kWidth, 1} : Slots{lane, kWarpSize};
  if (!mixed) {
    if (slots.first >= count) return;
    using Fast = Loaded<kAligned, In>;
    for (int first_plane = warp; first_plane < args.classes; first_plane += kFocalWarps * Fast::kInFlight) {
      Fast loaded[Fast::kInFlight];
#pragma unroll
      for (int u = 0; u < Fast::kInFlight; ++u) {
        const int plane = first_plane + u * kFocalWarps;
        if (plane < args.classes) loaded[u].read(logits + plane * cells, slots, count);
      }
#pragma unroll
      for (int u = 0; u < Fast::kInFlight; ++u) {
        const int plane = first_plane + u * kFocalWarps;
        if (plane >= args.classes) break;
        In* const plane_gradient = differentiates(kTask) ? gradient + plane * cells : nullptr;
        T x[kWidth];
        loaded[u].get(x);
        process_background<kTask, kGamma, kAligned>(args, x, slots, count, factors, plane_gradient, sum);
      }
    }
    return;
  }
  // Neighbouring threads take neighbouring cells, one at a time: its target stays in a register through all planes.
  for (int cell_of_thread = lane; cell_of_thread < count; cell_of_thread += kWarpSize) {
    const int target = cell_targets[cell_of_thread];
#pragma unroll 1
    for (int plane = warp; plane < args.classes; plane += kFocalWarps) {
      process_element<kTask, kGamma>(args, logits, plane * cells + cell_of_thread, target, plane, factors, gradient,
                                     sum);
    }
  }
}

template <typename In, FocalTask kTask, Gamma kGamma>
__global__ void __launch_bounds__(kFocalThreads, kFocalMinBlocks<In>)
    multilevel_focal_kernel(const __grid_constant__ MultilevelKernelArgs<compute_t<In>> args) {
  using T = compute_t<In>;
  RNX_SHARED(double, shared, kFocalWarps);
  RNX_SHARED(int, cell_targets, kPlaneTileCells<In>);
  if (kTask == FocalTask::kGradient) {
    const bool one = *args.grad == 1.0f;
    if (args.was_one != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *args.was_one = one;
    if (one && args.filled) return;
  }
  T sum = T(0);
  for (int tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    int index = 0;
    while (index + 1 < args.num_levels && tile >= args.levels[index + 1].first_tile) ++index;
    const LevelKernelArgs& level = args.levels[index];
    const int level_tile = tile - level.first_tile;
    const int image = level_tile / level.tiles_per_image;
    const int image_tile = level_tile - image * level.tiles_per_image;
    const In* logits = static_cast<const In*>(level.logits) + image * level.image_stride;
    In* gradient = static_cast<In*>(level.gradient);
    if (differentiates(kTask)) gradient += image * level.gradient_image_stride;
    const int64_t targets_base = image * args.num_anchors + level.first_anchor;
    ImageFactors<T> factors;
    factors.loss = args.scale;
    if (args.normalizer != nullptr) factors.loss /= args.normalizer[args.normalizer_per_image ? image : 0];
    // Read once a tile: kept through all tiles it would take a register from the math.
    factors.gradient = kTask == FocalTask::kGradient ? factors.loss * static_cast<T>(*args.grad) : factors.loss;
    if (level.planes && level.aligned) {
      planes_tile<kTask, kGamma, true>(args, level, image_tile, targets_base, factors, logits, gradient, cell_targets, sum);
    } else if (level.planes) {
      planes_tile<kTask, kGamma, false>(args, level, image_tile, targets_base, factors, logits, gradient, cell_targets,
                                        sum);
    } else if (level.aligned) {
      rows_tile<kTask, kGamma, true>(args, level, image_tile, targets_base, factors, logits, gradient, sum);
    } else {
      rows_tile<kTask, kGamma, false>(args, level, image_tile, targets_base, factors, logits, gradient, sum);
    }
  }
  if (sums(kTask)) {
    const double total = block_sum(static_cast<double>(sum), shared);
    if (threadIdx.x == 0) args.block_sums[blockIdx.x] = total;
  }
}

}  // namespace retinanet_ext
