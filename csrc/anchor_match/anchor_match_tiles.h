// The tiles of anchor matching on the CPU: a tile of anchors against the boxes of an image, all anchors of the tile at
// once in vector registers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "anchor_match/anchor_match_math.h"
#include "common/fast_math.h"

namespace retinanet_ext {

constexpr int kLanes = 16;  // of the widest vector register, in floats

// float and double as integers of their size: non-negative ones compare alike, and integer maxima vectorise.
template <typename T>
using bits_of = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Boxes by coordinate, with room to be read in whole vectors.
template <typename T>
struct BoxColumns {
  std::vector<T> x1, y1, x2, y2, area;
  std::vector<int32_t> rows;  // among the boxes of the image, as given
  int64_t size = 0;

  void push_back(const Box<T>& box, int32_t row) {
    x1.push_back(box.x1);
    y1.push_back(box.y1);
    x2.push_back(box.x2);
    y2.push_back(box.y2);
    area.push_back(box_area(box));
    rows.push_back(row);
    ++size;
  }
  void pad() {
    const size_t room = static_cast<size_t>((size + kLanes - 1) / kLanes * kLanes);
    for (std::vector<T>* column : {&x1, &y1, &x2, &y2, &area}) column->resize(room, T(0));
  }
  RNX_HD Box<T> box(int64_t i) const {
    return {x1[i], y1[i], x2[i], y2[i]};
  }
};

template <typename T>
struct MatchImage {
  BoxColumns<T> boxes;    // that take part
  BoxColumns<T> regions;  // to ignore
  std::vector<int32_t> labels;  // of the boxes that take part; none where none are wanted
  int64_t first = 0;      // of its boxes among those of all images
  // For the second pass.
  bool restores_all = false;  // a box that overlaps no anchor makes foreground of every anchor
  int64_t restored_by = -1;   // kMmdet: the last such box
};

template <typename T>
struct MatchTile {
  T x1[kMatchTile], y1[kMatchTile], x2[kMatchTile], y2[kMatchTile], area[kMatchTile];

  RNX_HD Box<T> box(int i) const {
    return {x1[i], y1[i], x2[i], y2[i]};
  }
};

template <typename T>
struct MatchWork {
  const T* anchors;  // [sets, N, 4]
  int64_t num_anchors;
  int64_t tiles;  // of one set
  int64_t sets;
  std::vector<MatchImage<T>> images;
  int64_t num_boxes;  // of all images
  T fg_iou_thresh;
  T bg_iou_thresh;
  T min_pos_iou;
  MatchPolicy policy;
  std::vector<TileBounds<T>> bounds;            // [sets, tiles]
  std::unique_ptr<std::atomic<T>[]> best;       // [num_boxes], each box's best IoU
  std::unique_ptr<std::atomic<int32_t>[]> foreground;  // [B]
  int32_t* matched;                             // [B, N]
  int32_t* labels;                              // [B, N], or null

  // Images that share an anchor set.
  int64_t first_image(int64_t set) const {
    return sets == 1 ? 0 : set;
  }
  int64_t end_image(int64_t set) const {
    return sets == 1 ? static_cast<int64_t>(images.size()) : set + 1;
  }
};

// What a thread works with: its own view of the best IoUs, and the boxes that may matter to the tile at hand.
template <typename T>
struct Scratch {
  std::vector<T> best;
  std::vector<uint8_t> flags;
  std::vector<int32_t> listed;
};

// The tile's anchors by coordinate; beyond the last anchor, boxes without area.
template <typename T>
RNX_HD void load_tile(const MatchWork<T>& work, int64_t set, int64_t tile, MatchTile<T>& out) {
  const int64_t first = tile * kMatchTile;
  const int64_t count = std::min<int64_t>(kMatchTile, work.num_anchors - first);
  const T* anchors = work.anchors + (set * work.num_anchors + first) * 4;
  if (count == kMatchTile) {
    for (int i = 0; i < kMatchTile; ++i) {
      out.x1[i] = anchors[4 * i];
      out.y1[i] = anchors[4 * i + 1];
      out.x2[i] = anchors[4 * i + 2];
      out.y2[i] = anchors[4 * i + 3];
    }
  } else {
    for (int i = 0; i < kMatchTile; ++i) {
      out.x1[i] = i < count ? anchors[4 * i] : T(0);
      out.y1[i] = i < count ? anchors[4 * i + 1] : T(0);
      out.x2[i] = i < count ? anchors[4 * i + 2] : T(0);
      out.y2[i] = i < count ? anchors[4 * i + 3] : T(0);
    }
  }
  for (int i = 0; i < kMatchTile; ++i) out.area[i] = box_area(out.box(i));
}

template <typename T>
RNX_HD TileBounds<T> find_bounds(const MatchTile<T>& tile, int64_t count) {
  TileBounds<T> lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = no_anchors<T>();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) include_anchor(lanes[lane], tile.box(i + lane), tile.area[i + lane]);
  }
  for (; i < count; ++i) include_anchor(lanes[0], tile.box(i), tile.area[i]);
  for (int lane = 1; lane < kLanes; ++lane) include_bounds(lanes[0], lanes[lane]);
  return lanes[0];
}

