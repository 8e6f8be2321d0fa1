// The box coder on the CPU: encoding, decoding and their gradients, block by block.
//
// Rows are brought into arrays of their numbers, so that the arithmetic vectorises, and results are written in order. A
// block may hold several pieces of dimensions that broadcast.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "box_coder/box_coder_args.h"
#include "common/cpu_dispatch.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 128;         // rows; 2 KiB of float in each array of numbers
constexpr int64_t kTaskRows = 4096;     // of a parallel task
constexpr int64_t kTasksPerThread = 2;  // at least: less does not pay for waking a thread

template <typename T>
struct RowBlock {
  T x1[kBlock];
  T y1[kBlock];
  T x2[kBlock];
  T y2[kBlock];

  RNX_HD void set(int64_t i, const Box<T>& row) {
    x1[i] = row.x1;
    y1[i] = row.y1;
    x2[i] = row.x2;
    y2[i] = row.y2;
  }
  RNX_HD Box<T> get(int64_t i) const {
    return {x1[i], y1[i], x2[i], y2[i]};
  }
};

// Reading and writing are bodies of their own, out of line: compiled once for each pair of types and
// instruction set, not in every task.
template <typename S, typename T>
struct ReadBody {
  const BoxRows& rows;
  int64_t offset;
  int64_t stride;
  RowBlock<T>& block;
  int64_t first;  // place in the block

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    if (rows.whole && stride == 4) {  // side by side: vectorises
      for (int64_t i = begin; i < end; ++i) block.set(first + i, load_box_as<T, S>(rows, offset + 4 * i));
    } else {
      for (int64_t i = begin; i < end; ++i) block.set(first + i, load_box_as<T, S>(rows, offset + i * stride));
    }
  }
};

template <typename S, typename T>
struct WriteBody {
  const BoxResult& result;
  int64_t row;
  const RowBlock<T>& block;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) store_box_as<S>(result, row + i, block.get(i));
  }
};

template <typename S, typename T>
void read_rows_as(const BoxRows& rows, int64_t offset, int64_t stride, int64_t first, int64_t count,
                  RowBlock<T>& block) {
  run_on_best_isa(ReadBody<S, T>{rows, offset, stride, block, first}, 0, count);
}

template <typename S, typename T>
void write_rows_as(const BoxResult& result, int64_t row, int64_t count, const RowBlock<T>& block) {
  run_on_best_isa(WriteBody<S, T>{result, row, block}, 0, count);
}

// `count` rows, `stride` elements apart, to the places from `first` on.
template <typename T>
void read_rows(const BoxRows& rows, int64_t offset, int64_t stride, int64_t first, int64_t count,
               RowBlock<T>& block) {
  switch (rows.type) {
    case BoxType::kFloat64:
      return read_rows_as<double>(rows, offset, stride, first, count, block);
    case BoxType::kFloat32:
      return read_rows_as<float>(rows, offset, stride, first, count, block);
    case BoxType::kFloat16:
      return read_rows_as<Float16>(rows, offset, stride, first, count, block);
    default:
      return read_rows_as<BFloat16>(rows, offset, stride, first, count, block);
  }
}

template <typename T>
void write_rows(const BoxResult& result, int64_t row, int64_t count, const RowBlock<T>& block) {
  switch (result.type) {
    case BoxType::kFloat64:
      return write_rows_as<double>(result, row, count, block);
    case BoxType::kFloat32:
      return write_rows_as<float>(result, row, count, block);
    case BoxType::kFloat16:
      return write_rows_as<Float16>(result, row, count, block);
    default:
      return write_rows_as<BFloat16>(result, row, count, block);
  }
}

template <CoderTask kTask, typename T>
struct CoderBody {
  const CoderArgs& args;
  BoxRows upstream;
  CoderOptions<T> options;

  // What is read by rows: values, anchors and, for gradients, the upstream gradient.
  static constexpr int kSources = is_gradient(kTask) ? 3 : 2;

