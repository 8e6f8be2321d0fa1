// The multi-level focal loss kernel under the emulator, over NumPy arrays of storage elements (float64, float32, or
// uint16 bit patterns), one a level.
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "focal_loss/multilevel_focal_loss_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::DeviceBuffer;
using emulator::order_of;

namespace {

struct Level {
  py::array logits;  // images one behind the other, as they lie in memory
  bool planes;
  int anchors;
  int cells;
  int gap;             // elements between one image and the next
  int logits_start;    // element of the memory where the first image begins
  int gradient_start;  // likewise
};

struct Options {
  std::string task = "sum";  // sum, gradient, sum+gradient
  double gamma = 2.0;
  double alpha = 0.25;  // negative: no balancing
  double scale = 1.0;
  std::optional<py::array_t<double>> normalizer;
  float grad = 1.0f;
  std::optional<std::vector<py::array>> filled;  // gradient: what the results hold for an upstream gradient of 1
  int blocks = 2;
  emulator::Schedule schedule;
};

// As the product chooses: float64 has no variant for gamma = 2.
template <typename In, FocalTask kTask>
void launch(const MultilevelKernelArgs<compute_t<In>>& args, const Options& options) {
  emulator::Machine::get().run(options.blocks, kFocalThreads, options.schedule, [&] {
    if constexpr (sizeof(compute_t<In>) == sizeof(float)) {
      if (args.gamma == 2) return multilevel_focal_kernel<In, kTask, Gamma::kTwo>(args);
    }
    multilevel_focal_kernel<In, kTask, Gamma::kAny>(args);
  });
}

// A tuple: the sum, the list of gradients, and where they may be filled, whether the upstream gradient was 1; None what
// the task does not make.
template <typename In>
py::tuple run(const std::vector<Level>& levels, const py::array& targets, int classes, const Options& options) {
  using T = compute_t<In>;
  const int batch = static_cast<int>(targets.shape(0));
  MultilevelKernelArgs<T> args = {};
  DeviceBuffer targets_buffer(targets);
  args.targets = targets_buffer.as<void>();
  args.wide_targets = targets.itemsize() == sizeof(int64_t);
  args.num_anchors = targets.shape(1);
  args.classes = classes;
  args.rows_per_tile = focal_rows_per_tile<In>(classes);
  args.scale = static_cast<T>(options.scale);
  args.gamma = static_cast<T>(options.gamma);
  args.alpha_positive = options.alpha < 0 ? T(1) : static_cast<T>(options.alpha);
  args.alpha_negative = options.alpha < 0 ? T(1) : static_cast<T>(1 - options.alpha);
  args.ignore_index = -2;
  std::optional<DeviceBuffer> normalizer;
  if (options.normalizer) {
    args.normalizer = normalizer.emplace(py::array_t<T>(*options.normalizer)).template as<T>();
    args.normalizer_per_image = options.normalizer->size() != 1;
  }

  std::vector<std::unique_ptr<DeviceBuffer>> logits;
  std::vector<std::unique_ptr<DeviceBuffer>> gradients;
  std::vector<py::array> outputs;
  int64_t first_anchor = 0;
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const Level& level = levels[l];
    logits.push_back(std::make_unique<DeviceBuffer>(level.logits));
    void* gradient = nullptr;
    if (options.task != "sum") {
      const py::ssize_t elements = static_cast<py::ssize_t>(batch) * level.anchors * level.cells * classes;
      outputs.push_back(emulator::empty_array<In>(elements));
      const std::size_t skipped = sizeof(In) * static_cast<std::size_t>(level.gradient_start);
      gradients.push_back(std::make_unique<DeviceBuffer>(static_cast<std::size_t>(outputs.back().nbytes()) + skipped));
      gradient = gradients.back()->template as<In>() + level.gradient_start;
      if (options.filled) std::memcpy(gradient, (*options.filled)[l].data(), outputs.back().nbytes());
    }
    const int64_t rows = static_cast<int64_t>(level.anchors) * level.cells;
    const In* first_image = logits.back()->template as<In>() + level.logits_start;
    const LevelMemory memory{first_image,   gradient,    rows * classes + level.gap, first_anchor,
                             level.anchors, level.cells, level.planes};
    if (!add_level<In>(memory, batch, args)) throw std::invalid_argument("a level is too large");
    first_anchor += rows;
  }

