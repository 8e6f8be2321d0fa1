// A run of boxes on the CPU: their corners and areas as five arrays, so that what is computed with one other box is a loop
// that vectorises.
#pragma once

#include <cstdint>

#include "box_iou/box_iou_args.h"

namespace retinanet_ext {

constexpr int64_t kRun = 512;            // boxes of a run; 10 KiB of float
constexpr int64_t kLanes = 16;           // what is computed is a multiple of this
constexpr int64_t kTaskPairs = 1 << 15;  // of a parallel task, about
constexpr int64_t kTasksPerThread = 4;   // at least: less does not pay for waking a thread
static_assert(kRun % kLanes == 0);

template <typename T>
struct BoxRun {
  T x1[kRun];
  T y1[kRun];
  T x2[kRun];
  T y2[kRun];
  T area[kRun];

  RNX_HD void set(int64_t i, const IouBox<T>& box) {
    x1[i] = box.corners.x1;
    y1[i] = box.corners.y1;
    x2[i] = box.corners.x2;
    y2[i] = box.corners.y2;
    area[i] = box.area;
  }
  RNX_HD IouBox<T> get(int64_t i) const {
    return {{x1[i], y1[i], x2[i], y2[i]}, area[i]};
  }
};

RNX_HD int64_t whole_lanes(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// `count` boxes from row `first` on; the lanes behind them are boxes of no size.
template <typename T>
RNX_HD void load_run(const IouSide& side, int64_t offset, BoxFormat format, int64_t first, int64_t count,
                     BoxRun<T>& run) {
  for (int64_t i = 0; i < count; ++i) {
    run.set(i, iou_box(load_box<T>(side.rows, offset + (first + i) * side.row_stride), format));
  }
  for (int64_t i = count; i < whole_lanes(count); ++i) run.set(i, IouBox<T>{});
}

}  // namespace retinanet_ext
