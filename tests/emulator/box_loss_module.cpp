// The box regression loss kernel under the emulator, over NumPy arrays of storage elements (float64, float32, or uint16
// bit patterns), one a level.
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "box_loss/box_loss_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::DeviceBuffer;
using emulator::order_of;

namespace {

struct Level {
  py::array memory;               // as it lies from the first element on
  std::array<int64_t, 4> strides;  // image, channel, row, column
  int anchors;
  int height;
  int width;
  bool planes;
};

struct Problem {
  std::vector<Level> levels;
  py::array anchors;                  // [N, 4] or [B, N, 4]
  std::vector<py::array> gt_boxes;    // [M_i, 4] an image, or one [capacity, 4]
  std::optional<py::array> gt_offsets;
  py::array matched;                  // [B, N]
};

struct Options {
  std::string task;  // sum, gradient
  int64_t loss;
  double beta;
  std::array<double, 4> weights;
  std::optional<py::array> normalizer;
  double scale;
  double grad;
  int blocks;
  int images_per_launch;
  emulator::Schedule schedule;
};

// A copy of an array, which may be empty.
std::unique_ptr<DeviceBuffer> buffer_of(const py::array& array) {
  return array.nbytes() > 0 ? std::make_unique<DeviceBuffer>(array) : std::make_unique<DeviceBuffer>(std::size_t{0});
}

template <typename In>
class Runner {
  using T = compute_t<In>;

 public:
  Runner(const Problem& problem, const Options& options)
      : problem_(problem), options_(options), batch_(problem.matched.shape(0)) {
    args_.anchors = place<T>(problem.anchors);
    args_.anchor_image_stride = problem.anchors.ndim() == 3 ? problem.anchors.shape(1) * 4 : 0;
    args_.matched = place<void>(problem.matched);
    args_.wide_matches = problem.matched.itemsize() == sizeof(int64_t);
    args_.num_anchors = problem.matched.shape(1);
    const std::array<double, 4>& w = options.weights;
    args_.options = {static_cast<BoxLoss>(options.loss), static_cast<T>(options.beta),
                     {static_cast<T>(w[0]), static_cast<T>(w[1]), static_cast<T>(w[2]), static_cast<T>(w[3])}};
    args_.scale = options.scale;
    if (options.normalizer) {
      args_.normalizer = place<T>(*options.normalizer);
      args_.normalizer_per_image = options.normalizer->size() != 1;
    }
    if (problem.gt_offsets) args_.gt_offsets = place<int32_t>(*problem.gt_offsets);
    for (const py::array& boxes : problem.gt_boxes) boxes_.push_back({place<T>(boxes), boxes.shape(0)});
  }

  py::object sum() {
    const int launches = (batch_ + options_.images_per_launch - 1) / options_.images_per_launch;
    DeviceBuffer sums(sizeof(double) * static_cast<std::size_t>(launches * options_.blocks));
    int blocks = 0;
    each_launch([&](BoxKernelArgs<T>& args) {
      args.block_sums = sums.as<double>() + blocks;
      blocks += options_.blocks;
      run([&] { box_loss_kernel<In, BoxTask::kSum>(args); }, options_.blocks);
    });
    const int factors = batch_ == 0 ? 0 : options_.normalizer ? static_cast<int>(options_.normalizer->size()) : 1;
    DeviceBuffer result(sizeof(T));
    run([&] {
      box_loss_finish_kernel<T>(sums.as<double>(), blocks, args_.normalizer, factors, options_.scale, result.as<T>());
    }, 1);
    return py::float_(static_cast<double>(*result.as<T>()));
  }

  std::vector<py::array> gradients() {
    DeviceBuffer grad(sizeof(T));
    *grad.as<T>() = static_cast<T>(options_.grad);
    args_.grad = grad.as<T>();
    for (const Level& level : problem_.levels) {
      const py::ssize_t elements = static_cast<py::ssize_t>(batch_) * 4 * level.anchors * level.height * level.width;
      outputs_.push_back(py::array(level.memory.dtype(), elements));
      gradients_.push_back(std::make_unique<DeviceBuffer>(static_cast<std::size_t>(outputs_.back().nbytes())));
    }
    each_launch([&](BoxKernelArgs<T>& args) {
      run([&] { box_loss_kernel<In, BoxTask::kGradient>(args); }, options_.blocks);
    });
    for (std::size_t l = 0; l < outputs_.size(); ++l) {
      if (outputs_[l].nbytes() > 0) gradients_[l]->copy_to(outputs_[l]);
    }
    return outputs_;
  }

 private:
  template <typename V>
  V* place(const py::array& array) {
    buffers_.push_back(buffer_of(array));
    return buffers_.back()->template as<V>();
  }

  template <typename F>
  void run(const F& kernel, int blocks) {
    emulator::Machine::get().run(blocks, kBoxThreads, options_.schedule, kernel);
  }

