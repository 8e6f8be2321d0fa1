// Greedy suppression of a ranked list of boxes by one block: from the best to the worst, until `most` are kept.
//
// Tile     64 candidates. Each warp has four of them, and its lanes go through the boxes that are kept already, labels
//          before coordinates; then through the candidates of the tile before it, which leaves a mask of those that would
//          suppress it. One warp settles the tile by the masks, in rounds: all whose suppressors are settled at once, which
//          is a round or two for most tiles and 32 for a chain of 64.
// Barriers Three a tile.
// Bound    Latency: a tile costs about as much as its three barriers, a look at the kept boxes of an L1 access for each 32
//          of them, and the settling. The next tile's boxes are on their way meanwhile.
#pragma once

#include <cstdint>

#include "cuda/shared_memory.cuh"
#include "cuda/warp.cuh"
#include "nms/nms_math.h"

namespace retinanet_ext {

constexpr int kWalkThreads = 512;
constexpr int kWalkTile = 2 * kWarpLanes;
constexpr int kWalkWarps = kWalkThreads / kWarpLanes;
constexpr int kWalkRows = kWalkTile / kWalkWarps;  // candidates a warp
static_assert(kWalkRows * kWalkWarps == kWalkTile, "every candidate has a warp");

// Of one image.
template <typename T, typename Label>
struct RankedBoxes {
  const Box<T>* boxes;  // [count], best first
  const Label* labels;  // [count]
  int64_t count;
};

// What is kept of one image, in global memory: room for `most`.
template <typename T, typename Label>
struct KeptList {
  Box<T>* boxes;
  Label* labels;
};

// Calls keep(slot, position) for each box that is kept, and returns how many are. All threads of the block call it.
template <typename T, typename Label, typename Keep>
__device__ int64_t walk_ranked(const RankedBoxes<T, Label>& ranked, const KeptList<T, Label>& list, T threshold,
                               int64_t most, const Keep& keep) {
  RNX_SHARED(Box<T>, boxes, kWalkTile);
  RNX_SHARED(Label, labels, kWalkTile);
  RNX_SHARED(unsigned long long, masks, kWalkTile);  // of each candidate: those before it that would suppress it
  RNX_SHARED(int, suppressed, kWalkTile);            // by what was kept before the tile
  RNX_SHARED(unsigned long long, settled, 1);        // the tile's candidates that are kept
  const int thread = threadIdx.x;
  const int lane = thread % kWarpLanes;
  const int first_row = thread / kWarpLanes * kWalkRows;

  Box<T> next_box = {T(0), T(0), T(0), T(0)};
  Label next_label = 0;
  const auto load_next = [&](int64_t position) {
    if (thread < kWalkTile && position < ranked.count) {
      next_box = ranked.boxes[position];
      next_label = ranked.labels[position];
    }
  };
  load_next(thread);
  int64_t kept = 0;
  for (int64_t start = 0; start < ranked.count && kept < most; start += kWalkTile) {
    const int size = ranked.count - start < kWalkTile ? static_cast<int>(ranked.count - start) : kWalkTile;
    if (thread < kWalkTile) {
      boxes[thread] = next_box;
      labels[thread] = next_label;
    }
    load_next(start + kWalkTile + thread);
    __syncthreads();  // the tile is in shared memory, and the last one's kept boxes in the list

    Box<T> own[kWalkRows];
    Label own_label[kWalkRows];
    bool hit[kWalkRows];
#pragma unroll
    for (int row = 0; row < kWalkRows; ++row) {
      own[row] = boxes[first_row + row];
      own_label[row] = labels[first_row + row];
      hit[row] = false;
    }
    // Unrolled, so that labels of several rounds are on their way at once.
#pragma unroll 4
    for (int64_t i = lane; i < kept; i += kWarpLanes) {
      const Label label = list.labels[i];
#pragma unroll
      for (int row = 0; row < kWalkRows; ++row) {
        if (label == own_label[row] && !hit[row]) {
          const Box<T> other = list.boxes[i];
          hit[row] = suppresses(other, box_area(other), own[row], box_area(own[row]), threshold);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kWalkRows; ++row) {
      const bool dead = __ballot_sync(kWholeWarp, hit[row]) != 0;
      unsigned long long mask = 0;
#pragma unroll
      for (int half = 0; half < 2 && !dead; ++half) {
        const int other = half * kWarpLanes + lane;
        const bool would = other < first_row + row && labels[other] == own_label[row] &&
                           suppresses(boxes[other], box_area(boxes[other]), own[row], box_area(own[row]), threshold);
        mask |= static_cast<unsigned long long>(__ballot_sync(kWholeWarp, would)) << (half * kWarpLanes);
      }
      if (lane == row) {
        masks[first_row + row] = mask;
        suppressed[first_row + row] = dead;
      }
    }
    __syncthreads();  // every candidate's mask is there

    if (thread < kWarpLanes) {
      const unsigned long long low = masks[lane];
      const unsigned long long high = masks[lane + kWarpLanes];
      const auto both = [&](bool of_low, bool of_high) {
        const unsigned long long bits = __ballot_sync(kWholeWarp, of_high);
        return bits << kWarpLanes | __ballot_sync(kWholeWarp, of_low);
      };
      const auto is_in = [&](unsigned long long bits, int row) { return (bits >> row & 1u) != 0; };
      unsigned long long open = both(lane < size && suppressed[lane] == 0,
                                     lane + kWarpLanes < size && suppressed[lane + kWarpLanes] == 0);
      unsigned long long alive = 0;
      while (open != 0) {
        // No open candidate would suppress these: they stay, the first of the open ones among them. Those whom they
        // suppress go.
        const unsigned long long fresh = both(is_in(open, lane) && (low & open) == 0,
                                              is_in(open, lane + kWarpLanes) && (high & open) == 0);
        alive |= fresh;
        open &= ~fresh;
        open &= ~both((low & fresh) != 0, (high & fresh) != 0);
      }
      if (lane == 0) settled[0] = alive;
    }
    __syncthreads();  // the tile is settled

    const unsigned long long alive = settled[0];
    if (thread < size && (alive >> thread & 1u) != 0) {
      const int64_t slot = kept + count_bits(alive & ((1ull << thread) - 1));
      if (slot < most) {
        list.boxes[slot] = boxes[thread];
        list.labels[slot] = labels[thread];
        keep(slot, start + thread);
      }
    }
    kept += count_bits(alive);
  }
  return kept < most ? kept : most;
}

}  // namespace retinanet_ext
