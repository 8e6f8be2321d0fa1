// The gradient of one pair's IoU with respect to one of its boxes, and of all pairs with respect to a box's four numbers.
//
// Kinks are PyTorch's: half to each of two equal coordinates, all of it at an overlap of zero.
#pragma once

#include "box_iou/box_iou_math.h"

namespace retinanet_ext {

// The gradients of a box's corners by its overlaps, and of its area; those of many pairs add up.
template <typename T>
struct IouGradient {
  T x1;
  T y1;
  T x2;
  T y2;
  T area;
};

// `grad` is the gradient of the IoU of `own` with `other`.
template <typename T>
RNX_HD IouGradient<T> pair_gradient(const IouBox<T>& own, const IouBox<T>& other, T grad) {
  const Box<T>& a = own.corners;
  const Box<T>& b = other.corners;
  const T x_overlap = smaller_or_nan(a.x2, b.x2) - larger_or_nan(a.x1, b.x1);
  const T y_overlap = smaller_or_nan(a.y2, b.y2) - larger_or_nan(a.y1, b.y1);
  const T width = positive_part(x_overlap);
  const T height = positive_part(y_overlap);
  const T intersection = width * height;
  const T union_area = own.area + other.area - intersection;
  const T per_union = grad / union_area;
  // The union grows with both areas and shrinks with the intersection.
  const T by_area = -per_union * intersection / union_area;
  const T by_intersection = per_union - by_area;
  const T by_x = x_overlap >= T(0) ? by_intersection * height : T(0);
  const T by_y = y_overlap >= T(0) ? by_intersection * width : T(0);
  return {-by_x * share_of_larger(a.x1, b.x1), -by_y * share_of_larger(a.y1, b.y1),
          by_x * share_of_smaller(a.x2, b.x2), by_y * share_of_smaller(a.y2, b.y2), by_area};
}

// The gradient of a box's four numbers, in its format, from the sum over its pairs.
inline Box<double> iou_box_gradient(const Box<double>& numbers, const IouGradient<double>& sum, BoxFormat format) {
  const bool corners = format == BoxFormat::kXyxy;
  const double by_width = sum.area * (corners ? numbers.y2 - numbers.y1 : numbers.y2);
  const double by_height = sum.area * (corners ? numbers.x2 - numbers.x1 : numbers.x2);
  if (corners) return {sum.x1 - by_width, sum.y1 - by_height, sum.x2 + by_width, sum.y2 + by_height};
  const double by_x = sum.x1 + sum.x2;
  const double by_y = sum.y1 + sum.y2;
  if (format == BoxFormat::kXywh) return {by_x, by_y, sum.x2 + by_width, sum.y2 + by_height};
  return {by_x, by_y, 0.5 * (sum.x2 - sum.x1) + by_width, 0.5 * (sum.y2 - sum.y1) + by_height};
}

}  // namespace retinanet_ext
