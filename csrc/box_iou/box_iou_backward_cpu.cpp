// The gradient of both sides' boxes on the CPU, each side in a pass of its own over the pairs: no matrix beside the
// upstream gradient is formed.
//
// Rows     A task has rows of its own and goes through all columns, run by run.
// Columns  A task has a run of columns and up to kChunkRows rows; what chunks give is added in their order.
// Sums     Some hundred terms in the computation's type, these in float64: the result depends on no number of threads,
//          and its error does not grow with the number of boxes.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "box_iou/box_iou_args.h"
#include "box_iou/box_iou_gradient.h"
#include "box_iou/box_iou_runs.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunkRows = 1024;  // of a task of columns
constexpr int64_t kSumRows = 128;     // that are added up before they go to float64
constexpr int64_t kTaskRows = 256;    // of a task of rows, at most

template <typename T>
struct GradientArgs {
  const BoxIouArgs& boxes;
  const T* grad;  // [batch, N, M]
  T* gradient1;   // [batch, N, 4]
  T* gradient2;   // [batch, M, 4]

  RNX_HD const T* grad_row(int64_t image, int64_t row) const {
    return grad + (image * boxes.first.count + row) * boxes.second.count;
  }
};

template <typename T>
RNX_HD IouBox<T> box_at(const IouSide& side, int64_t offset, int64_t row, BoxFormat format) {
  return iou_box(load_box<T>(side.rows, offset + row * side.row_stride), format);
}

template <typename T>
void store_gradient(const IouSide& side, int64_t offset, int64_t row, BoxFormat format, const IouGradient<double>& sum,
                    T* target) {
  const Box<double> numbers = load_box<double>(side.rows, offset + row * side.row_stride);
  const Box<double> gradient = iou_box_gradient(numbers, sum, format);
  target[0] = static_cast<T>(gradient.x1);
  target[1] = static_cast<T>(gradient.y1);
  target[2] = static_cast<T>(gradient.x2);
  target[3] = static_cast<T>(gradient.y2);
}

// Sums in lanes, or of the boxes of a run.
template <typename T, int64_t kCount>
struct GradientSums {
  T x1[kCount];
  T y1[kCount];
  T x2[kCount];
  T y2[kCount];
  T area[kCount];

  RNX_HD void clear(int64_t count) {
    for (T* values : {x1, y1, x2, y2, area}) std::fill(values, values + count, T(0));
  }
  RNX_HD void add(int64_t i, const IouGradient<T>& gradient) {
    x1[i] += gradient.x1;
    y1[i] += gradient.y1;
    x2[i] += gradient.x2;
    y2[i] += gradient.y2;
    area[i] += gradient.area;
  }
  RNX_HD IouGradient<T> get(int64_t i) const {
    return {x1[i], y1[i], x2[i], y2[i], area[i]};
  }
};

RNX_HD void add_to(IouGradient<double>& sum, const IouGradient<double>& part) {
  sum.x1 += part.x1;
  sum.y1 += part.y1;
  sum.x2 += part.x2;
  sum.y2 += part.y2;
  sum.area += part.area;
}

template <typename T>
RNX_HD IouGradient<double> widened(const IouGradient<T>& gradient) {
  return {gradient.x1, gradient.y1, gradient.x2, gradient.y2, gradient.area};
}

template <typename T>
struct RowsBody {
  const GradientArgs<T>& args;
  int64_t task_rows;
  int64_t groups;  // of rows, of an image

  // The sum over a run of columns, for one row.
  RNX_HD IouGradient<double> over_run(const BoxRun<T>& run, int64_t count, const IouBox<T>& row, const T* grad) const {
    GradientSums<T, kLanes> sums;
    sums.clear(kLanes);
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t start = 0; start < whole; start += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) sums.add(i, pair_gradient(row, run.get(start + i), grad[start + i]));
    }
    for (int64_t i = whole; i < count; ++i) sums.add(i - whole, pair_gradient(row, run.get(i), grad[i]));
    IouGradient<double> sum{};
    for (int64_t i = 0; i < kLanes; ++i) add_to(sum, widened(sums.get(i)));
    return sum;
  }

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    const BoxIouArgs& boxes = args.boxes;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / groups;
      const int64_t first = task % groups * task_rows;
      const int64_t rows = std::min(task_rows, boxes.first.count - first);
      const BroadcastOffsets offsets = broadcast_offsets(boxes.batch_dims, image);
      IouGradient<double> sums[kTaskRows] = {};
      for (int64_t start = 0; start < boxes.second.count; start += kRun) {
        BoxRun<T> run;
        const int64_t count = std::min(kRun, boxes.second.count - start);
        load_run(boxes.second, offsets.second, boxes.format, start, count, run);
        for (int64_t i = 0; i < rows; ++i) {
          const IouBox<T> row = box_at<T>(boxes.first, offsets.first, first + i, boxes.format);
          add_to(sums[i], over_run(run, count, row, args.grad_row(image, first + i) + start));
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        T* target = args.gradient1 + 4 * (image * boxes.first.count + first + i);
        store_gradient(boxes.first, offsets.first, first + i, boxes.format, sums[i], target);
      }
    }
  }
};

template <typename T>
struct ColumnsBody {
  const GradientArgs<T>& args;
  int64_t runs;                  // of an image
  int64_t chunks;                // of rows, of an image
  IouGradient<double>* partial;  // [batch, chunks, M]

