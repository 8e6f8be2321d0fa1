// The kernel of the box coder under the emulator, over flat NumPy arrays of storage elements (uint16: bit patterns).
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "box_coder/box_coder_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::DeviceBuffer;
using emulator::order_of;

namespace {

BoxType type_of(const std::string& name) {
  if (name == "float64") return BoxType::kFloat64;
  if (name == "float32") return BoxType::kFloat32;
  if (name == "float16") return BoxType::kFloat16;
  if (name == "bfloat16") return BoxType::kBFloat16;
  throw std::invalid_argument(name);
}

std::size_t size_of(BoxType type) {
  return type == BoxType::kFloat64 ? 8 : type == BoxType::kFloat32 ? 4 : 2;
}

// (type, memory, elements before the first row, elements between the numbers of a row, whether rows are whole vectors)
struct Rows {
  explicit Rows(const py::tuple& fields)
      : data(fields[1].cast<py::array>()),
        memory(data),
        rows{memory.as<char>() + fields[2].cast<int64_t>() * data.itemsize(), type_of(fields[0].cast<std::string>()),
             fields[3].cast<int64_t>(), fields[4].cast<bool>()} {}

  py::array data;
  DeviceBuffer memory;
  BoxRows rows;
};

BroadcastDims dims_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides1,
                      const std::vector<int64_t>& strides2) {
  BroadcastDims dims{};
  dims.count = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), dims.sizes);
  std::copy(strides1.begin(), strides1.end(), dims.strides[0]);
  std::copy(strides2.begin(), strides2.end(), dims.strides[1]);
  return dims;
}

struct Problem {
  BroadcastDims dims;
  std::array<double, 4> weights;
  double clip;
  int blocks;
  emulator::Schedule schedule;
};

template <typename T, CoderTask kTask>
void launch(const CoderKernelArgs<T>& args, const Problem& problem) {
  const int64_t tiles = (args.rows + kCoderThreads - 1) / kCoderThreads;
  const int blocks = problem.blocks > 0 ? problem.blocks : static_cast<int>(std::max<int64_t>(1, tiles));
  emulator::Machine::get().run(blocks, kCoderThreads, problem.schedule, [&] { box_coder_kernel<T, kTask>(args); });
}

// Bytes of each result that is asked for (a type), in order.
template <typename T>
std::vector<py::bytes> run(const std::string& task, const Rows* upstream, const Rows& values, const Rows& anchors,
                           const std::vector<std::string>& result_types, const Problem& problem) {
  CoderKernelArgs<T> args = {};
  if (upstream != nullptr) args.upstream = upstream->rows;
  args.values = values.rows;
  args.anchors = anchors.rows;
  args.dims = problem.dims;
  args.rows = 1;
  for (int d = 0; d < args.dims.count; ++d) args.rows *= args.dims.sizes[d];
  const auto& w = problem.weights;
  args.options = {{T(w[0]), T(w[1]), T(w[2]), T(w[3])}, T(problem.clip)};
  std::vector<std::unique_ptr<DeviceBuffer>> results;
  std::vector<std::size_t> bytes;
  for (std::size_t i = 0; i < result_types.size(); ++i) {
    if (result_types[i].empty()) continue;
    const BoxType type = type_of(result_types[i]);
    bytes.push_back(4 * static_cast<std::size_t>(args.rows) * size_of(type));
    results.push_back(std::make_unique<DeviceBuffer>(bytes.back()));
    args.results[i] = {results.back()->as<void>(), type};
  }
  if (task == "encode") launch<T, CoderTask::kEncode>(args, problem);
  if (task == "decode") launch<T, CoderTask::kDecode>(args, problem);
  if (task == "encode gradient") launch<T, CoderTask::kEncodeGradient>(args, problem);
  if (task == "decode gradient") launch<T, CoderTask::kDecodeGradient>(args, problem);
  std::vector<py::bytes> contents;
  for (std::size_t i = 0; i < results.size(); ++i) contents.emplace_back(results[i]->as<char>(), bytes[i]);
  return contents;
}

}  // namespace

PYBIND11_MODULE(_box_coder_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("threads") = kCoderThreads;
  m.def("offsets", [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides1,
                      const std::vector<int64_t>& strides2, int64_t index) {
    const BroadcastOffsets offsets = broadcast_offsets(dims_of(sizes, strides1, strides2), index);
    return py::make_tuple(offsets.first, offsets.second);
  });
  m.def(
      "run",
      [](const std::string& task, const py::object& upstream, const py::tuple& values, const py::tuple& anchors,
         const std::vector<std::string>& results, const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& strides1, const std::vector<int64_t>& strides2,
         const std::array<double, 4>& weights, double clip, int blocks, const std::string& order, uint64_t seed,
         int live_blocks) {
        const Problem problem{dims_of(sizes, strides1, strides2), weights, clip, blocks,
                              {order_of(order), seed, live_blocks}};
        std::unique_ptr<Rows> above;
        if (!upstream.is_none()) above = std::make_unique<Rows>(upstream.cast<py::tuple>());
        const Rows first(values);
        const Rows second(anchors);
        const bool wide = first.rows.type == BoxType::kFloat64 || second.rows.type == BoxType::kFloat64;
        return wide ? run<double>(task, above.get(), first, second, results, problem)
                    : run<float>(task, above.get(), first, second, results, problem);
      },
      py::arg("task"), py::arg("upstream"), py::arg("values"), py::arg("anchors"), py::arg("results"),
      py::arg("sizes"), py::arg("strides1"), py::arg("strides2"), py::kw_only(),
      py::arg("weights") = std::array<double, 4>{1, 1, 1, 1}, py::arg("clip") = kDeltaClip, py::arg("blocks") = 0,
      py::arg("order") = "forward", py::arg("seed") = 0, py::arg("live_blocks") = 1);
}
