// IoU of every pair of boxes on the CPU.
//
// A run of boxes (box_iou_runs.h) lies along the result's rows, or along its columns where the rows are short. Blocks of
// the result are one list that the threads share; every number is computed on its own, so that nothing depends on how.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "box_iou/box_iou_args.h"
#include "box_iou/box_iou_runs.h"
#include "common/cpu_dispatch.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/streaming.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kShortRow = 16;  // rows shorter than this are computed column by column

// IoU of a run with one box. The result has room for whole lanes.
template <typename T>
RNX_HD void run_iou(const BoxRun<T>& run, int64_t count, const IouBox<T>& box, T* result) {
  for (int64_t start = 0; start < count; start += kLanes) {
    for (int64_t i = start; i < start + kLanes; ++i) result[i] = box_pair_iou(box, run.get(i));
  }
}

// How the result [batch, N, M] is cut into tasks: `run` boxes of the side that lies along the run, with `others` of the
// other side.
struct Tasks {
  bool by_columns;
  int64_t runs;    // of an image
  int64_t others;  // boxes of the other side in a task
  int64_t groups;  // of others, of an image
  int64_t count;
};

Tasks cut(const BoxIouArgs& args) {
  Tasks tasks{};
  tasks.by_columns = args.second.count < kShortRow;
  const int64_t along = tasks.by_columns ? args.first.count : args.second.count;
  const int64_t across = tasks.by_columns ? args.second.count : args.first.count;
  tasks.runs = (along + kRun - 1) / kRun;
  tasks.others = std::max<int64_t>(1, kTaskPairs / std::min(along, kRun));
  tasks.groups = (across + tasks.others - 1) / tasks.others;
  tasks.count = args.batch * tasks.runs * tasks.groups;
  return tasks;
}

template <typename T>
struct IouBody {
  const BoxIouArgs& args;
  const Tasks& tasks;
  T* result;
  bool streams;

  // A run along the columns `first`, `first` + 1, ... with the rows from `row` on.
  RNX_HD void rows_task(int64_t image, const BroadcastOffsets& offsets, int64_t first, int64_t row) const {
    BoxRun<T> run;
    T values[kRun];
    const int64_t count = std::min(kRun, args.second.count - first);
    load_run(args.second, offsets.second, args.format, first, count, run);
    const int64_t end = std::min(args.first.count, row + tasks.others);
    for (; row < end; ++row) {
      const Box<T> numbers = load_box<T>(args.first.rows, offsets.first + row * args.first.row_stride);
      run_iou(run, count, iou_box(numbers, args.format), values);
      T* target = result + (image * args.first.count + row) * args.second.count + first;
      if (streams) {
        stream_copy(target, values, count);
      } else {
        std::memcpy(target, values, static_cast<size_t>(count) * sizeof(T));
      }
    }
  }

  // A run along the rows `first`, `first` + 1, ... with all columns, which are few.
  RNX_HD void columns_task(int64_t image, const BroadcastOffsets& offsets, int64_t first) const {
    BoxRun<T> run;
    T values[kRun];
    const int64_t columns = args.second.count;
    const int64_t count = std::min(kRun, args.first.count - first);
    load_run(args.first, offsets.first, args.format, first, count, run);
    T* target = result + (image * args.first.count + first) * columns;
    for (int64_t column = 0; column < columns; ++column) {
      const Box<T> numbers = load_box<T>(args.second.rows, offsets.second + column * args.second.row_stride);
      run_iou(run, count, iou_box(numbers, args.format), values);
      for (int64_t i = 0; i < count; ++i) target[i * columns + column] = values[i];
    }
  }

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % tasks.groups;
      const int64_t first = task / tasks.groups % tasks.runs * kRun;
      const int64_t image = task / tasks.groups / tasks.runs;
      const BroadcastOffsets offsets = broadcast_offsets(args.batch_dims, image);
      if (tasks.by_columns) {
        columns_task(image, offsets, first);
      } else {
        rows_task(image, offsets, first, group * tasks.others);
      }
    }
  }
};

template <typename T>
void run(const BoxIouArgs& args, Tensor& result) {
  const size_t bytes = static_cast<size_t>(result.numel()) * sizeof(T);
  const Tasks tasks = cut(args);
  const IouBody<T> body{args, tasks, static_cast<T*>(result.mutable_data_ptr()), outgrows_cache(bytes)};
  prefer_huge_pages(result.mutable_data_ptr(), bytes);
  const auto work = [&](int64_t begin, int64_t end) {
    run_on_best_isa(body, begin, end);
    if (body.streams) stream_fence();
  };
  parallel_for(0, tasks.count, kTasksPerThread, work);
}

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2, int64_t format) {
  const BoxIouArgs args = make_box_iou_args(boxes1, boxes2, format);
  Tensor result = torch::stable::new_empty(boxes1, args.shape, args.type);
  if (result.numel() == 0) return result;
  if (args.type == ScalarType::Double) {
    run<double>(args, result);
  } else {
    run<float>(args, result);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cpu));
}

}  // namespace
}  // namespace retinanet_ext
