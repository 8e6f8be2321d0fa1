// How one pyramid level of class logits lies in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace retinanet_ext {

// Within one image.
enum class LevelLayout {
  kRows,    // [n, K]: the K logits of an anchor together; [B, n, K], and channels_last [B, A*K, H, W]
  kPlanes,  // [A, K, H*W]: contiguous [B, A*K, H, W]
};

struct LogitLevel {
  torch::stable::Tensor logits;  // as given, or a contiguous copy where no kernel can read what was given
  LevelLayout layout;
  int64_t anchors;       // A: anchors a cell; 1 for [B, n, K]
  int64_t cells;         // H*W; n for [B, n, K]
  int64_t first_anchor;  // of the level, among the N of an image
  int64_t image_stride;  // elements from one image's logits to the next
  bool channels_last;    // the gradient is laid out so too; otherwise it is contiguous

  int64_t rows() const {
    return anchors * cells;
  }
};

// Whether dimensions from `first` on are strided as listed; dimensions of one element may have any stride.
inline bool strides_are(const torch::stable::Tensor& tensor, int64_t first, std::initializer_list<int64_t> strides) {
  int64_t dim = first;
  for (const int64_t stride : strides) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != stride) return false;
    ++dim;
  }
  return true;
}

inline LogitLevel describe_level(const torch::stable::Tensor& logits, int64_t num_classes, int64_t first_anchor) {
  LogitLevel level{logits, LevelLayout::kRows, 1, 0, first_anchor, 0, false};
  if (logits.dim() == 3) {
    level.cells = logits.size(1);
    if (!strides_are(logits, 1, {num_classes, 1})) level.logits = torch::stable::contiguous(logits);
  } else {
    const int64_t channels = logits.size(1);
    const int64_t width = logits.size(3);
    level.anchors = channels / num_classes;
    level.cells = logits.size(2) * width;
    level.channels_last =
        logits.numel() > 0 && strides_are(logits, 0, {channels * level.cells, 1, width * channels, channels});
    if (!level.channels_last) {
      level.layout = LevelLayout::kPlanes;
      if (!strides_are(logits, 1, {level.cells, width, 1})) level.logits = torch::stable::contiguous(logits);
    }
  }
  level.image_stride = logits.size(0) > 1 ? level.logits.stride(0) : level.rows() * num_classes;
  return level;
}

}  // namespace retinanet_ext
