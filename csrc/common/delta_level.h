// How one pyramid level of box deltas lies in memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace retinanet_ext {

// One level of deltas, [B, 4 * A, H, W] or [B, n, 4] (A = 1, H = n, W = 1), read by its strides, whatever they are.
struct DeltaLevel {
  torch::stable::Tensor deltas;
  int64_t anchors;  // A: anchors a cell
  int64_t height;
  int64_t width;
  int64_t first_anchor;  // of the level, among the N of an image
  int64_t image_stride;  // elements from one image's deltas to the next; and so on
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  bool channels_last;  // the gradient is laid out so too; otherwise it is contiguous

  int64_t cells() const {
    return height * width;
  }
  int64_t rows() const {
    return anchors * cells();
  }
  // Of the gradient, whether the cells of one channel lie side by side; otherwise the channels of one cell do.
  bool planes() const {
    return deltas.dim() == 4 && !channels_last;
  }
};

inline DeltaLevel describe_deltas(const torch::stable::Tensor& deltas, int64_t first_anchor) {
  if (deltas.dim() == 3) {
    return {deltas,           1,
            deltas.size(1),   1,
            first_anchor,     deltas.stride(0),
            deltas.stride(2), deltas.stride(1),
            0,                false};
  }
  const int64_t channels = deltas.size(1);
  const int64_t width = deltas.size(3);
  const int64_t dense[] = {deltas.size(2) * width * channels, 1, width * channels, channels};
  bool channels_last = deltas.numel() > 0;
  for (int64_t i = 0; i < 4; ++i) {
    channels_last = channels_last && (deltas.size(i) == 1 || deltas.stride(i) == dense[i]);
  }
  return {deltas,           channels / 4,     deltas.size(2),   width,           first_anchor,
          deltas.stride(0), deltas.stride(1), deltas.stride(2), deltas.stride(3), channels_last};
}

}  // namespace retinanet_ext
