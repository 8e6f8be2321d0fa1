// From tensors of boxes to what kernels read (box_rows.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "box_rows.h"
#include "checks.h"
#include "dispatch.h"

namespace retinanet_ext {

inline BoxType box_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return BoxType::kFloat64;
    case ScalarType::Float:
      return BoxType::kFloat32;
    case ScalarType::Half:
      return BoxType::kFloat16;
    default:
      return BoxType::kBFloat16;
  }
}

inline size_t box_bytes(BoxType type) {
  switch (type) {
    case BoxType::kFloat64:
      return 4 * sizeof(double);
    case BoxType::kFloat32:
      return 4 * sizeof(float);
    default:
      return 4 * sizeof(uint16_t);
  }
}

// The rows of a tensor [..., 4].
inline BoxRows box_rows(const torch::stable::Tensor& boxes) {
  const int64_t last = boxes.dim() - 1;
  const void* data = boxes.const_data_ptr();
  bool whole = boxes.stride(last) == 1 && reinterpret_cast<uintptr_t>(data) % (4 * boxes.element_size()) == 0;
  for (int64_t d = 0; d < last; ++d) whole = whole && (boxes.size(d) <= 1 || boxes.stride(d) % 4 == 0);
  return {data, box_type(boxes.scalar_type()), boxes.stride(last), whole};
}

// The first `first_dims` dimensions of one tensor with the first `second_dims` of another, as NumPy broadcasts. Appends
// their common sizes to `shape`.
inline BroadcastDims broadcast_dims(const char* op, const torch::stable::Tensor& first, int64_t first_dims,
                                    const torch::stable::Tensor& second, int64_t second_dims,
                                    std::vector<int64_t>& shape) {
  BroadcastDims merged{};
  const int64_t rank = std::max(first_dims, second_dims);
  for (int64_t d = 0; d < rank; ++d) {
    const int64_t d1 = d - (rank - first_dims);
    const int64_t d2 = d - (rank - second_dims);
    const int64_t size1 = d1 < 0 ? 1 : first.size(d1);
    const int64_t size2 = d2 < 0 ? 1 : second.size(d2);
    require(size1 == size2 || size1 == 1 || size2 == 1, op, ": shapes ", shape_text(first), " and ",
            shape_text(second), " do not broadcast");
    const int64_t size = size1 == 1 ? size2 : size1;
    shape.push_back(size);
    if (size == 1) continue;
    const int64_t stride1 = size1 == 1 ? 0 : first.stride(d1);
    const int64_t stride2 = size2 == 1 ? 0 : second.stride(d2);
    const int last = merged.count - 1;
    if (last >= 0 && merged.strides[0][last] == size * stride1 && merged.strides[1][last] == size * stride2) {
      merged.sizes[last] *= size;
      merged.strides[0][last] = stride1;
      merged.strides[1][last] = stride2;
      continue;
    }
    require(merged.count < kMaxBroadcastDims, op, ": at most ", kMaxBroadcastDims,
            " leading dimensions can be walked without a copy; make ", shape_text(first), " and ", shape_text(second),
            " contiguous");
    merged.sizes[merged.count] = size;
    merged.strides[0][merged.count] = stride1;
    merged.strides[1][merged.count] = stride2;
    ++merged.count;
  }
  return merged;
}

}  // namespace retinanet_ext