  RNX_HD void read_blocks(int64_t row, int64_t count, RowBlock<T>* blocks) const {
    const BroadcastDims& dims = args.dims;
    const int last = dims.count - 1;
    const int64_t inner = last < 0 ? 1 : dims.sizes[last];
    const BoxRows* const sources[] = {&args.values, &args.anchors, &upstream};
    const int64_t strides[] = {last < 0 ? 0 : dims.strides[0][last], last < 0 ? 0 : dims.strides[1][last], 4};
    for (int64_t filled = 0; filled < count;) {
      const BroadcastOffsets broadcast = broadcast_offsets(dims, row + filled);
      const int64_t offsets[] = {broadcast.first, broadcast.second, 4 * (row + filled)};
      const int64_t piece = std::min(count - filled, inner - (row + filled) % inner);
      for (int i = 0; i < kSources; ++i) read_rows(*sources[i], offsets[i], strides[i], filled, piece, blocks[i]);
      filled += piece;
    }
  }

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    RowBlock<T> blocks[kSources];
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t count = std::min(kBlock, end - row);
      read_blocks(row, count, blocks);
      for (int64_t i = 0; i < count; ++i) {
        const Box<T> above = is_gradient(kTask) ? blocks[kSources - 1].get(i) : Box<T>{};
        const CoderRow<T> result = coder_row<kTask>(above, blocks[0].get(i), blocks[1].get(i), options);
        blocks[0].set(i, result.first);
        blocks[1].set(i, result.second);
      }
      for (int i = 0; i < 2; ++i) {
        if (args.results[i].data != nullptr) write_rows(args.results[i], row, count, blocks[i]);
      }
    }
  }
};

template <CoderTask kTask, typename T>
void run(const CoderArgs& args) {
  const CoderBody<kTask, T> body{args, is_gradient(kTask) ? box_rows(*args.upstream) : BoxRows{}, args.options<T>()};
  for (const BoxResult& result : args.results) {
    if (result.data != nullptr) prefer_huge_pages(result.data, box_bytes(result.type) * static_cast<size_t>(args.rows));
  }
  const int64_t tasks = (args.rows + kTaskRows - 1) / kTaskRows;
  parallel_for(0, tasks, kTasksPerThread, [&](int64_t begin, int64_t end) {
    run_on_best_isa(body, begin * kTaskRows, std::min(args.rows, end * kTaskRows));
  });
}

template <CoderTask kTask>
void run(const CoderArgs& args) {
  if (args.rows == 0) return;
  if (args.in_double()) {
    run<kTask, double>(args);
  } else {
    run<kTask, float>(args);
  }
}

Tensor encode_boxes_cpu(const Tensor& gt_boxes, const Tensor& anchors, double wx, double wy, double ww, double wh) {
  CoderArgs args = make_coder_args("encode_boxes", "gt_boxes", gt_boxes, anchors, wx, wy, ww, wh, 0);
  Tensor deltas = empty_coded(args, gt_boxes);
  run<CoderTask::kEncode>(args);
  return deltas;
}

Tensor decode_boxes_cpu(const Tensor& deltas, const Tensor& anchors, double wx, double wy, double ww, double wh,
                        double clip) {
  CoderArgs args = make_coder_args("decode_boxes", "deltas", deltas, anchors, wx, wy, ww, wh, clip);
  Tensor boxes = empty_coded(args, deltas);
  run<CoderTask::kDecode>(args);
  return boxes;
}

CoderGradients encode_boxes_backward_cpu(const Tensor& grad, const Tensor& gt_boxes, const Tensor& anchors, double wx,
                                         double wy, double ww, double wh, bool of_gt_boxes, bool of_anchors) {
  constexpr const char* kOp = "encode_boxes_backward";
  CoderArgs args = make_coder_args(kOp, "gt_boxes", gt_boxes, anchors, wx, wy, ww, wh, 0);
  CoderGradients gradients = empty_coder_gradients(kOp, args, grad, gt_boxes, anchors, of_gt_boxes, of_anchors);
  run<CoderTask::kEncodeGradient>(args);
  return gradients;
}

CoderGradients decode_boxes_backward_cpu(const Tensor& grad, const Tensor& deltas, const Tensor& anchors, double wx,
                                         double wy, double ww, double wh, double clip, bool of_deltas,
                                         bool of_anchors) {
  constexpr const char* kOp = "decode_boxes_backward";
  CoderArgs args = make_coder_args(kOp, "deltas", deltas, anchors, wx, wy, ww, wh, clip);
  CoderGradients gradients = empty_coder_gradients(kOp, args, grad, deltas, anchors, of_deltas, of_anchors);
  run<CoderTask::kDecodeGradient>(args);
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CPU, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cpu));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cpu));
  m.impl("encode_boxes_backward", TORCH_BOX(&encode_boxes_backward_cpu));
  m.impl("decode_boxes_backward", TORCH_BOX(&decode_boxes_backward_cpu));
}

}  // namespace
}  // namespace retinanet_ext
