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

#include <cstdio>

namespace {

using at::Tensor;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void suppress() {
  using Nms = Tensor(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels, double threshold);
  const auto nms = find<Nms>("retinanet_ext::nms");
  const Tensor boxes = at::tensor({0.f, 0.f, 10.f, 10.f, 1.f, 1.f, 11.f, 11.f, 20.f, 20.f, 30.f, 30.f}).view({1, 3, 4});
  const Tensor scores = at::tensor({0.8f, 0.9f, 0.7f}).view({1, 3});
  const Tensor kept = nms.call(boxes, scores, std::nullopt, 0.5);
  std::printf("nms keeps");
  for (int64_t i = 0; i < kept.numel(); ++i) std::printf(" %d", kept[i].item<int>());
  std::printf("\n");
}

// One level of 4 x 4 cells, a stride of 16 pixels and an anchor of 32 x 32 a cell; 3 classes; 2 images.
void detect() {
  using Detect = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      at::TensorList cls_logits, at::TensorList box_deltas, const Tensor& anchors,
      const std::optional<Tensor>& image_sizes, at::ArrayRef<double> size_list, int64_t num_classes,
      double score_thresh, int64_t topk_per_level, double nms_thresh, int64_t max_detections, bool clip_before_nms);
  const auto detect = find<Detect>("retinanet_ext::detect");

  const Tensor centres = (at::arange(4) + 0.5) * 16;
  const Tensor y = centres.view({4, 1}).expand({4, 4}), x = centres.view({1, 4}).expand({4, 4});
  const Tensor anchors = at::stack({x - 16, y - 16, x + 16, y + 16}, -1).view({16, 4});

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
  suppress();
  detect();
}