// Lists the boxes of an image that may have an IoU of at least `best[i]`, or of `threshold`, with the tile, in order.
template <typename T>
RNX_HD void list_boxes(const BoxColumns<T>& boxes, const TileBounds<T>& bounds, const T* best, T threshold,
                       Scratch<T>& scratch) {
  uint8_t* flags = scratch.flags.data();
  const T *x1 = boxes.x1.data(), *y1 = boxes.y1.data(), *x2 = boxes.x2.data(), *y2 = boxes.y2.data();
  const T* area = boxes.area.data();
  const TileBounds<T> tile = bounds;
  scratch.listed.clear();
  for (int64_t start = 0; start < boxes.size; start += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = start + lane;
      flags[lane] = may_reach(tile, Box<T>{x1[i], y1[i], x2[i], y2[i]}, area[i], smaller(best[i], threshold));
    }
    uint64_t words[2];
    static_assert(sizeof(words) == kLanes);
    std::memcpy(words, flags, sizeof(words));
    if ((words[0] | words[1]) == 0) continue;
    for (int lane = 0; lane < kLanes && start + lane < boxes.size; ++lane) {
      if (flags[lane] != 0) scratch.listed.push_back(static_cast<int32_t>(start + lane));
    }
  }
}

// IoU of one box with each anchor of a tile.
template <typename T>
RNX_HD void tile_iou(const MatchTile<T>& tile, const Box<T>& gt, T gt_area, T* iou) {
  for (int i = 0; i < kMatchTile; ++i) iou[i] = match_iou(gt, gt_area, tile.box(i), tile.area[i]);
}

template <typename T>
RNX_HD T largest(const T* values, int64_t count) {
  bits_of<T> most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bits_of<T> bits = bit_cast<bits_of<T>>(values[i]);
    most = bits > most ? bits : most;
  }
  return bit_cast<T>(most);
}

