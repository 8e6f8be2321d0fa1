// Box regression loss on CUDA: launchers and operators around box_loss_kernel.cuh.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "box_loss/box_loss_args.h"
#include "box_loss/box_loss_kernel.cuh"
#include "cuda/launch.cuh"

namespace retinanet_ext {
namespace {

using torch::stable::Tensor;

template <typename In, BoxTask kTask>
int launch(const CudaScope& scope, const BoxKernelArgs<compute_t<In>>& args) {
  const int blocks = scope.blocks_for(kBoxMinBlocks<In>, args.tiles);
  box_loss_kernel<In, kTask><<<blocks, kBoxThreads, 0, scope.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return blocks;
}

// Images of one launch: all of packed boxes, or as many lists as travel as parameters.
int64_t images_per_launch(const BoxLossArgs& args) {
  return args.gt_offsets.has_value() ? args.batch : std::min<int64_t>(args.batch, kBoxMaxImages);
}

// What all launches share.
template <typename T>
BoxKernelArgs<T> common_args(const BoxLossArgs& args, const Tensor* grad) {
  BoxKernelArgs<T> kernel = {};
  kernel.anchors = static_cast<const T*>(args.anchors.const_data_ptr());
  kernel.anchor_image_stride = args.anchor_image_stride();
  kernel.matched = args.matched.const_data_ptr();
  kernel.wide_matches = args.matched.scalar_type() == ScalarType::Long;
  kernel.num_anchors = args.num_anchors;
  kernel.options = args.options<T>();
  kernel.scale = args.scale;
  if (args.normalizer.has_value()) {
    kernel.normalizer = static_cast<const T*>(args.normalizer->const_data_ptr());
    kernel.normalizer_per_image = args.normalizer->numel() != 1;
  }
  if (args.gt_offsets.has_value()) kernel.gt_offsets = static_cast<const int32_t*>(args.gt_offsets->const_data_ptr());
  if (grad != nullptr) kernel.grad = static_cast<const T*>(grad->const_data_ptr());
  return kernel;
}

template <typename T>
void set_images(const BoxLossArgs& args, int64_t first_image, BoxKernelArgs<T>& kernel) {
  kernel.first_image = static_cast<int>(first_image);
  kernel.images = static_cast<int>(std::min(images_per_launch(args), args.batch - first_image));
  const size_t lists = args.gt_offsets.has_value() ? 1 : kernel.images;
  for (size_t i = 0; i < lists; ++i) {
    const Tensor& boxes = args.gt_boxes[kernel.gt_offsets != nullptr ? i : first_image + i];
    kernel.gt[i] = {static_cast<const T*>(boxes.const_data_ptr()), boxes.size(0)};
  }
}

DeltaMemory memory_of(const DeltaLevel& level, Tensor* gradient) {
  return {level.deltas.const_data_ptr(),
          gradient != nullptr ? gradient->mutable_data_ptr() : nullptr,
          level.image_stride,
          level.channel_stride,
          level.row_stride,
          level.column_stride,
          level.first_anchor,
          level.anchors,
          level.height,
          level.width,
          level.planes()};
}

// `gradients`: one tensor a level; empty for kSum. `block_sums` has room for every launch. Returns the number of blocks
// that left a sum.
template <typename In, BoxTask kTask>
int run(const CudaScope& scope, const BoxLossArgs& args, std::vector<Tensor>& gradients, const Tensor* grad,
        double* block_sums) {
  using T = compute_t<In>;
  BoxKernelArgs<T> kernel = common_args<T>(args, grad);
  int blocks = 0;
  for (int64_t first_image = 0; first_image < args.batch; first_image += images_per_launch(args)) {
    set_images(args, first_image, kernel);
    for (size_t i = 0; i < args.levels.size(); ++i) {
      if (args.levels[i].rows() > 0) {
        const DeltaMemory memory = memory_of(args.levels[i], kTask == BoxTask::kGradient ? &gradients[i] : nullptr);
        require(add_delta_level(memory, kernel), kBoxLossOp, ": deltas[", i, "] are too large for CUDA, with ",
                args.levels[i].rows(), " anchors an image and ", args.batch, " images");
      }
      if (kernel.num_levels == kBoxMaxLevels || (i + 1 == args.levels.size() && kernel.num_levels > 0)) {
        kernel.block_sums = kTask == BoxTask::kSum ? block_sums + blocks : nullptr;
        blocks += launch<In, kTask>(scope, kernel);
        kernel.num_levels = 0;
        kernel.tiles = 0;
      }
    }
  }
  return blocks;
}

int64_t max_launches(const BoxLossArgs& args) {
  const int64_t images = std::max<int64_t>(images_per_launch(args), 1);
  const int64_t levels = static_cast<int64_t>(args.levels.size());
  return (args.batch + images - 1) / images * ((levels + kBoxMaxLevels - 1) / kBoxMaxLevels);
}

Tensor box_regression_loss_cuda(const std::vector<Tensor>& deltas, const Tensor& anchors,
                                const std::vector<Tensor>& gt_boxes, const std::optional<Tensor>& gt_offsets,
                                const Tensor& matched, const std::optional<Tensor>& normalizer, int64_t loss,
                                double beta, double wx, double wy, double ww, double wh, double scale) {
  const CudaScope scope(matched);
  const BoxLossArgs args = make_box_loss_args(deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, loss, beta,
                                              wx, wy, ww, wh, scale);
  const int64_t room = max_launches(args) * kBoxBlocks * scope.multiprocessors();
  Tensor block_sums = torch::stable::new_empty(matched, {room}, ScalarType::Double);
  double* const sums = static_cast<double*>(block_sums.mutable_data_ptr());
  Tensor result = torch::stable::new_empty(matched, {}, compute_type(args.type));
  with_delta_type(args.type, [&](auto storage) {
    using In = decltype(storage);
    using T = compute_t<In>;
    std::vector<Tensor> none;
    const int blocks = run<In, BoxTask::kSum>(scope, args, none, nullptr, sums);
    const int64_t factors = args.batch == 0 ? 0 : args.normalizer.has_value() ? args.normalizer->numel() : 1;
    box_loss_finish_kernel<T><<<1, kBoxThreads, 0, scope.stream()>>>(
        sums, blocks, args.normalizer.has_value() ? static_cast<const T*>(args.normalizer->const_data_ptr()) : nullptr,
        static_cast<int>(factors), args.scale, static_cast<T*>(result.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

std::vector<Tensor> box_regression_loss_backward_cuda(const Tensor& grad, const std::vector<Tensor>& deltas,
                                                      const Tensor& anchors, const std::vector<Tensor>& gt_boxes,
                                                      const std::optional<Tensor>& gt_offsets, const Tensor& matched,
                                                      const std::optional<Tensor>& normalizer, int64_t loss,
                                                      double beta, double wx, double wy, double ww, double wh,
                                                      double scale) {
  const CudaScope scope(matched);
  const BoxLossArgs args = make_box_loss_args(deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, loss, beta,
                                              wx, wy, ww, wh, scale);
  check_box_loss_grad(args, grad);
  std::vector<Tensor> gradients = empty_delta_gradients(args);
  with_delta_type(args.type, [&](auto storage) {
    run<decltype(storage), BoxTask::kGradient>(scope, args, gradients, &grad, nullptr);
  });
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(retinanet_ext, CUDA, m) {
  m.impl("box_regression_loss", TORCH_BOX(&box_regression_loss_cuda));
  m.impl("box_regression_loss_backward", TORCH_BOX(&box_regression_loss_backward_cuda));
}

}  // namespace
}  // namespace retinanet_ext
