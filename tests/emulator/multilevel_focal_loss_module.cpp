// The multi-level focal loss kernel under the emulator, over NumPy arrays of storage elements (float32, or uint16 bit
// patterns), one a level.
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
  int gap;  // elements between one image and the next
};

struct Options {
  std::string task = "sum";  // sum, gradient, sum+gradient
  double gamma = 2.0;
  double alpha = 0.25;  // negative: no balancing
  double scale = 1.0;
  std::optional<py::array_t<float>> normalizer;
  float grad = 1.0f;
  std::optional<std::vector<py::array>> filled;  // gradient: what the results hold for an upstream gradient of 1
  int blocks = 2;
  emulator::Schedule schedule;
};

template <typename In, FocalTask kTask>
void launch(const MultilevelKernelArgs<float>& args, const Options& options) {
  emulator::Machine::get().run(options.blocks, kFocalThreads, options.schedule, [&] {
    if (args.gamma == 2) {
      multilevel_focal_kernel<In, kTask, Gamma::kTwo>(args);
    } else {
      multilevel_focal_kernel<In, kTask, Gamma::kAny>(args);
    }
  });
}

// A tuple: the sum, the list of gradients, and where they may be filled, whether the upstream gradient was 1; None what
// the task does not make.
template <typename In>
py::tuple run(const std::vector<Level>& levels, const py::array& targets, int classes, const Options& options) {
  const int batch = static_cast<int>(targets.shape(0));
  MultilevelKernelArgs<float> args = {};
  DeviceBuffer targets_buffer(targets);
  args.targets = targets_buffer.as<void>();
  args.wide_targets = targets.itemsize() == sizeof(int64_t);
  args.num_anchors = targets.shape(1);
  args.classes = classes;
  args.rows_per_tile = focal_rows_per_tile<In>(classes);
  args.scale = static_cast<float>(options.scale);
  args.gamma = static_cast<float>(options.gamma);
  args.alpha_positive = options.alpha < 0 ? 1.0f : static_cast<float>(options.alpha);
  args.alpha_negative = options.alpha < 0 ? 1.0f : static_cast<float>(1 - options.alpha);
  args.ignore_index = -2;
  std::optional<DeviceBuffer> normalizer;
  if (options.normalizer) {
    args.normalizer = normalizer.emplace(*options.normalizer).as<float>();
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
      outputs.push_back(sizeof(In) == sizeof(float) ? py::array(py::array_t<float>(elements))
                                                    : py::array(py::array_t<uint16_t>(elements)));
      gradients.push_back(std::make_unique<DeviceBuffer>(static_cast<std::size_t>(outputs.back().nbytes())));
      gradient = gradients.back()->as<void>();
      if (options.filled) std::memcpy(gradient, (*options.filled)[l].data(), outputs.back().nbytes());
    }
    const int64_t rows = static_cast<int64_t>(level.anchors) * level.cells;
    const LevelMemory memory{logits.back()->as<void>(), gradient,    rows * classes + level.gap, first_anchor,
                             level.anchors,             level.cells, level.planes};
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
  for (std::size_t l = 0; l < outputs.size(); ++l) gradients[l]->copy_to(outputs[l]);
  return py::make_tuple(sum, outputs, note);
}

}  // namespace

PYBIND11_MODULE(_multilevel_focal_loss_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("max_levels") = kMaxLevels;
  m.def(
      "multilevel_focal_loss",
      [](const std::string& storage, const std::vector<std::tuple<py::array, bool, int, int, int>>& levels,
         const py::array& targets, int classes, const std::string& task, double gamma, double alpha, double scale,
         std::optional<py::array_t<float>> normalizer, float grad, std::optional<std::vector<py::array>> filled,
         int blocks, const std::string& order, uint64_t seed, int live_blocks) {
        std::vector<Level> described;
        for (const auto& [logits, planes, anchors, cells, gap] : levels) {
          described.push_back({logits, planes, anchors, cells, gap});
        }
        const Options options{task, gamma,  alpha,  scale, normalizer,
                              grad, filled, blocks, {order_of(order), seed, live_blocks}};
        if (storage == "float32") return run<float>(described, targets, classes, options);
        if (storage == "bfloat16") return run<BFloat16>(described, targets, classes, options);
        if (storage == "float16") return run<Float16>(described, targets, classes, options);
        throw std::invalid_argument("storage must be float32, float16 or bfloat16, and is " + storage);
      },
      "levels: (logits, planes, anchors, cells, gap) each", py::arg("storage"), py::arg("levels"), py::arg("targets"),
      py::arg("classes"), py::kw_only(), py::arg("task") = "sum", py::arg("gamma") = 2.0, py::arg("alpha") = 0.25,
      py::arg("scale") = 1.0, py::arg("normalizer") = py::none(), py::arg("grad") = 1.0f,
      py::arg("filled") = py::none(), py::arg("blocks") = 2, py::arg("order") = "forward", py::arg("seed") = 0,
      py::arg("live_blocks") = 1);
}
