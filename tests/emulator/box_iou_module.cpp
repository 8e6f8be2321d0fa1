// The kernel of box_iou under the emulator, over flat NumPy arrays of storage elements (uint16: bit patterns).
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "box_iou/box_iou_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::DeviceBuffer;
using emulator::order_of;

namespace {

// Boxes of one side: `data` is memory, and box i of it begins `first` + i * `row_stride` elements in.
struct Side {
  std::string type;
  py::array data;
  int64_t count;
  int64_t first;
  int64_t row_stride;
  int64_t number_stride;
  bool whole;
};

Side side_of(const py::tuple& fields) {
  return {fields[0].cast<std::string>(), fields[1].cast<py::array>(), fields[2].cast<int64_t>(),
          fields[3].cast<int64_t>(),     fields[4].cast<int64_t>(),   fields[5].cast<int64_t>(),
          fields[6].cast<bool>()};
}

BoxRows rows_of(const Side& side, DeviceBuffer& memory) {
  const char* begin = memory.as<char>() + side.first * side.data.itemsize();
  if (side.type == "float64") return {begin, BoxType::kFloat64, side.number_stride, side.whole};
  if (side.type == "float32") return {begin, BoxType::kFloat32, side.number_stride, side.whole};
  if (side.type == "float16") return {begin, BoxType::kFloat16, side.number_stride, side.whole};
  if (side.type == "bfloat16") return {begin, BoxType::kBFloat16, side.number_stride, side.whole};
  throw std::invalid_argument(side.type);
}

struct Dims {
  std::vector<int64_t> sizes, strides1, strides2;
};

template <typename T>
py::array run(const Side& side1, const Side& side2, const Dims& dims, int format, int64_t wanted, int blocks,
              const emulator::Schedule& schedule) {
  DeviceBuffer memory1(side1.data), memory2(side2.data);
  BoxIouKernelArgs<T> args = {};
  args.rows1 = rows_of(side1, memory1);
  args.rows2 = rows_of(side2, memory2);
  args.row_stride1 = side1.row_stride;
  args.row_stride2 = side2.row_stride;
  args.count1 = side1.count;
  args.count2 = side2.count;
  args.format = static_cast<BoxFormat>(format);
  args.batch_dims.count = static_cast<int>(dims.sizes.size());
  int64_t batch = 1;
  for (std::size_t d = 0; d < dims.sizes.size(); ++d) {
    args.batch_dims.sizes[d] = dims.sizes[d];
    args.batch_dims.strides[0][d] = dims.strides1[d];
    args.batch_dims.strides[1][d] = dims.strides2[d];
    batch *= dims.sizes[d];
  }
  py::array_t<T> result({batch, side1.count, side2.count});
  DeviceBuffer out(static_cast<std::size_t>(result.nbytes()));
  args.result = out.as<T>();
  cut_iou_tiles(batch, wanted, args);
  const int grid = blocks > 0 ? blocks : static_cast<int>(args.tiles);
  emulator::Machine::get().run(grid, kIouThreads, schedule, [&] {
    if (iou_thread_columns(args.count2) == 1) {
      box_iou_kernel<T, 1>(args);
    } else {
      box_iou_kernel<T, kIouWideColumns>(args);
    }
  });
  out.copy_to(result);
  return result;
}

}  // namespace

PYBIND11_MODULE(_box_iou_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("threads") = kIouThreads;
  m.attr("tile_rows") = kIouTileRows;
  m.def(
      "tiling",
      [](int64_t batch, int64_t count1, int64_t count2, int64_t wanted) {
        BoxIouKernelArgs<float> args = {};
        args.count1 = count1;
        args.count2 = count2;
        cut_iou_tiles(batch, wanted, args);
        return py::make_tuple(args.column_threads, iou_thread_columns(count2), args.tile_rows, args.row_tiles,
                              args.column_tiles, args.tiles);
      },
      "column_threads, columns of a thread, tile_rows, row_tiles, column_tiles, tiles");
  m.def(
      "box_iou",
      [](const py::tuple& side1, const py::tuple& side2, const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& strides1, const std::vector<int64_t>& strides2, int format, int64_t wanted,
         int blocks, const std::string& order, uint64_t seed, int live_blocks) {
        const Side first = side_of(side1);
        const Side second = side_of(side2);
        const Dims dims{sizes, strides1, strides2};
        const emulator::Schedule schedule{order_of(order), seed, live_blocks};
        return first.type == "float64" ? run<double>(first, second, dims, format, wanted, blocks, schedule)
                                       : run<float>(first, second, dims, format, wanted, blocks, schedule);
      },
      py::arg("side1"), py::arg("side2"), py::arg("sizes") = std::vector<int64_t>(),
      py::arg("strides1") = std::vector<int64_t>(), py::arg("strides2") = std::vector<int64_t>(), py::kw_only(),
      py::arg("format") = 0, py::arg("wanted") = 1, py::arg("blocks") = 0, py::arg("order") = "forward",
      py::arg("seed") = 0, py::arg("live_blocks") = 1);
}
