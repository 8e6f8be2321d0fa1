// IoU of every pair of boxes on CUDA (formula in box_iou_math.h): [batch, N, M], float32 for floats and halves, or
// float64.
//
// Tiles     The result is cut into tiles of up to 512 rows and 1024 columns, which blocks of 256 threads walk. Of the
//           threads, 8 to 256 lie along the columns and the rest along the rows, so that short rows waste few of them.
// Threads   Each keeps 1 or 4 boxes of the columns in registers, and takes the tile's rows in turn from shared memory;
//           neighbouring threads write neighbouring numbers.
// Bytes     4 written a pair (8 of float64), 20 read a box and tile: next to nothing.
// Bound     Memory: 0.93 ps a pair of float32 at 4.3 TB/s. Of issue slots, 31 a pair would take as long; a pair that does
//           not overlap skips the division.
#pragma once

#include "box_iou/box_iou_math.h"
#include "common/box_rows.h"
#include "cuda/shared_memory.cuh"

namespace retinanet_ext {

constexpr int kIouThreads = 256;
constexpr int kIouMinBlocks = 4;  // resident on a multiprocessor, of float32
constexpr int kIouMinColumnThreads = 8;
constexpr int kIouWideColumns = 4;     // of a thread, where rows are long
constexpr int kIouRowsOfAThread = 16;  // at most
constexpr int kIouTileRows = kIouThreads / kIouMinColumnThreads * kIouRowsOfAThread;  // at most

template <typename T>
struct BoxIouKernelArgs {
  BoxRows rows1;
  BoxRows rows2;
  int64_t row_stride1;  // elements from one box to the next
  int64_t row_stride2;
  int64_t count1;  // N
  int64_t count2;  // M
  BroadcastDims batch_dims;
  BoxFormat format;
  T* result;           // [batch, N, M]
  int column_threads;  // a power of two; all where rows are long
  int tile_rows;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t tiles;
};

// Columns of a thread.
inline int iou_thread_columns(int64_t count2) {
  return count2 > kIouThreads ? kIouWideColumns : 1;
}

// Cuts the result into tiles: as large as they may be, but at least `wanted` of them where there is so much to do. The
// result does not depend on how.
template <typename T>
void cut_iou_tiles(int64_t batch, int64_t wanted, BoxIouKernelArgs<T>& args) {
  args.column_threads = kIouMinColumnThreads;
  while (args.column_threads < kIouThreads && args.column_threads < args.count2) args.column_threads *= 2;
  const int row_threads = kIouThreads / args.column_threads;
  const int64_t tile_columns = static_cast<int64_t>(args.column_threads) * iou_thread_columns(args.count2);
  args.column_tiles = (args.count2 + tile_columns - 1) / tile_columns;
  int rows_of_a_thread = kIouRowsOfAThread;
  do {
    args.tile_rows = row_threads * rows_of_a_thread;
    args.row_tiles = (args.count1 + args.tile_rows - 1) / args.tile_rows;
    args.tiles = batch * args.row_tiles * args.column_tiles;
    rows_of_a_thread /= 2;
  } while (args.tiles < wanted && rows_of_a_thread > 0);
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kIouThreads, sizeof(T) == sizeof(float) ? kIouMinBlocks : 2)
    box_iou_kernel(const __grid_constant__ BoxIouKernelArgs<T> args) {
  RNX_SHARED(Box<T>, corners, kIouTileRows);
  RNX_SHARED(T, areas, kIouTileRows);
  const int thread = static_cast<int>(threadIdx.x);
  int column_threads = kIouThreads;
  if constexpr (kColumns == 1) column_threads = args.column_threads;
  const int column_thread = thread % column_threads;
  const int row_thread = thread / column_threads;
  const int row_threads = kIouThreads / column_threads;
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t row_tile = tile / args.column_tiles;
    const int64_t image = row_tile / args.row_tiles;
    const int64_t first_row = (row_tile - image * args.row_tiles) * args.tile_rows;
    const int64_t first_column = (tile - row_tile * args.column_tiles) * column_threads * kColumns + column_thread;
    const BroadcastOffsets offsets = broadcast_offsets(args.batch_dims, image);
    const int64_t rest = args.count1 - first_row;
    const int rows = rest < args.tile_rows ? static_cast<int>(rest) : args.tile_rows;

    for (int row = thread; row < rows; row += kIouThreads) {
      const int64_t offset = offsets.first + (first_row + row) * args.row_stride1;
      const IouBox<T> box = iou_box(load_box<T>(args.rows1, offset), args.format);
      corners[row] = box.corners;
      areas[row] = box.area;
    }
    IouBox<T> columns[kColumns];
    bool present[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t column = first_column + k * column_threads;
      present[k] = column < args.count2;
      columns[k] = present[k]
                       ? iou_box(load_box<T>(args.rows2, offsets.second + column * args.row_stride2), args.format)
                       : IouBox<T>{};
    }
    __syncthreads();  // every thread reads all of the tile's rows

    T* target = args.result + (image * args.count1 + first_row + row_thread) * args.count2 + first_column;
    for (int row = row_thread; row < rows; row += row_threads, target += row_threads * args.count2) {
      const IouBox<T> box = {corners[row], areas[row]};
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (present[k]) target[k * column_threads] = box_pair_iou(box, columns[k]);
      }
    }
    __syncthreads();  // the next tile's rows take the place of these
  }
}

}  // namespace retinanet_ext
