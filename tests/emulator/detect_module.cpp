// The post-processing kernels under the emulator, over NumPy arrays of storage elements (float64, float32, or uint16 bit
// patterns), one a level.
#include "cuda_emulator.h"
// The kernels come after the emulator, which stands in for the CUDA headers.
#include "postprocess/detect_kernel.cuh"

#include "device_buffer.h"
#include "postprocess/detect_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace retinanet_ext;
using emulator::Device;
using emulator::fetch;

namespace {

// One level: logits [B, A, K, cells] (planes) or [B, cells, A, K]; deltas by their strides.
struct Level {
  py::array logits;
  py::array deltas;
  std::array<int64_t, 4> delta_strides;  // image, channel, row, column
  int64_t anchors;
  int64_t height;
  int64_t width;
  bool planes;
};

struct Options {
  std::string logit_type;
  std::string delta_type;
  int64_t classes;
  double score_thresh;
  int64_t topk;
  double nms_thresh;
  int64_t most;
  bool clip_before_nms;
  bool sizes_as_list;
  int64_t wanted_parts;
  int shift;  // logits between the beginning of an allocation and the first
  int images_per_launch;
  emulator::Schedule schedule;
};

DeltaType delta_type_of(const std::string& name) {
  if (name == "float64") return DeltaType::kFloat64;
  if (name == "float32") return DeltaType::kFloat32;
  return name == "float16" ? DeltaType::kFloat16 : DeltaType::kBFloat16;
}

// Memory whose first element lies `shift` elements behind an aligned address, and that ends with the last.
template <typename S>
const S* shifted(Device& device, const py::array& array, int shift) {
  S* memory = device.room<S>(shift + array.size()) + shift;
  if (array.size() > 0) std::memcpy(memory, array.data(), static_cast<std::size_t>(array.nbytes()));
  return memory;
}

template <typename T>
ImageSizes<T> sizes_of(Device& device, const py::array& sizes, const Options& options, int64_t first, int64_t images) {
  ImageSizes<T> result = {};
  if (!options.sizes_as_list) {
    result.tensor = device.add<T>(sizes);
  } else {
    const T* values = static_cast<const T*>(sizes.data());
    for (int64_t i = 0; i < 2 * images; ++i) result.list[i] = values[2 * first + i];
  }
  return result;
}

template <typename S, typename T>
py::tuple run(const std::vector<Level>& levels, const py::array& anchors, const py::array& sizes,
              const Options& options) {
  using L = compute_t<S>;
  using Key = rank_key_t<L>;
  Device device;
  emulator::Machine& machine = emulator::Machine::get();
  const int64_t batch = sizes.shape(0);
  const int count = static_cast<int>(levels.size());
  std::vector<int64_t> level_sizes;
  for (const Level& level : levels) {
    level_sizes.push_back(level.anchors * level.height * level.width * options.classes);
  }
  const DetectPlan plan =
      plan_detect(level_sizes, batch, options.topk, sizeof(Key), kFilterTile<S>, options.wanted_parts);

  FilterArgs<L> filter = {};
  SelectArgs<L> groups = {};
  SelectArgs<L> select = {};
  RankArgs<L, T> rank = {};
  filter.num_levels = groups.num_levels = select.num_levels = rank.num_levels = count;
  filter.part = plan.part;
  filter.smallest = smallest_logit_above<L>(options.score_thresh);
  filter.classes = static_cast<uint32_t>(options.classes);
  filter.topk = options.topk;
  filter.candidates = device.room<Key>(plan.slots);
  filter.counts = device.room<uint32_t>(plan.parts);
  int64_t first_anchor = 0;
  for (int i = 0; i < count; ++i) {
    const Level& level = levels[i];
    const LevelPlan& layout = plan.levels[i];
    const int64_t cells = level.height * level.width;
    filter.levels[i] = {shifted<S>(device, level.logits, options.shift),
                        level_sizes[i],
                        level_sizes[i],
                        static_cast<uint32_t>(first_anchor * options.classes),
                        static_cast<uint32_t>(level.anchors),
                        static_cast<uint32_t>(cells),
                        level.planes,
                        static_cast<int>(layout.parts),
                        static_cast<int>(layout.first_part),
                        layout.capacity,
                        layout.first_slot};
    const bool grouped = plan.groups > 0;
    groups.levels[i] = {static_cast<int>(layout.parts),
                        static_cast<int>(layout.first_part),
                        layout.capacity,
                        layout.first_slot,
                        static_cast<int>(layout.groups),
                        static_cast<int>(layout.first_group),
                        layout.most,
                        layout.group_room,
                        layout.first_left};
    select.levels[i] = {static_cast<int>(grouped ? layout.groups : layout.parts),
                        static_cast<int>(grouped ? layout.first_group : layout.first_part),
                        grouped ? layout.group_room : layout.capacity,
                        grouped ? layout.first_left : layout.first_slot,
                        1,
                        static_cast<int>(batch) * i,
                        layout.most,
                        layout.most,
                        layout.first};
    rank.levels[i] = {device.add<void>(level.deltas),
                      level.delta_strides[0],
                      level.delta_strides[1],
                      level.delta_strides[2],
                      level.delta_strides[3],
                      first_anchor,
                      layout.first,
                      layout.most,
                      static_cast<int>(level.anchors),
                      static_cast<int>(level.width)};
    first_anchor += level.anchors * cells;
  }
  machine.run(static_cast<unsigned>(plan.parts), kFilterThreads, options.schedule,
              [&] { detect_filter_kernel<S>(filter); });
  select.candidates = filter.candidates;
  select.counts = filter.counts;
  if (plan.groups > 0) {
    groups.candidates = filter.candidates;
    groups.counts = filter.counts;
    groups.selected = device.room<Key>(plan.group_slots);
    groups.selected_counts = device.room<uint32_t>(plan.groups);
    machine.run(static_cast<unsigned>(plan.groups), kSortThreads, options.schedule,
                [&] { detect_select_kernel<L>(groups); });
    select.candidates = groups.selected;
    select.counts = groups.selected_counts;
  }
  select.sorted = true;
  select.image_room = plan.room;
  select.selected = device.room<Key>(batch * plan.room);
  select.scratch = device.room<Key>(batch * plan.room);
  select.selected_counts = device.room<uint32_t>(batch * count);
  machine.run(static_cast<unsigned>(batch * count), kSortThreads, options.schedule,
              [&] { detect_select_kernel<L>(select); });

  rank.delta_type = delta_type_of(options.delta_type);
  rank.clip = options.clip_before_nms;
  rank.blocks_per_image = static_cast<int>((plan.room + kSortThreads - 1) / kSortThreads);
  rank.classes = filter.classes;
  rank.room = plan.room;
  rank.selected = select.selected;
  rank.selected_counts = select.selected_counts;
  rank.anchors = device.add<T>(anchors);
  rank.anchor_image_stride = anchors.ndim() == 3 ? 4 * first_anchor : 0;
  rank.keys = device.room<Key>(batch * plan.room);
  rank.boxes = device.room<Box<T>>(batch * plan.room);
  rank.labels = device.room<int32_t>(batch * plan.room);
  DetectWalkArgs<L, T> walk = {};
  walk.keys = rank.keys;
  walk.boxes = rank.boxes;
  walk.labels = rank.labels;
  walk.selected_counts = select.selected_counts;
  walk.num_levels = count;
  walk.room = plan.room;
  walk.threshold = threshold_below<T>(options.nms_thresh);
  walk.most = options.most;
  walk.clip = !options.clip_before_nms;
  walk.kept_boxes = device.room<Box<T>>(batch * options.most);
  walk.kept_labels = device.room<int32_t>(batch * options.most);
  walk.out_boxes = device.room<Box<T>>(batch * options.most);
  walk.out_scores = device.room<L>(batch * options.most);
  walk.out_labels = device.room<int64_t>(batch * options.most);
  walk.out_indices = device.room<int64_t>(batch * options.most);
  walk.out_counts = device.room<int32_t>(batch);
  for (int64_t first = 0; first < batch; first += options.images_per_launch) {
    const int64_t images = std::min<int64_t>(options.images_per_launch, batch - first);
    rank.first_image = walk.first_image = static_cast<int>(first);
    rank.sizes = walk.sizes = sizes_of<T>(device, sizes, options, first, images);
    machine.run(static_cast<unsigned>(images * rank.blocks_per_image), kSortThreads, options.schedule,
                [&] { detect_rank_kernel<L, T>(rank); });
    machine.run(static_cast<unsigned>(images), kWalkThreads, options.schedule,
                [&] { detect_walk_kernel<L, T>(walk); });
  }
  return py::make_tuple(fetch(reinterpret_cast<const T*>(walk.out_boxes), {batch, options.most, 4}),
                        fetch(walk.out_scores, {batch, options.most}), fetch(walk.out_labels, {batch, options.most}),
                        fetch(walk.out_indices, {batch, options.most}), fetch(walk.out_counts, {batch}));
}

template <typename T>
py::tuple run_storage(const std::vector<Level>& levels, const py::array& anchors, const py::array& sizes,
                      const Options& options) {
  if (options.logit_type == "float64") return run<double, T>(levels, anchors, sizes, options);
  if (options.logit_type == "float32") return run<float, T>(levels, anchors, sizes, options);
  if (options.logit_type == "float16") return run<Float16, T>(levels, anchors, sizes, options);
  return run<BFloat16, T>(levels, anchors, sizes, options);
}

}  // namespace