// Raises `shared` to `value`.
template <typename T>
void raise_to(std::atomic<T>& shared, T value) {
  T before = shared.load(std::memory_order_relaxed);
  while (before < value && !shared.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
}

template <typename T>
void exchange_best(const MatchWork<T>& work, std::vector<T>& best) {
  for (int64_t i = 0; i < work.num_boxes; ++i) {
    const T shared = work.best[i].load(std::memory_order_relaxed);
    if (best[i] > shared) {
      raise_to(work.best[i], best[i]);
    } else {
      best[i] = shared;
    }
  }
}

template <typename T>
RNX_HD int32_t state_of(const MatchWork<T>& work, T iou, int32_t row) {
  return iou >= work.fg_iou_thresh ? row : (iou < work.bg_iou_thresh ? kMatchBackground : kMatchLeftOut);
}

// Anchors without a match that lie in a region to ignore are left out.
template <typename T>
RNX_HD void leave_out_ignored(const MatchImage<T>& image, const MatchTile<T>& tile, const TileBounds<T>& bounds,
                              int64_t count, int32_t* matched) {
  for (int64_t r = 0; r < image.regions.size; ++r) {
    const Box<T> region = image.regions.box(r);
    if (!touches(bounds, region)) continue;
    for (int64_t i = 0; i < count; ++i) {
      const bool inside = is_mostly_inside(tile.box(i), tile.area[i], region);
      matched[i] = matched[i] == kMatchBackground && inside ? kMatchLeftOut : matched[i];
    }
  }
}

// First pass, one image and tile: the best box of each anchor that may have one, and the best IoU of the boxes. Returns
// the number of foreground anchors.
template <typename T>
RNX_HD int64_t match_tile(const MatchWork<T>& work, const MatchImage<T>& image, const MatchTile<T>& tile,
                          const TileBounds<T>& bounds, int64_t count, Scratch<T>& scratch, int32_t* matched,
                          int32_t* labels) {
  const BoxColumns<T>& boxes = image.boxes;
  T* best = scratch.best.data() + image.first;
  list_boxes(boxes, bounds, best, work.bg_iou_thresh, scratch);
  int64_t foreground = 0;
  if (scratch.listed.empty()) {
    const int32_t state = boxes.size == 0 ? kMatchBackground : state_of(work, T(0), boxes.rows[0]);
    std::fill(matched, matched + count, state);
    if (labels != nullptr) std::fill(labels, labels + count, state >= 0 ? image.labels[0] : state);
    foreground = state >= 0 ? count : 0;
  } else {
    T best_iou[kMatchTile] = {};
    bits_of<T> best_box[kMatchTile] = {};
    T iou[kMatchTile];
    for (const int32_t m : scratch.listed) {
      tile_iou(tile, boxes.box(m), boxes.area[m], iou);
      for (int i = 0; i < kMatchTile; ++i) {
        const bool better = iou[i] > best_iou[i];  // the first box on a tie
        best_iou[i] = better ? iou[i] : best_iou[i];
        best_box[i] = better ? static_cast<bits_of<T>>(m) : best_box[i];
      }
      best[m] = larger(best[m], largest(iou, kMatchTile));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t state = state_of(work, best_iou[i], static_cast<int32_t>(best_box[i]));
      matched[i] = state >= 0 ? boxes.rows[state] : state;
      if (labels != nullptr) labels[i] = state >= 0 ? image.labels[state] : state;
      foreground += state >= 0;
    }
  }
  if (image.regions.size > 0) {
    leave_out_ignored(image, tile, bounds, count, matched);
    if (labels != nullptr) {
      for (int64_t i = 0; i < count; ++i) labels[i] = matched[i] < 0 ? matched[i] : labels[i];
    }
  }
  return foreground;
}

// The first box of highest IoU with one anchor.
template <typename T>
RNX_HD int64_t best_box_of(const BoxColumns<T>& boxes, const Box<T>& anchor, T area) {
  T best_iou = T(0);
  int64_t best_box = 0;
  T iou[kMatchTile];
  for (int64_t start = 0; start < boxes.size; start += kMatchTile) {
    const int64_t count = std::min<int64_t>(kMatchTile, boxes.size - start);
    for (int64_t i = 0; i < count; ++i) iou[i] = match_iou(boxes.box(start + i), boxes.area[start + i], anchor, area);
    const T most = largest(iou, count);
    if (!(most > best_iou)) continue;
    best_iou = most;
    best_box = start + (std::find(iou, iou + count, most) - iou);
  }
  return best_box;
}

// Second pass, one image and tile: the boxes get the anchors that they have their best IoU with. Returns by how much
// the number of foreground anchors grew.
template <typename T>
RNX_HD int64_t restore_tile(const MatchWork<T>& work, const MatchImage<T>& image, int64_t set, int64_t index,
                            MatchTile<T>& tile, bool& loaded, int64_t count, Scratch<T>& scratch, int32_t* matched,
                            int32_t* labels) {
  const BoxColumns<T>& boxes = image.boxes;
  const T* best = scratch.best.data() + image.first;
  const TileBounds<T>& bounds = work.bounds[set * work.tiles + index];
  list_boxes(boxes, bounds, best, std::numeric_limits<T>::infinity(), scratch);
  if (scratch.listed.empty() && !image.restores_all) return 0;
  if (!loaded) load_tile(work, set, index, tile);
  loaded = true;
  const bool mmdet = work.policy == MatchPolicy::kMmdet;
  int32_t restored[kMatchTile];  // the last box that restores the anchor, or -1
  std::fill(restored, restored + kMatchTile, image.restores_all ? static_cast<int32_t>(image.restored_by) : -1);
  T iou[kMatchTile];
  for (const int32_t m : scratch.listed) {
    if (!(best[m] > T(0)) || (mmdet && !(best[m] >= work.min_pos_iou))) continue;
    tile_iou(tile, boxes.box(m), boxes.area[m], iou);
    for (int i = 0; i < kMatchTile; ++i) {
      const int32_t by = iou[i] == best[m] ? m : -1;
      restored[i] = by > restored[i] ? by : restored[i];
    }
  }
  int64_t grown = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (restored[i] < 0) continue;
    const bool was_foreground = matched[i] >= 0;
    // An anchor that is foreground has its own best box already.
    if (!mmdet && was_foreground) continue;
    const int64_t box = mmdet ? restored[i] : best_box_of(boxes, tile.box(static_cast<int>(i)), tile.area[i]);
    matched[i] = boxes.rows[box];
    if (labels != nullptr) labels[i] = image.labels[box];
    grown += !was_foreground;
  }
  return grown;
}

}  // namespace retinanet_ext
