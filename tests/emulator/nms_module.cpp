// The kernels of non-maximum suppression under the emulator, over NumPy arrays.
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "nms/nms_kernel.cuh"

#include "device_buffer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::Device;
using emulator::fetch;

namespace {

using Labels = std::optional<py::array_t<int64_t>>;
using Counts = std::optional<py::array_t<int32_t>>;

unsigned blocks_of(int64_t count, int64_t threads) {
  return static_cast<unsigned>((count + threads - 1) / threads);
}

// The launches that rank a batch, as the product makes them.
template <typename T>
class Ranking {
 public:
  Ranking(const py::array& boxes, const py::array& scores, const Labels& labels, const Counts& num_valid,
          const emulator::Schedule& schedule) {
    args.batch = scores.shape(0);
    args.num_boxes = scores.shape(1);
    args.scores = device.add<T>(scores);
    if (num_valid) args.num_valid = device.add<int32_t>(*num_valid);
    const int64_t count = args.batch * args.num_boxes;
    keys = device.room<rank_key_t<T>>(count);
    emulator::Machine& machine = emulator::Machine::get();
    const int64_t chunks = blocks_of(args.num_boxes, kSortChunk);
    machine.run(static_cast<unsigned>(args.batch * chunks), kSortThreads, schedule,
                [&] { nms_sort_kernel<T>(args, chunks, keys); });
    for (int64_t run = kSortChunk; run < args.num_boxes; run *= 2) {
      rank_key_t<T>* merged = device.room<rank_key_t<T>>(count);
      machine.run(blocks_of(count, kSortThreads), kSortThreads, schedule,
                  [&] { nms_merge_kernel<T>(args, run, keys, merged); });
      keys = merged;
    }
    gather.keys = keys;
    gather.boxes = device.add<Box<T>>(boxes);
    if (labels) gather.labels = device.add<int64_t>(*labels);
    gather.ranked_boxes = device.room<Box<T>>(count);
    gather.ranked_labels = device.room<int64_t>(count);
    machine.run(blocks_of(count, kSortThreads), kSortThreads, schedule, [&] { nms_gather_kernel<T>(args, gather); });
  }

