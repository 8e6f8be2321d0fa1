// The focal loss kernels under the emulator, over NumPy arrays of storage elements (float64, float32, or uint16 bit
// patterns).
#include <algorithm>

#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "focal_loss/focal_loss_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::DeviceBuffer;
using emulator::order_of;

namespace {

struct Options {
  std::string task = "sum";  // loss, sum, mean, gradient; sum+gradient, mean+gradient: both in one pass
  double gamma = 2.0;
  double alpha = 0.25;  // negative: no balancing
  double label_smoothing = 0.0;
  long ignore_index = -2;
  std::optional<py::array_t<double>> class_alpha;
  std::optional<py::array_t<double>> weight;
  std::optional<py::array> grad;  // gradient: [1] or [rows, classes]
  bool mean = false;              // gradient of a mean
  std::optional<py::array> filled;  // gradient: what the result holds for an upstream gradient of 1
  int blocks = 2;
  emulator::Schedule schedule;
};

template <typename In, FocalTask kTask, Gamma kGamma, bool kByColumn>
void launch(bool soft, FocalKernelArgs<compute_t<In>>& args, const Options& options) {
  args.rows_per_tile = focal_rows_per_tile<In>(args.classes);
  constexpr int64_t kTileElements = kFocalVectorsPerThread * kFocalThreads * kVectorWidth<In>;
  args.tiles = soft ? (args.rows * args.classes + kTileElements - 1) / kTileElements
                    : (args.rows + args.rows_per_tile - 1) / args.rows_per_tile;
  emulator::Machine::get().run(options.blocks, kFocalThreads, options.schedule, [&] {
    if constexpr (kTask != FocalTask::kSumAndGradient) {  // one pass is for class indices alone
      if (soft) return focal_soft_kernel<In, kTask, kGamma, kByColumn>(args);
    }
    focal_index_kernel<In, kTask, kGamma, kByColumn>(args);
  });
}

// As the product chooses: float64 has no variant for gamma = 2.
template <typename In, FocalTask kTask>
void choose(bool soft, FocalKernelArgs<compute_t<In>>& args, const Options& options) {
  if (args.class_alpha != nullptr || args.half_smoothing != 0) {
    return launch<In, kTask, Gamma::kAny, true>(soft, args, options);
  }
  if constexpr (sizeof(compute_t<In>) == sizeof(float)) {
    if (args.gamma == 2) return launch<In, kTask, Gamma::kTwo, false>(soft, args, options);
  }
  launch<In, kTask, Gamma::kAny, false>(soft, args, options);
}

template <typename T>
py::array finish(const FocalKernelArgs<T>& args, const Options& options) {
  DeviceBuffer result(sizeof(T));
  emulator::Machine::get().run(1, kFocalThreads, options.schedule, [&] {
    focal_finish_kernel<T>(args.block_sums, args.block_ignored, options.blocks, args.mean, args.rows, args.classes,
                           result.as<T>());
  });
  py::array output = emulator::empty_array<T>(1);
  result.copy_to(output);
  return output;
}

template <typename T>
void count_ignored(FocalKernelArgs<T>& args, const Options& options, DeviceBuffer& count) {
  *count.as<unsigned long long>() = 0;
  emulator::Machine::get().run(options.blocks, kFocalThreads, options.schedule, [&] {
    if (args.wide_targets) {
      count_ignored_kernel(static_cast<const int64_t*>(args.targets), args.rows, args.ignore_index,
                           count.as<unsigned long long>());
    } else {
      count_ignored_kernel(static_cast<const int32_t*>(args.targets), args.rows, args.ignore_index,
                           count.as<unsigned long long>());
    }
  });
  args.ignored = count.as<int64_t>();
}

// A tuple of what the task makes: loss or gradient, as arrays of the result's storage, sum as an array of one float;
// and for a gradient that may be filled, whether the upstream gradient was 1.
template <typename In>
py::tuple run(const py::array& inputs, const py::array& targets, int classes, bool soft, bool wide_result,
              const Options& options) {
  using T = compute_t<In>;
  FocalKernelArgs<T> args = {};
  DeviceBuffer inputs_buffer(inputs);
  DeviceBuffer targets_buffer(targets);
  args.inputs = inputs_buffer.as<void>();
  args.targets = targets_buffer.as<void>();
  args.wide_targets = soft ? targets.itemsize() == sizeof(T) && sizeof(In) != sizeof(T)
                           : targets.itemsize() == sizeof(int64_t);
  args.rows = static_cast<int64_t>(inputs.size()) / classes;
  args.classes = classes;
  args.gamma = static_cast<T>(options.gamma);
  const bool balanced = options.alpha >= 0 && !options.class_alpha;
  args.alpha_positive = balanced ? static_cast<T>(options.alpha) : T(1);
  args.alpha_negative = balanced ? static_cast<T>(1 - options.alpha) : T(1);
  args.half_smoothing = static_cast<T>(options.label_smoothing / 2);
  args.ignore_index = options.ignore_index;
  std::optional<DeviceBuffer> class_alpha;
  std::optional<DeviceBuffer> weight;
  if (options.class_alpha) args.class_alpha = class_alpha.emplace(py::array_t<T>(*options.class_alpha)).template as<T>();
  if (options.weight) args.weight = weight.emplace(py::array_t<T>(*options.weight)).template as<T>();

  const bool reduces = options.task.rfind("sum", 0) == 0 || options.task.rfind("mean", 0) == 0;
  const bool both = reduces && options.task.find("gradient") != std::string::npos;
  args.mean = reduces ? options.task.rfind("mean", 0) == 0 : options.mean;
  const bool counts = args.mean && !soft;
  DeviceBuffer sums(sizeof(double) * static_cast<std::size_t>(options.blocks));
  DeviceBuffer ignored(sizeof(int64_t) * static_cast<std::size_t>(options.blocks));
  DeviceBuffer count(sizeof(unsigned long long));
  if (reduces) {
    args.block_sums = sums.as<double>();
    args.block_ignored = counts ? ignored.as<int64_t>() : nullptr;
  }
  if (reduces && !both) {
    choose<In, FocalTask::kSum>(soft, args, options);
    return py::make_tuple(finish(args, options));
  }

  args.wide_result = wide_result;
  py::array output = wide_result ? emulator::empty_array<T>(inputs.size()) : emulator::empty_array<In>(inputs.size());
  DeviceBuffer result(static_cast<std::size_t>(output.nbytes()));
  args.result = result.as<void>();
  if (options.task == "loss") {
    choose<In, FocalTask::kLoss>(soft, args, options);
    result.copy_to(output);
    return py::make_tuple(output);
  }
  if (counts) count_ignored(args, options, count);
  if (both) {
    choose<In, FocalTask::kSumAndGradient>(soft, args, options);
    result.copy_to(output);
    return py::make_tuple(finish(args, options), output);
  }
  DeviceBuffer grad(*options.grad);
  args.grad = grad.as<void>();
  args.wide_grad = options.grad->itemsize() == sizeof(T) && sizeof(In) != sizeof(T);
  args.scalar_grad = options.grad->size() == 1;
  DeviceBuffer was_one(sizeof(int32_t));
  if (options.filled) {
    std::memcpy(result.as<void>(), options.filled->data(), static_cast<std::size_t>(output.nbytes()));
    args.filled = true;
    args.was_one = was_one.as<int32_t>();
  }
  choose<In, FocalTask::kGradient>(soft, args, options);
  result.copy_to(output);
  if (options.filled) return py::make_tuple(output, *was_one.as<int32_t>());
  return py::make_tuple(output);
}

}  // namespace