  DeviceBuffer sums(sizeof(double) * static_cast<std::size_t>(options.blocks));
  DeviceBuffer grad(sizeof(float));
  DeviceBuffer was_one(sizeof(int32_t));
  py::object sum = py::none();
  py::object note = py::none();
  if (options.task == "gradient") {
    *grad.as<float>() = options.grad;
    args.grad = grad.as<float>();
    args.filled = options.filled.has_value();
    if (options.filled) args.was_one = was_one.as<int32_t>();
    launch<In, FocalTask::kGradient>(args, options);
    if (options.filled) note = py::int_(*was_one.as<int32_t>());
  } else {
    args.block_sums = sums.as<double>();
    if (options.task == "sum") {
      launch<In, FocalTask::kSum>(args, options);
    } else {
      launch<In, FocalTask::kSumAndGradient>(args, options);
    }
    DeviceBuffer result(sizeof(float));
    emulator::Machine::get().run(1, kFocalThreads, options.schedule, [&] {
      focal_finish_kernel<float>(args.block_sums, nullptr, options.blocks, false, 0, 0, result.as<float>());
    });
    sum = py::float_(*result.as<float>());
  }
  for (std::size_t l = 0; l < outputs.size(); ++l) {
    const In* gradient = gradients[l]->template as<In>() + levels[l].gradient_start;
    std::memcpy(outputs[l].mutable_data(), gradient, static_cast<std::size_t>(outputs[l].nbytes()));
  }
  return py::make_tuple(sum, outputs, note);
}

// How a level of `batch` images is taken: its tiles, and whether by vectors; None where it is too large.
template <typename In>
py::object describe(const LevelMemory& level, int64_t batch, int classes) {
  MultilevelKernelArgs<compute_t<In>> args = {};
  args.classes = classes;
  args.rows_per_tile = focal_rows_per_tile<In>(classes);
  if (!add_level<In>(level, batch, args)) return py::none();
  return py::make_tuple(args.tiles, args.levels[0].aligned);
}

}  // namespace

PYBIND11_MODULE(_multilevel_focal_loss_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("max_levels") = kMaxLevels;
  m.def(
      "add_level",
      [](const std::string& storage, int64_t anchors, int64_t cells, int classes, bool planes, int64_t batch,
         std::uintptr_t logits, std::uintptr_t gradient, int64_t image_stride) {
        const LevelMemory level{reinterpret_cast<void*>(logits), reinterpret_cast<void*>(gradient), image_stride, 0,
                                anchors, cells, planes};
        return storage == "bfloat16" ? describe<BFloat16>(level, batch, classes)
                                     : describe<float>(level, batch, classes);
      },
      "(tiles, aligned), or None; storage: float32 or bfloat16", py::arg("storage"), py::kw_only(),
      py::arg("anchors") = 1, py::arg("cells") = 1, py::arg("classes") = 1, py::arg("planes") = true,
      py::arg("batch") = 1, py::arg("logits") = 0, py::arg("gradient") = 0, py::arg("image_stride") = 0);
  m.def(
      "multilevel_focal_loss",
      [](const std::string& storage, const std::vector<std::tuple<py::array, bool, int, int, int, int, int>>& levels,
         const py::array& targets, int classes, const std::string& task, double gamma, double alpha, double scale,
         std::optional<py::array_t<double>> normalizer, float grad, std::optional<std::vector<py::array>> filled,
         int blocks, const std::string& order, uint64_t seed, int live_blocks) {
        std::vector<Level> described;
        for (const auto& [logits, planes, anchors, cells, gap, logits_start, gradient_start] : levels) {
          described.push_back({logits, planes, anchors, cells, gap, logits_start, gradient_start});
        }
        const Options options{task, gamma,  alpha,  scale, normalizer,
                              grad, filled, blocks, {order_of(order), seed, live_blocks}};
        if (storage == "float64") return run<double>(described, targets, classes, options);
        if (storage == "float32") return run<float>(described, targets, classes, options);
        if (storage == "bfloat16") return run<BFloat16>(described, targets, classes, options);
        if (storage == "float16") return run<Float16>(described, targets, classes, options);
        throw std::invalid_argument("storage must be float64, float32, float16 or bfloat16, and is " + storage);
      },
      "levels: (logits, planes, anchors, cells, gap, logits_start, gradient_start) each", py::arg("storage"), py::arg("levels"), py::arg("targets"),
      py::arg("classes"), py::kw_only(), py::arg("task") = "sum", py::arg("gamma") = 2.0, py::arg("alpha") = 0.25,
      py::arg("scale") = 1.0, py::arg("normalizer") = py::none(), py::arg("grad") = 1.0f,
      py::arg("filled") = py::none(), py::arg("blocks") = 2, py::arg("order") = "forward", py::arg("seed") = 0,
      py::arg("live_blocks") = 1);
}
