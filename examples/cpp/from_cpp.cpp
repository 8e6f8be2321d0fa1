// The operators from C++, without Python: a program that knows libtorch asks torch's dispatcher for them by name.
//
//   TORCH=$(python -c "import torch; print(torch.__path__[0])")
//   LIBRARY=$(python -c "import retinanet_ext; print(retinanet_ext.__path__[0])")/_C.abi3.so
//   cmake -S examples/cpp -B build_from_cpp -DTORCH=$TORCH && cmake --build build_from_cpp
//   build_from_cpp/from_cpp $LIBRARY
//
// The signatures follow csrc/library.cpp, which has all of them: Tensor? is an optional, Tensor[] a list. From C++ the
// operators compute forward; gradients, fake tensors and vmap are registered by the Python package. For CUDA tensors
// load _C_cuda.so as well, and link libtorch_cuda.so (after -Wl,--no-as-needed, for nothing names it).
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>

namespace {

using at::Tensor;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A line: the name, then every number.
void print(const char* name, const Tensor& values) {
  std::printf("%s", name);
  const Tensor flat = values.to(at::kDouble).contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) std::printf(" %.4f", flat.const_data_ptr<double>()[i]);
  std::printf("\n");
}

// One level of 4 x 4 cells, a stride of 16 pixels and an anchor of 32 x 32 a cell: [16, 4].
Tensor make_anchors() {
  const Tensor centres = (at::arange(4) + 0.5) * 16;
  const Tensor y = centres.view({4, 1}).expand({4, 4}), x = centres.view({1, 4}).expand({4, 4});
  return at::stack({x - 16, y - 16, x + 16, y + 16}, -1).view({16, 4});
}

// What a training step computes: two images with an object each, three classes.
void losses(const Tensor& anchors) {
  using Iou = Tensor(const Tensor& boxes1, const Tensor& boxes2, int64_t fmt);
  using Match = Tensor(const Tensor& anchors, at::TensorList gt_boxes, at::TensorList gt_ignore,
                       const std::optional<Tensor>& gt_offsets, double fg_iou_thresh, double bg_iou_thresh,
                       bool allow_low_quality_matches, int64_t policy, double min_pos_iou);
  using Assign = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor& anchors, at::TensorList gt_boxes, at::TensorList gt_labels, at::TensorList gt_ignore,
      const std::optional<Tensor>& gt_offsets, double fg_iou_thresh, double bg_iou_thresh,
      bool allow_low_quality_matches, int64_t policy, double min_pos_iou);
  using Encode = Tensor(const Tensor& gt_boxes, const Tensor& anchors, double wx, double wy, double ww, double wh);
  using Decode = Tensor(const Tensor& deltas, const Tensor& anchors, double wx, double wy, double ww, double wh,
                        double clip);
  using Focal = Tensor(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& class_alpha, double alpha, double gamma, double label_smoothing,
                       int64_t ignore_index, int64_t reduction, bool float32_loss);
  using LevelsFocal = Tensor(at::TensorList logits, const Tensor& targets, const std::optional<Tensor>& normalizer,
                             int64_t num_classes, double alpha, double gamma, double scale);
  using BoxLoss = Tensor(at::TensorList deltas, const Tensor& anchors, at::TensorList gt_boxes,
                         const std::optional<Tensor>& gt_offsets, const Tensor& matched,
                         const std::optional<Tensor>& normalizer, int64_t loss, double beta, double wx, double wy,
                         double ww, double wh, double scale);

  const Tensor first = at::tensor({16.f, 22.f, 48.f, 54.f}).view({1, 4});
  const Tensor second = at::tensor({30.f, 30.f, 62.f, 62.f}).view({1, 4});
  const Tensor ones = at::ones({1}, at::kLong);
  const auto iou = find<Iou>("retinanet_ext::box_iou").call(first, anchors, 0);
  print("box_iou", iou);

  const auto [labels, matched, counts] = find<Assign>("retinanet_ext::assign_targets")
                                             .call(anchors, {first, second}, {ones, ones * 2}, {}, std::nullopt, 0.5, 0.4,
                                                   true, 0, 0.0);
  print("labels", labels);
  print("matched", matched);
  print("foreground", counts);
  const Tensor normalizer = counts.to(at::kFloat);
  const Tensor rows = find<Match>("retinanet_ext::match_anchors")
                          .call(anchors, {first, second}, {}, std::nullopt, 0.5, 0.4, true, 0, 0.0);
  print("match_anchors", rows);

  const Tensor deltas = find<Encode>("retinanet_ext::encode_boxes").call(first, anchors, 1, 1, 1, 1);
  print("encode_boxes", deltas[9]);
  const Tensor boxes =
      find<Decode>("retinanet_ext::decode_boxes").call(deltas, anchors, 1, 1, 1, 1, std::log(1000.0 / 16));
  print("decode_boxes", boxes[9]);

  const Tensor logits = at::linspace(-4, 2, 2 * 3 * 4 * 4).view({2, 3, 4, 4});  // [B, A * K, H, W]
  const Tensor by_row = logits.permute({0, 2, 3, 1}).reshape({2 * 16, 3});
  const Tensor focal = find<Focal>("retinanet_ext::sigmoid_focal_loss")
                           .call(by_row, labels.view({-1}), std::nullopt, std::nullopt, 0.25, 2, 0, -2, 2, true);
  print("sigmoid_focal_loss", focal);
  print("multilevel_focal_loss", find<LevelsFocal>("retinanet_ext::multilevel_focal_loss")
                                     .call({logits}, labels, normalizer, 3, 0.25, 2, 1));

  const Tensor levels = at::linspace(-1, 1, 2 * 4 * 4 * 4).view({2, 4, 4, 4});
  print("box_regression_loss", find<BoxLoss>("retinanet_ext::box_regression_loss")
                                   .call({levels}, anchors, {first, second}, std::nullopt, matched, normalizer, 1,
                                         1.0 / 9, 1, 1, 1, 1, 1));
}