  // Adds the sums over `rows` rows from `row` on, for each column of a run.
  RNX_HD void over_rows(const BoxRun<T>& run, int64_t start, int64_t count, int64_t image, int64_t offset, int64_t row,
                        int64_t rows, IouGradient<double>* target) const {
    GradientSums<T, kRun> sums;
    T grad[kRun] = {};
    const int64_t lanes = whole_lanes(count);
    sums.clear(lanes);
    for (int64_t end = row + rows; row < end; ++row) {
      const IouBox<T> box = box_at<T>(args.boxes.first, offset, row, args.boxes.format);
      std::memcpy(grad, args.grad_row(image, row) + start, static_cast<size_t>(count) * sizeof(T));
      for (int64_t first = 0; first < lanes; first += kLanes) {
        for (int64_t i = first; i < first + kLanes; ++i) sums.add(i, pair_gradient(run.get(i), box, grad[i]));
      }
    }
    for (int64_t i = 0; i < count; ++i) add_to(target[i], widened(sums.get(i)));
  }

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    const BoxIouArgs& boxes = args.boxes;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / runs % chunks;
      const int64_t image = task / runs / chunks;
      const int64_t start = task % runs * kRun;
      const int64_t count = std::min(kRun, boxes.second.count - start);
      const BroadcastOffsets offsets = broadcast_offsets(boxes.batch_dims, image);
      BoxRun<T> run;
      load_run(boxes.second, offsets.second, boxes.format, start, count, run);
      IouGradient<double>* target = partial + (image * chunks + chunk) * boxes.second.count + start;
      const int64_t last = std::min(boxes.first.count, (chunk + 1) * kChunkRows);
      for (int64_t row = chunk * kChunkRows; row < last; row += kSumRows) {
        over_rows(run, start, count, image, offsets.first, row, std::min(kSumRows, last - row), target);
      }
    }
  }
};

template <typename T>
void rows_gradient(const GradientArgs<T>& args) {
  const int64_t columns = std::max<int64_t>(1, args.boxes.second.count);
  const int64_t task_rows = std::clamp<int64_t>(kTaskPairs / columns, 1, kTaskRows);
  const int64_t groups = (args.boxes.first.count + task_rows - 1) / task_rows;
  const RowsBody<T> body{args, task_rows, groups};
  parallel_for(0, args.boxes.batch * groups, kTasksPerThread,
               [&](int64_t begin, int64_t end) { run_on_best_isa(body, begin, end); });
}

template <typename T>
void columns_gradient(const GradientArgs<T>& args) {
  const BoxIouArgs& boxes = args.boxes;
  const int64_t columns = boxes.second.count;
  const int64_t runs = (columns + kRun - 1) / kRun;
  const int64_t chunks = (boxes.first.count + kChunkRows - 1) / kChunkRows;
  std::vector<IouGradient<double>> partial(static_cast<size_t>(boxes.batch * chunks * columns));
  const ColumnsBody<T> body{args, runs, chunks, partial.data()};
  parallel_for(0, boxes.batch * chunks * runs, 1,
               [&](int64_t begin, int64_t end) { run_on_best_isa(body, begin, end); });
  for (int64_t image = 0; image < boxes.batch; ++image) {
    const int64_t offset = broadcast_offsets(boxes.batch_dims, image).second;
    for (int64_t column = 0; column < columns; ++column) {
      IouGradient<double> sum{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        add_to(sum, partial[static_cast<size_t>((image * chunks + chunk) * columns + column)]);
      }
      store_gradient(boxes.second, offset, column, boxes.format, sum, args.gradient2 + 4 * (image * columns + column));
    }
  }
}

template <typename T>
void run(const BoxIouArgs& boxes, const Tensor& grad, Tensor& gradient1, Tensor& gradient2) {
  const GradientArgs<T> args{boxes, static_cast<const T*>(grad.const_data_ptr()),
                             static_cast<T*>(gradient1.mutable_data_ptr()),
                             static_cast<T*>(gradient2.mutable_data_ptr())};
  rows_gradient(args);
  columns_gradient(args);
}

std::vector<int64_t> gradient_shape(const BoxIouArgs& args, int64_t count) {
  std::vector<int64_t> shape(args.shape.begin(), args.shape.end() - 2);
  shape.insert(shape.end(), {count, 4});
  return shape;
}

std::tuple<Tensor, Tensor> box_iou_backward_cpu(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                                                int64_t format) {
  const BoxIouArgs args = make_box_iou_args(boxes1, boxes2, format);
  bool fits = grad.is_contiguous() && grad.scalar_type() == args.type &&
              grad.dim() == static_cast<int64_t>(args.shape.size());
  for (int64_t d = 0; fits && d < grad.dim(); ++d) fits = grad.size(d) == args.shape[static_cast<size_t>(d)];
  require(fits, "box_iou_backward: grad must be contiguous, of the result's type and shape, and is ",
          type_name(grad.scalar_type()), " of shape ", shape_text(grad));
  Tensor gradient1 = torch::stable::new_empty(boxes1, gradient_shape(args, args.first.count), args.type);
  Tensor gradient2 = torch::stable::new_empty(boxes1, gradient_shape(args, args.second.count), args.type);
  if (args.type == ScalarType::Double) {
    run<double>(args, grad, gradient1, gradient2);
  } else {
    run<float>(args, grad, gradient1, gradient2);
  }
  return {gradient1, gradient2};
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("box_iou_backward", TORCH_BOX(&box_iou_backward_cpu));
}

}  // namespace
}  // namespace retinanet_ext