  Device device;
  NmsKeysArgs<T> args = {};
  NmsGatherArgs<T> gather = {};
  rank_key_t<T>* keys;
};

template <typename T>
py::tuple run_padded(const py::array& boxes, const py::array& scores, const Labels& labels, const Counts& num_valid,
                     double iou_threshold, int64_t most, const emulator::Schedule& schedule) {
  Ranking<T> ranking(boxes, scores, labels, num_valid, schedule);
  const int64_t batch = ranking.args.batch;
  NmsWalkArgs<T> walk = {};
  walk.keys = ranking.keys;
  walk.ranked_boxes = ranking.gather.ranked_boxes;
  walk.ranked_labels = ranking.gather.ranked_labels;
  walk.kept_boxes = ranking.device.template room<Box<T>>(batch * most);
  walk.kept_labels = ranking.device.template room<int64_t>(batch * most);
  walk.threshold = threshold_below<T>(iou_threshold);
  walk.most = most;
  walk.indices = ranking.device.template room<int64_t>(batch * most);
  walk.counts = ranking.device.template room<int32_t>(batch);
  emulator::Machine::get().run(static_cast<unsigned>(batch), kWalkThreads, schedule,
                               [&] { nms_walk_kernel<T>(ranking.args, walk); });
  return py::make_tuple(fetch(walk.indices, {batch, most}), fetch(walk.counts, {batch}));
}

template <typename T>
py::array_t<int64_t> run_bands(const py::array& boxes, const py::array& scores, const Labels& labels,
                               double iou_threshold, int64_t band, const emulator::Schedule& schedule) {
  Ranking<T> ranking(boxes, scores, labels, std::nullopt, schedule);
  const int64_t total = ranking.args.num_boxes;
  NmsBandArgs<T> args = {};
  args.keys = ranking.keys;
  args.boxes = ranking.gather.ranked_boxes;
  args.labels = ranking.gather.ranked_labels;
  args.num_boxes = total;
  args.threshold = threshold_below<T>(iou_threshold);
  args.suppressed = ranking.device.template room<bool>(total);
  args.keep = ranking.device.template room<int64_t>(total);
  args.counts = ranking.device.template room<int64_t>(2);
  emulator::Machine& machine = emulator::Machine::get();
  for (args.first = 0; args.first < total; args.first += band) {
    args.count = std::min(band, total - args.first);
    const int words = band_words(args.count);
    args.masks = ranking.device.template room<unsigned long long>(args.count * words);
    args.band_kept = ranking.device.template room<int32_t>(args.count);
    machine.run(static_cast<unsigned>(words * words), kMaskThreads, schedule, [&] { nms_mask_kernel<T>(args); });
    machine.run(1, kSettleThreads, schedule, [&] { nms_settle_kernel<T>(args); });
    const int64_t rest = total - args.first - args.count;
    if (rest == 0) break;
    machine.run(blocks_of(rest, kSweepThreads), kSweepThreads, schedule, [&] { nms_sweep_kernel<T>(args); });
  }
  return fetch(args.keep, {args.counts[0]});
}

// The settling of one band alone: rows that it keeps. masks [count, words of the band]; box i is row i.
py::array_t<int64_t> settle(const py::array_t<uint64_t>& masks, int64_t count) {
  Device device;
  NmsBandArgs<float> args = {};
  std::vector<rank_key_t<float>> keys(static_cast<std::size_t>(count));
  for (int64_t i = 0; i < count; ++i) keys[i] = rank_key(0.0f, static_cast<uint32_t>(i));
  args.keys = keys.data();
  args.num_boxes = args.count = count;
  args.masks = device.room<unsigned long long>(masks.size());
  std::memcpy(args.masks, masks.data(), static_cast<std::size_t>(masks.nbytes()));
  args.band_kept = device.room<int32_t>(count);
  args.keep = device.room<int64_t>(count);
  args.counts = device.room<int64_t>(2);
  emulator::Machine::get().run(1, kSettleThreads, {}, [&] { nms_settle_kernel<float>(args); });
  return fetch(args.keep, {args.counts[0]});
}

}  // namespace

PYBIND11_MODULE(_nms_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("sort_chunk") = kSortChunk;
  m.attr("walk_tile") = kWalkTile;
  m.attr("band_boxes") = kBandBoxes;
  m.def("band_words", &band_words);
  m.def("settle", &settle, py::arg("masks"), py::arg("count"));
  m.def(
      "batched_nms_padded",
      [](const py::array& boxes, const py::array& scores, const Labels& labels, double iou_threshold, int64_t most,
         const Counts& num_valid, const std::string& order, uint64_t seed, int live_blocks) {
        const emulator::Schedule schedule{emulator::order_of(order), seed, live_blocks};
        return boxes.itemsize() == sizeof(float)
                   ? run_padded<float>(boxes, scores, labels, num_valid, iou_threshold, most, schedule)
                   : run_padded<double>(boxes, scores, labels, num_valid, iou_threshold, most, schedule);
      },
      py::arg("boxes"), py::arg("scores"), py::arg("labels"), py::arg("iou_threshold"), py::arg("most"), py::kw_only(),
      py::arg("num_valid") = py::none(), py::arg("order") = "forward", py::arg("seed") = 0, py::arg("live_blocks") = 1);
  m.def(
      "nms",
      [](const py::array& boxes, const py::array& scores, const Labels& labels, double iou_threshold, int64_t band,
         const std::string& order, uint64_t seed, int live_blocks) {
        const emulator::Schedule schedule{emulator::order_of(order), seed, live_blocks};
        return boxes.itemsize() == sizeof(float)
                   ? run_bands<float>(boxes, scores, labels, iou_threshold, band, schedule)
                   : run_bands<double>(boxes, scores, labels, iou_threshold, band, schedule);
      },
      py::arg("boxes"), py::arg("scores"), py::arg("labels"), py::arg("iou_threshold"), py::kw_only(),
      py::arg("band") = kBandBoxes, py::arg("order") = "forward", py::arg("seed") = 0, py::arg("live_blocks") = 1);
}
