// The box coder on CUDA: launcher and operators around box_coder_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include "box_coder/box_coder_args.h"
#include "box_coder/box_coder_kernel.cuh"
#include "cuda/launch.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

template <CoderTask kTask, typename T>
void launch(const CudaScope& scope, const CoderArgs& args) {
  CoderKernelArgs<T> kernel = {};
  if (is_gradient(kTask)) kernel.upstream = box_rows(*args.upstream);
  kernel.values = args.values;
  kernel.anchors = args.anchors;
  kernel.dims = args.dims;
  kernel.rows = args.rows;
  kernel.options = args.options<T>();
  kernel.results[0] = args.results[0];
  kernel.results[1] = args.results[1];
  const int blocks = scope.blocks_for(kCoderMinBlocks, (args.rows + kCoderThreads - 1) / kCoderThreads);
  box_coder_kernel<T, kTask><<<blocks, kCoderThreads, 0, scope.stream()>>>(kernel);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <CoderTask kTask>
void run(const CudaScope& scope, const CoderArgs& args) {
  if (args.rows == 0) return;
  if (args.in_double()) {
    launch<kTask, double>(scope, args);
  } else {
    launch<kTask, float>(scope, args);
  }
}

Tensor encode_boxes_cuda(const Tensor& gt_boxes, const Tensor& anchors, double wx, double wy, double ww, double wh) {
  CoderArgs args = make_coder_args("encode_boxes", "gt_boxes", gt_boxes, anchors, wx, wy, ww, wh, 0);
  const CudaScope scope(gt_boxes);
  Tensor deltas = empty_coded(args, gt_boxes);
  run<CoderTask::kEncode>(scope, args);
  return deltas;
}

Tensor decode_boxes_cuda(const Tensor& deltas, const Tensor& anchors, double wx, double wy, double ww, double wh,
                         double clip) {
  CoderArgs args = make_coder_args("decode_boxes", "deltas", deltas, anchors, wx, wy, ww, wh, clip);
  const CudaScope scope(deltas);
  Tensor boxes = empty_coded(args, deltas);
  run<CoderTask::kDecode>(scope, args);
  return boxes;
}

CoderGradients encode_boxes_backward_cuda(const Tensor& grad, const Tensor& gt_boxes, const Tensor& anchors, double wx,
                                          double wy, double ww, double wh, bool of_gt_boxes, bool of_anchors) {
  constexpr const char* kOp = "encode_boxes_backward";
  CoderArgs args = make_coder_args(kOp, "gt_boxes", gt_boxes, anchors, wx, wy, ww, wh, 0);
  const CudaScope scope(gt_boxes);
  CoderGradients gradients = empty_coder_gradients(kOp, args, grad, gt_boxes, anchors, of_gt_boxes, of_anchors);
  run<CoderTask::kEncodeGradient>(scope, args);
  return gradients;
}

CoderGradients decode_boxes_backward_cuda(const Tensor& grad, const Tensor& deltas, const Tensor& anchors, double wx,
                                          double wy, double ww, double wh, double clip, bool of_deltas,
                                          bool of_anchors) {
  constexpr const char* kOp = "decode_boxes_backward";
  CoderArgs args = make_coder_args(kOp, "deltas", deltas, anchors, wx, wy, ww, wh, clip);
  const CudaScope scope(deltas);
  CoderGradients gradients = empty_coder_gradients(kOp, args, grad, deltas, anchors, of_deltas, of_anchors);
  run<CoderTask::kDecodeGradient>(scope, args);
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cuda));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cuda));
  m.impl("encode_boxes_backward", TORCH_BOX(&encode_boxes_backward_cuda));
  m.impl("decode_boxes_backward", TORCH_BOX(&decode_boxes_backward_cuda));
}

}  // namespace
}  // namespace retinanet_ext