  template <typename F>
  void each_launch(const F& launch) {
    for (int first = 0; first < batch_; first += options_.images_per_launch) {
      BoxKernelArgs<T> args = args_;
      args.first_image = first;
      args.images = std::min(options_.images_per_launch, batch_ - first);
      const int lists = problem_.gt_offsets ? 1 : args.images;
      for (int i = 0; i < lists; ++i) args.gt[i] = boxes_[problem_.gt_offsets ? 0 : first + i];
      int64_t first_anchor = 0;
      for (std::size_t l = 0; l < problem_.levels.size(); ++l) {
        const Level& level = problem_.levels[l];
        const auto& [image, channel, row, column] = level.strides;
        if (levels_.size() <= l) levels_.push_back(buffer_of(level.memory));
        void* const gradient = gradients_.empty() ? nullptr : gradients_[l]->template as<void>();
        const DeltaMemory memory{levels_[l]->template as<void>(), gradient, image, channel, row, column, first_anchor,
                                 level.anchors, level.height, level.width, level.planes};
        if (!add_delta_level(memory, args)) throw std::invalid_argument("a level is too large");
        first_anchor += static_cast<int64_t>(level.anchors) * level.height * level.width;
      }
      launch(args);
    }
  }

  const Problem& problem_;
  const Options& options_;
  const int batch_;
  BoxKernelArgs<T> args_ = {};
  std::vector<GtBoxList<T>> boxes_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::vector<std::unique_ptr<DeviceBuffer>> levels_;
  std::vector<std::unique_ptr<DeviceBuffer>> gradients_;
  std::vector<py::array> outputs_;
};

template <typename In>
py::object run(const Problem& problem, const Options& options) {
  Runner<In> runner(problem, options);
  return options.task == "sum" ? runner.sum() : py::cast(runner.gradients());
}

}  // namespace

PYBIND11_MODULE(_box_loss_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("max_levels") = kBoxMaxLevels;
  m.attr("max_images") = kBoxMaxImages;
  m.attr("threads") = kBoxThreads;
  m.attr("batch") = kBoxBatch;
  m.attr("cell_step") = kCellStep;
  m.def(
      "tiling",
      [](int64_t anchors, int64_t height, int64_t width, int images, int tiles) -> py::object {
        BoxKernelArgs<float> args = {};
        args.images = images;
        args.tiles = tiles;
        const DeltaMemory level{nullptr, nullptr, 0, 0, 0, 0, 0, anchors, height, width, true};
        if (!add_delta_level(level, args)) return py::none();
        return py::make_tuple(args.levels[0].cells_per_tile, args.levels[0].tiles_per_image, args.tiles);
      },
      "Cells of a tile, tiles of an image, and all tiles, of a level behind `tiles` others; None: it is too large.",
      py::arg("anchors"), py::arg("height"), py::arg("width"), py::arg("images"), py::arg("tiles"));
  m.def(
      "finish",
      [](const py::array_t<double>& block_sums, std::optional<py::array_t<float>> normalizer, int factors, double scale,
         const std::string& order) {
        DeviceBuffer sums(block_sums);
        std::optional<DeviceBuffer> divisors;
        const float* const divisor = normalizer ? divisors.emplace(*normalizer).as<float>() : nullptr;
        DeviceBuffer result(sizeof(float));
        emulator::Machine::get().run(1, kBoxThreads, {order_of(order), 1, 1}, [&] {
          box_loss_finish_kernel<float>(sums.as<double>(), static_cast<int>(block_sums.size()), divisor, factors, scale,
                                        result.as<float>());
        });
        return *result.as<float>();
      },
      "The second stage of the sum alone.", py::arg("block_sums"), py::arg("normalizer"), py::arg("factors"),
      py::arg("scale"), py::arg("order") = "forward");
  m.def(
      "box_loss",
      [](const std::string& storage,
         const std::vector<std::tuple<py::array, std::array<int64_t, 4>, int, int, int, bool>>& levels,
         const py::array& anchors, const std::vector<py::array>& gt_boxes, const py::array& matched,
         std::optional<py::array> gt_offsets, const std::string& task, int64_t loss, double beta,
         const std::array<double, 4>& weights, std::optional<py::array> normalizer, double scale, double grad,
         int blocks, int images_per_launch, const std::string& order, uint64_t seed, int live_blocks) {
        Problem problem{{}, anchors, gt_boxes, gt_offsets, matched};
        for (const auto& [memory, strides, cell_anchors, height, width, planes] : levels) {
          problem.levels.push_back({memory, strides, cell_anchors, height, width, planes});
        }
        const Options options{task, loss,   beta,              weights, normalizer, scale,
                              grad, blocks, images_per_launch, {order_of(order), seed, live_blocks}};
        if (storage == "float32") return run<float>(problem, options);
        if (storage == "float64") return run<double>(problem, options);
        if (storage == "bfloat16") return run<BFloat16>(problem, options);
        if (storage == "float16") return run<Float16>(problem, options);
        throw std::invalid_argument("storage must be float64, float32, float16 or bfloat16, and is " + storage);
      },
      "levels: (memory, strides of image, channel, row and column, anchors, height, width, planes) each",
      py::arg("storage"), py::arg("levels"), py::arg("anchors"), py::arg("gt_boxes"), py::arg("matched"), py::kw_only(),
      py::arg("gt_offsets") = py::none(), py::arg("task") = "sum", py::arg("loss") = 0, py::arg("beta") = 1.0,
      py::arg("weights") = std::array<double, 4>{1, 1, 1, 1}, py::arg("normalizer") = py::none(),
      py::arg("scale") = 1.0, py::arg("grad") = 1.0, py::arg("blocks") = 2,
      py::arg("images_per_launch") = kBoxMaxImages, py::arg("order") = "forward", py::arg("seed") = 0,
      py::arg("live_blocks") = 1);
}
