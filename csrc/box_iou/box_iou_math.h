// IoU of two boxes as torchvision.ops.box_iou computes it, to the bit (zeros may differ in sign), whatever the numbers:
// what it gives for infinite, inverted and NaN boxes too.
//
// torch.minimum, maximum and clamp propagate NaN; one instruction for the smaller or larger of two numbers does not. A
// NaN corner makes every IoU of its box NaN, so it is noted once, in the box's area: union and quotient then are NaN.
#pragma once

#include <cmath>

#include "common/box_math.h"

namespace retinanet_ext {

enum class BoxFormat : int {
  kXyxy = 0,    // corners
  kXywh = 1,    // a corner and the size
  kCxcywh = 2,  // the centre and the size
};

template <typename T>
struct IouBox {
  Box<T> corners;
  T area;  // NaN where a corner is
};

// `numbers`: the four of a box in its format.
template <typename T>
RNX_HD IouBox<T> iou_box(const Box<T>& numbers, BoxFormat format) {
  if (format == BoxFormat::kXyxy) return {numbers, box_area(numbers)};  // infinity - infinity included: a NaN area
  const T width = numbers.x2;
  const T height = numbers.y2;
  Box<T> corners = numbers;
  if (format == BoxFormat::kXywh) {
    corners.x2 = exact_add(numbers.x1, width);
    corners.y2 = exact_add(numbers.y1, height);
  } else {
    const T half_width = exact_mul(T(0.5), width);
    const T half_height = exact_mul(T(0.5), height);
    corners = {exact_sub(numbers.x1, half_width), exact_sub(numbers.y1, half_height),
               exact_add(numbers.x1, half_width), exact_add(numbers.y1, half_height)};
  }
  const bool nan = corners.x1 != corners.x1 || corners.y1 != corners.y1 || corners.x2 != corners.x2 ||
                   corners.y2 != corners.y2;
  return {corners, nan ? T(NAN) : exact_mul(width, height)};
}

template <typename T>
RNX_HD T box_pair_iou(const IouBox<T>& a, const IouBox<T>& b) {
  const T width = positive_part(
      exact_sub(smaller(a.corners.x2, b.corners.x2), larger(a.corners.x1, b.corners.x1)));
  const T height = positive_part(
      exact_sub(smaller(a.corners.y2, b.corners.y2), larger(a.corners.y1, b.corners.y1)));
  const T intersection = exact_mul(width, height);
  const T union_area = exact_sub(exact_add(a.area, b.area), intersection);
#if defined(__CUDA_ARCH__)
  // Most pairs do not overlap, and a division leaves its short path for a numerator of 0.
  if (intersection > T(0)) return exact_div(intersection, union_area);
  // 0 / union, or NaN. The product is NaN where either is.
  return union_area == T(0) || union_area != union_area ? T(NAN) : intersection;
#else
  return exact_div(intersection, union_area);
#endif
}

}  // namespace retinanet_ext