PYBIND11_MODULE(_focal_loss_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.def("is_vector_aligned", [](std::uintptr_t address) { return is_vector_aligned(reinterpret_cast<void*>(address)); });
  m.def("copy_vector", [](std::uintptr_t from, std::uintptr_t to) {
    store_vector(reinterpret_cast<float*>(to), load_vector(reinterpret_cast<const float*>(from)));
  });
  m.def(
      "focal_loss",
      [](const std::string& storage, const py::array& inputs, const py::array& targets, int classes, bool soft,
         const std::string& task, double gamma, double alpha, double label_smoothing, long ignore_index,
         std::optional<py::array_t<double>> class_alpha, std::optional<py::array_t<double>> weight,
         std::optional<py::array> grad, bool mean, std::optional<py::array> filled, bool wide_result, int blocks,
         const std::string& order, uint64_t seed, int live_blocks) {
        const Options options{task,        gamma,  alpha, label_smoothing, ignore_index,
                              class_alpha, weight, grad,  mean,            filled,
                              blocks,      {order_of(order), seed, live_blocks}};
        if (storage == "float64") return run<double>(inputs, targets, classes, soft, wide_result, options);
        if (storage == "float32") return run<float>(inputs, targets, classes, soft, wide_result, options);
        if (storage == "bfloat16") return run<BFloat16>(inputs, targets, classes, soft, wide_result, options);
        if (storage == "float16") return run<Float16>(inputs, targets, classes, soft, wide_result, options);
        throw std::invalid_argument("storage must be float64, float32, float16 or bfloat16, and is " + storage);
      },
      py::arg("storage"), py::arg("inputs"), py::arg("targets"), py::arg("classes"), py::kw_only(),
      py::arg("soft") = false, py::arg("task") = "sum", py::arg("gamma") = 2.0, py::arg("alpha") = 0.25,
      py::arg("label_smoothing") = 0.0, py::arg("ignore_index") = -2, py::arg("class_alpha") = py::none(),
      py::arg("weight") = py::none(), py::arg("grad") = py::none(), py::arg("mean") = false, py::arg("filled") = py::none(),
      py::arg("wide_result") = false, py::arg("blocks") = 2, py::arg("order") = "forward", py::arg("seed") = 0,
      py::arg("live_blocks") = 1);
}
