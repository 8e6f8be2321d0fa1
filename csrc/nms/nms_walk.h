// Greedy suppression on the CPU: candidates from the best to the worst, each against the boxes of its label that are
// kept.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "common/cpu_dispatch.h"
#include "nms/nms_math.h"

namespace retinanet_ext {

constexpr int64_t kNmsLanes = 16;  // of the widest vector register, in floats

// Boxes that are kept, by coordinate. Behind the last, up to a whole vector, stand areas that are not a number: such a
// box suppresses nothing.
template <typename T>
class KeptBoxes {
 public:
  int64_t size() const {
    return size_;
  }

  void push_back(const Box<T>& box, T area) {
    if (size_ % kNmsLanes == 0) {
      for (std::vector<T>* column : {&x1_, &y1_, &x2_, &y2_}) column->resize(size_ + kNmsLanes, T(0));
      area_.resize(size_ + kNmsLanes, std::numeric_limits<T>::quiet_NaN());
    }
    x1_[size_] = box.x1;
    y1_[size_] = box.y1;
    x2_[size_] = box.x2;
    y2_[size_] = box.y2;
    area_[size_] = area;
    ++size_;
  }

  // Whether one of the kept boxes from `begin`, rounded down to a whole vector, to `end` suppresses this one.
  RNX_HD bool suppress(const Box<T>& box, T area, T threshold, int64_t begin, int64_t end) const {
    const T *x1 = x1_.data(), *y1 = y1_.data(), *x2 = x2_.data(), *y2 = y2_.data(), *areas = area_.data();
    for (int64_t start = begin / kNmsLanes * kNmsLanes; start < end; start += kNmsLanes) {
      Overlap<T> overlaps[kNmsLanes];
      int maybe = 0;
      for (int64_t lane = 0; lane < kNmsLanes; ++lane) {
        const int64_t i = start + lane;
        overlaps[lane] = overlap_of(Box<T>{x1[i], y1[i], x2[i], y2[i]}, areas[i], box, area);
        maybe |= may_exceed(overlaps[lane], threshold);
      }
      if (maybe == 0 && threshold >= T(0)) continue;
      int found = 0;
      for (int64_t lane = 0; lane < kNmsLanes; ++lane) found |= exceeds(overlaps[lane], threshold);
      if (found != 0) return true;
    }
    return false;
  }

 private:
  std::vector<T> x1_, y1_, x2_, y2_, area_;
  int64_t size_ = 0;
};

// Candidates from the best to the worst, until `most` are kept: what a detector does with an image. `kept` gets their
// positions. boxes, labels [count]: in that order.
template <typename T, typename Label>
struct GreedyWalk {
  const Box<T>* boxes;
  const Label* labels;
  T threshold;
  int64_t most;
  std::vector<int32_t>& kept;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    std::unordered_map<Label, KeptBoxes<T>> kept_of_label;
    for (int64_t i = begin; i < end && static_cast<int64_t>(kept.size()) < most; ++i) {
      KeptBoxes<T>& others = kept_of_label[labels[i]];
      const T area = box_area(boxes[i]);
      if (others.suppress(boxes[i], area, threshold, 0, others.size())) continue;
      others.push_back(boxes[i], area);
      kept.push_back(static_cast<int32_t>(i));
    }
  }
};

// Rows by descending score; among equal scores the lower row first.
template <typename T>
std::vector<int32_t> rank_scores(const T* scores, int64_t count) {
  using Key = decltype(descending_key(T()));
  std::vector<std::pair<Key, int32_t>> keyed(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) keyed[i] = {descending_key(scores[i]), static_cast<int32_t>(i)};
  std::sort(keyed.begin(), keyed.end());
  std::vector<int32_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[i] = keyed[i].second;
  return order;
}

}  // namespace retinanet_ext