void suppress() {
  using Nms = Tensor(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double threshold);
  using Padded = std::tuple<Tensor, Tensor>(const Tensor& boxes, const Tensor& scores, const Tensor& labels,
                                            const std::optional<Tensor>& num_valid, double iou_threshold,
                                            int64_t max_detections);
  const Tensor boxes = at::tensor({0.f, 0.f, 10.f, 10.f, 1.f, 1.f, 11.f, 11.f, 20.f, 20.f, 30.f, 30.f}).view({1, 3, 4});
  const Tensor scores = at::tensor({0.8f, 0.9f, 0.7f}).view({1, 3});
  print("nms", find<Nms>("retinanet_ext::nms").call(boxes, scores, std::nullopt, 0.5));
  const Tensor labels = at::zeros({1, 3}, at::kLong);
  const auto [indices, counts] =
      find<Padded>("retinanet_ext::batched_nms_padded").call(boxes, scores, labels, std::nullopt, 0.5, 3);
  print("batched_nms_padded", indices);
  print("counts", counts);
}

// 3 classes, 2 images.
void detect(const Tensor& anchors) {
  using Detect = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      at::TensorList cls_logits, at::TensorList box_deltas, const Tensor& anchors,
      const std::optional<Tensor>& image_sizes, at::ArrayRef<double> size_list, int64_t num_classes,
      double score_thresh, int64_t topk_per_level, double nms_thresh, int64_t max_detections, bool clip_before_nms);
  const auto detect = find<Detect>("retinanet_ext::detect");

  const Tensor logits = at::full({2, 3, 4, 4}, -5.0);
  const Tensor deltas = at::zeros({2, 4, 4, 4});
  logits[0][1][2][1] = 3;
  logits[0][1][2][2] = 2;  // its neighbour, which by its dx reports the same box
  deltas[0][0][2][2] = -0.5;
  logits[1][2][3][3] = 1;  // at the corner of the image, which clips its box

  const auto [boxes, scores, labels, indices, counts] =
      detect.call({logits}, {deltas}, anchors, std::nullopt, {64.0, 64.0, 60.0, 60.0}, 3, 0.05, 1000, 0.5, 10, true);
  for (int64_t image = 0; image < counts.numel(); ++image) {
    for (int64_t i = 0; i < counts[image].item<int64_t>(); ++i) {
      const Tensor box = boxes[image][i].contiguous();
      const float* side = box.const_data_ptr<float>();
      std::printf("image %d: class %d, score %.4f, box %.1f %.1f %.1f %.1f\n", static_cast<int>(image),
                  labels[image][i].item<int>(), scores[image][i].item<float>(), side[0], side[1], side[2], side[3]);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s path/to/retinanet_ext/_C.abi3.so\n", arguments[0]);
    return 2;
  }
  // Registers the operators with the dispatcher.
  if (dlopen(arguments[1], RTLD_LAZY) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode no_gradients;
  const Tensor anchors = make_anchors();
  losses(anchors);
  suppress();
  detect(anchors);
}