PYBIND11_MODULE(_detect_emulator, m) {
  py::register_exception<emulator::EmulationError>(m, "EmulationError");
  m.attr("sort_chunk") = kSortChunk;
  m.attr("fewest_freed") = kFewestFreed;
  m.attr("buffer_bytes") = kDetectBufferBytes;
  m.attr("select_lists") = kSelectLists;
  m.attr("select_room") = kSelectRoom;
  py::class_<Level>(m, "Level")
      .def(py::init([](const py::array& logits, const py::array& deltas, const std::array<int64_t, 4>& delta_strides,
                       int64_t anchors, int64_t height, int64_t width, bool planes) {
        return Level{logits, deltas, delta_strides, anchors, height, width, planes};
      }));
  m.def(
      "detect",
      [](const std::vector<Level>& levels, const py::array& anchors, const py::array& sizes,
         const std::string& logit_type, const std::string& delta_type, int64_t classes, double score_thresh,
         int64_t topk, double nms_thresh, int64_t most, bool clip_before_nms, bool sizes_as_list, int64_t wanted_parts,
         int shift, int images_per_launch, const std::string& order, uint64_t seed, int live_blocks) {
        const Options options{logit_type,        delta_type,      classes,       score_thresh,
                              topk,              nms_thresh,      most,          clip_before_nms,
                              sizes_as_list,     wanted_parts,    shift,         images_per_launch,
                              {emulator::order_of(order), seed, live_blocks}};
        return anchors.itemsize() == sizeof(float) ? run_storage<float>(levels, anchors, sizes, options)
                                                   : run_storage<double>(levels, anchors, sizes, options);
      },
      py::arg("levels"), py::arg("anchors"), py::arg("sizes"), py::kw_only(), py::arg("logit_type"),
      py::arg("delta_type"), py::arg("classes"), py::arg("score_thresh"), py::arg("topk"), py::arg("nms_thresh"),
      py::arg("most"), py::arg("clip_before_nms") = true, py::arg("sizes_as_list") = true,
      py::arg("wanted_parts") = 3, py::arg("shift") = 0, py::arg("images_per_launch") = kDetectMaxImages,
      py::arg("order") = "forward", py::arg("seed") = 0, py::arg("live_blocks") = 1);
  // Parts, capacities and room of a division of the logits; for the bound of the workspace.
  m.def("plan", [](const std::vector<int64_t>& sizes, int64_t batch, int64_t topk, int64_t key_bytes, int64_t tile,
                   int64_t wanted_parts) {
    const DetectPlan plan = plan_detect(sizes, batch, topk, key_bytes, tile, wanted_parts);
    py::list levels;
    for (const LevelPlan& level : plan.levels) {
      levels.append(py::dict(py::arg("parts") = level.parts, py::arg("capacity") = level.capacity,
                             py::arg("most") = level.most, py::arg("groups") = level.groups));
    }
    return py::dict(py::arg("part") = plan.part, py::arg("parts") = plan.parts, py::arg("slots") = plan.slots,
                    py::arg("room") = plan.room, py::arg("groups") = plan.groups,
                    py::arg("group_slots") = plan.group_slots, py::arg("levels") = levels);
  });
}
