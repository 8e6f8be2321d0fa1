// Matching anchors with ground-truth boxes: the IoU of a pair, and which pairs need it.
//
// Anchors are taken in tiles of kMatchTile consecutive rows. Of a tile a few numbers are known (TileBounds); from them
// and a box follows an upper bound of the IoU of the box with any anchor of the tile. A pair of a box and a tile is
// left out where that bound is
//
//   below the background threshold: no anchor of the tile becomes foreground, or is kept out of the loss, by this box;
//   and below an IoU that the box has with some anchor: its best anchor is not in the tile.
//
// What is left out changes no result, whatever the order in which tiles are looked at.
#pragma once

#include <cstdint>
#include <limits>

#include "common/box_math.h"

namespace retinanet_ext {

constexpr int kMatchTile = 128;

constexpr int32_t kMatchBackground = -1;
constexpr int32_t kMatchLeftOut = -2;

// What becomes of the anchors that a box has its best IoU with (low-quality matches).
enum class MatchPolicy : int {
  kSafe = 0,         // as kTorchvision, but a box that overlaps no anchor changes nothing
  kTorchvision = 1,  // they get the box that they overlap most; detectron2's rule, too
  kMmdet = 2,        // they get this box, the last one of several
};

// IoU of a box with an anchor, each operation rounded on its own, in torchvision's order. 0 where it is not a number:
// the box has positive sides, the anchor may be anything.
template <typename T>
RNX_HD T match_iou(const Box<T>& gt, T gt_area, const Box<T>& anchor, T anchor_area) {
  const T width = larger(exact_sub(smaller(anchor.x2, gt.x2), larger(anchor.x1, gt.x1)), T(0));
  const T height = larger(exact_sub(smaller(anchor.y2, gt.y2), larger(anchor.y1, gt.y1)), T(0));
  const T intersection = exact_mul(width, height);
  const T iou = exact_div(intersection, exact_sub(exact_add(gt_area, anchor_area), intersection));
  return iou > T(0) ? iou : T(0);
}

// A box takes part where its sides are positive and finite.
template <typename T>
RNX_HD bool is_proper_box(const Box<T>& box) {
  const T width = exact_sub(box.x2, box.x1);
  const T height = exact_sub(box.y2, box.y1);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  return width > T(0) && height > T(0) && width < kInfinity && height < kInfinity;
}

// Whether at least half of the anchor's own area lies inside a region to ignore.
template <typename T>
RNX_HD bool is_mostly_inside(const Box<T>& anchor, T anchor_area, const Box<T>& region) {
  const T width = larger(exact_sub(smaller(anchor.x2, region.x2), larger(anchor.x1, region.x1)), T(0));
  const T height = larger(exact_sub(smaller(anchor.y2, region.y2), larger(anchor.y1, region.y1)), T(0));
  return exact_div(exact_mul(width, height), anchor_area) >= T(0.5);
}

// Of the anchors of a tile: the box around them, their largest sides, their smallest and largest area.
template <typename T>
struct TileBounds {
  T x1, y1, x2, y2;
  T max_width, max_height;
  T min_area, max_area;
};

template <typename T>
RNX_HD TileBounds<T> no_anchors() {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  return {kInfinity, kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, kInfinity, -kInfinity};
}

// A NaN changes nothing: the IoU of such an anchor is 0.
template <typename T>
RNX_HD void include_anchor(TileBounds<T>& bounds, const Box<T>& anchor, T area) {
  bounds.x1 = smaller(anchor.x1, bounds.x1);
  bounds.y1 = smaller(anchor.y1, bounds.y1);
  bounds.x2 = larger(anchor.x2, bounds.x2);
  bounds.y2 = larger(anchor.y2, bounds.y2);
  bounds.max_width = larger(exact_sub(anchor.x2, anchor.x1), bounds.max_width);
  bounds.max_height = larger(exact_sub(anchor.y2, anchor.y1), bounds.max_height);
  bounds.min_area = smaller(area, bounds.min_area);
  bounds.max_area = larger(area, bounds.max_area);
}

template <typename T>
RNX_HD void include_bounds(TileBounds<T>& bounds, const TileBounds<T>& other) {
  bounds.x1 = smaller(other.x1, bounds.x1);
  bounds.y1 = smaller(other.y1, bounds.y1);
  bounds.x2 = larger(other.x2, bounds.x2);
  bounds.y2 = larger(other.y2, bounds.y2);
  bounds.max_width = larger(other.max_width, bounds.max_width);
  bounds.max_height = larger(other.max_height, bounds.max_height);
  bounds.min_area = smaller(other.min_area, bounds.min_area);
  bounds.max_area = larger(other.max_area, bounds.max_area);
}

template <typename T>
RNX_HD bool touches(const TileBounds<T>& tile, const Box<T>& box) {
  return (smaller(tile.x2, box.x2) > larger(tile.x1, box.x1)) & (smaller(tile.y2, box.y2) > larger(tile.y1, box.y1));
}

// False only where the IoU of the box with every anchor of the tile, as match_iou rounds it, is below `threshold`, or
// 0.
//
// The overlap's sides are at most those of the box, of the box around the tile and of the largest anchor, and rounding
// keeps that order; the union is at least each of the areas, less three roundings. Near the smallest normal number,
// where a rounding may be any part of a number, nothing is left out. A NaN, from an infinite area, compares as true.
template <typename T>
RNX_HD bool may_reach(const TileBounds<T>& tile, const Box<T>& gt, T gt_area, T threshold) {
  constexpr T kSlack = T(1) + 16 * std::numeric_limits<T>::epsilon();
  constexpr T kTiny = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  const T width = smaller(tile.max_width, exact_sub(smaller(tile.x2, gt.x2), larger(tile.x1, gt.x1)));
  const T height = smaller(tile.max_height, exact_sub(smaller(tile.y2, gt.y2), larger(tile.y1, gt.y1)));
  const T intersection = smaller(tile.max_area, width * height);
  const T limit = threshold * larger(tile.min_area, gt_area);
  const bool below = (intersection * kSlack < limit) & (limit > kTiny) & (threshold > kTiny) & (gt_area > kTiny);
  return (width > T(0)) & (height > T(0)) & !below;
}

}  // namespace retinanet_ext
