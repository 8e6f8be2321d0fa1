// The anchor matching kernels under the emulator, over NumPy arrays.
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "anchor_match/anchor_match_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::Device;
using emulator::fetch;
using emulator::order_of;

namespace {

using Arrays = std::vector<py::array>;

struct Options {
  double fg_iou_thresh;
  double bg_iou_thresh;
  double min_pos_iou;
  bool low_quality;
  int policy;
  int images_per_launch;
  int shift;  // int32s between the beginning of an allocation and that of the results
  emulator::Schedule schedule;
};

// Labels, matched rows and numbers of foreground anchors. `labels` empty: matched rows alone.
template <typename T>
py::tuple run(const py::array& anchors, const Arrays& boxes, const Arrays& labels, const Arrays& ignore,
              const std::optional<py::array_t<int32_t>>& offsets, const Options& options) {
  const bool per_image = anchors.ndim() == 3;
  const int64_t num_anchors = anchors.shape(anchors.ndim() - 2);
  const int64_t batch = offsets ? offsets->size() - 1 : static_cast<int64_t>(boxes.size());
  Device device;
  MatchKernelArgs<T> args = {};
  args.anchors = device.add<Box<T>>(anchors);
  args.num_anchors = num_anchors;
  args.tiles = static_cast<int>((num_anchors + kMatchTile - 1) / kMatchTile);
  args.per_image = per_image;
  args.fg_iou_thresh = static_cast<T>(options.fg_iou_thresh);
  args.bg_iou_thresh = static_cast<T>(options.bg_iou_thresh);
  args.min_pos_iou = static_cast<T>(options.min_pos_iou);
  args.low_quality = options.low_quality;
  args.policy = static_cast<MatchPolicy>(options.policy);
  if (offsets) args.offsets = device.add<int32_t>(*offsets);
  std::vector<MatchImageMemory> images;
  int32_t rows = 0;
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    images.push_back({device.add<T>(boxes[i]), labels.empty() ? nullptr : device.add<void>(labels[i]),
                      ignore.empty() ? nullptr : device.add<bool>(ignore[i]), rows,
                      static_cast<int32_t>(boxes[i].shape(0))});
    rows += images.back().count;
  }
  args.wide_labels = !labels.empty() && labels[0].itemsize() == sizeof(int64_t);

  const int64_t sets = per_image ? batch : 1;
  args.bounds = device.room<TileBounds<T>>(sets * args.tiles);
  args.best = device.room<iou_bits_t<T>>(rows);
  args.matched = device.room<int32_t>(options.shift + batch * num_anchors) + options.shift;
  if (!labels.empty()) {
    args.labels = device.room<int32_t>(options.shift + batch * num_anchors) + options.shift;
    args.foreground = device.room<int32_t>(batch);
  }

  emulator::Machine& machine = emulator::Machine::get();
  machine.run(2, kMatchThreads, options.schedule, [&] { anchor_tiles_kernel<T>(args, sets, rows, batch); });
  // A kernel over all images, as many at a time as a launch takes: packed boxes have one entry for all.
  const auto run_over_images = [&](const auto& kernel) {
    const int64_t step = offsets ? batch : options.images_per_launch;
    for (int64_t first = 0; first < batch; first += step) {
      args.first_image = static_cast<int>(first);
      args.num_images = static_cast<int>(std::min(step, batch - first));
      const auto begin = images.begin() + first;
      std::copy(begin, offsets ? images.end() : begin + args.num_images, args.images);
      const int blocks = (args.tiles + kMatchWarps - 1) / kMatchWarps * args.num_images;
      machine.run(blocks, kMatchThreads, options.schedule, kernel);
    }
  };
  run_over_images([&] { anchor_match_kernel<T>(args); });
  if (options.low_quality) run_over_images([&] { anchor_restore_kernel<T>(args); });
  py::object labels_result = py::none();
  py::object foreground_result = py::none();
  if (!labels.empty()) {
    labels_result = fetch(args.labels, {batch, num_anchors});
    foreground_result = fetch(args.foreground, {batch});
  }
  return py::make_tuple(labels_result, fetch(args.matched, {batch, num_anchors}), foreground_result);
}

}  // namespace

PYBIND11_MODULE(_anchor_match_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("tile") = kMatchTile;
  m.attr("warps") = kMatchWarps;
  m.def(
      "match",
      [](const py::array& anchors, const Arrays& boxes, const Arrays& labels, const Arrays& ignore,
         const std::optional<py::array_t<int32_t>>& offsets, double fg_iou_thresh, double bg_iou_thresh,
         bool low_quality, int policy, double min_pos_iou, int images_per_launch, int shift,
         const std::string& order, uint64_t seed, int live_blocks) {
        const Options options{fg_iou_thresh, bg_iou_thresh,     min_pos_iou, low_quality,
                              policy,        images_per_launch, shift,       {order_of(order), seed, live_blocks}};
        return anchors.itemsize() == sizeof(float) ? run<float>(anchors, boxes, labels, ignore, offsets, options)
                                                   : run<double>(anchors, boxes, labels, ignore, offsets, options);
      },
      py::arg("anchors"), py::arg("boxes"), py::kw_only(), py::arg("labels") = Arrays(), py::arg("ignore") = Arrays(),
      py::arg("offsets") = py::none(), py::arg("fg_iou_thresh") = 0.5, py::arg("bg_iou_thresh") = 0.4,
      py::arg("low_quality") = true, py::arg("policy") = 0, py::arg("min_pos_iou") = 0.0,
      py::arg("images_per_launch") = kMatchMaxImages, py::arg("shift") = 0,
      py::arg("order") = "forward", py::arg("seed") = 0, py::arg("live_blocks") = 1);
}
