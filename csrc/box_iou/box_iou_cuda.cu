// IoU of every pair of boxes on CUDA: launcher and operator around box_iou_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include "box_iou/box_iou_args.h"
#include "box_iou/box_iou_kernel.cuh"
#include "cuda/launch.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

template <typename T, int kColumns>
void launch(const CudaScope& scope, const BoxIouKernelArgs<T>& args) {
  const int blocks = scope.blocks_for(kIouMinBlocks, args.tiles);
  box_iou_kernel<T, kColumns><<<blocks, kIouThreads, 0, scope.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const CudaScope& scope, const BoxIouArgs& args, Tensor& result) {
  BoxIouKernelArgs<T> kernel = {};
  kernel.rows1 = args.first.rows;
  kernel.rows2 = args.second.rows;
  kernel.row_stride1 = args.first.row_stride;
  kernel.row_stride2 = args.second.row_stride;
  kernel.count1 = args.first.count;
  kernel.count2 = args.second.count;
  kernel.batch_dims = args.batch_dims;
  kernel.format = args.format;
  kernel.result = static_cast<T*>(result.mutable_data_ptr());
  cut_iou_tiles(args.batch, static_cast<int64_t>(kIouMinBlocks) * scope.multiprocessors(), kernel);
  if (iou_thread_columns(kernel.count2) == 1) {
    launch<T, 1>(scope, kernel);
  } else {
    launch<T, kIouWideColumns>(scope, kernel);
  }
}

Tensor box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, int64_t format) {
  const BoxIouArgs args = make_box_iou_args(boxes1, boxes2, format);
  Tensor result = torch::stable::new_empty(boxes1, args.shape, args.type);
  if (result.numel() == 0) return result;
  const CudaScope scope(boxes1);
  if (args.type == ScalarType::Double) {
    run<double>(scope, args, result);
  } else {
    run<float>(scope, args, result);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cuda));
}

}  // namespace
}  // namespace retinanet_ext
