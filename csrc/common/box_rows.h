// Boxes in memory: rows of four numbers, of any floating type and any strides; and the leading dimensions of two
// tensors of boxes that broadcast.
#pragma once

#include <cstdint>
#include <type_traits>

#include "box_math.h"
#include "half_convert.h"

namespace retinanet_ext {

enum class BoxType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct BoxRows {
  const void* data;
  BoxType type;
  int64_t number_stride;  // elements from one number of a box to the next
  bool whole;             // each box is one vector: its numbers lie side by side, from a multiple of their size on
};

template <typename T, typename S>
RNX_HD T to_compute(S value) {
  if constexpr (sizeof(S) == sizeof(uint16_t)) {
    return static_cast<T>(to_float(value));
  } else {
    return static_cast<T>(value);
  }
}

template <typename S>
struct alignas(4 * sizeof(S)) StoredBox {
  S numbers[4];
};

// The box that begins `offset` elements into the rows, stored as S, computed in T.
template <typename T, typename S>
RNX_HD Box<T> load_box_as(const BoxRows& rows, int64_t offset) {
  const S* source = static_cast<const S*>(rows.data) + offset;
  if (rows.whole) {
    const StoredBox<S> stored = *reinterpret_cast<const StoredBox<S>*>(source);
    return {to_compute<T>(stored.numbers[0]), to_compute<T>(stored.numbers[1]), to_compute<T>(stored.numbers[2]),
            to_compute<T>(stored.numbers[3])};
  }
  const int64_t stride = rows.number_stride;
  return {to_compute<T>(source[0]), to_compute<T>(source[stride]), to_compute<T>(source[2 * stride]),
          to_compute<T>(source[3 * stride])};
}

template <typename T>
RNX_HD Box<T> load_box(const BoxRows& rows, int64_t offset) {
  switch (rows.type) {
    case BoxType::kFloat64:
      return load_box_as<T, double>(rows, offset);
    case BoxType::kFloat32:
      return load_box_as<T, float>(rows, offset);
    case BoxType::kFloat16:
      return load_box_as<T, Float16>(rows, offset);
    default:
      return load_box_as<T, BFloat16>(rows, offset);
  }
}

template <typename S, typename T>
RNX_HD S to_stored(T value) {
  if constexpr (std::is_same_v<S, Float16>) {
    return to_float16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else {
    return static_cast<S>(value);
  }
}

// Contiguous boxes to be written, from a multiple of their size on.
struct BoxResult {
  void* data;  // or null, where nobody asks for them
  BoxType type;
};

template <typename S, typename T>
RNX_HD void store_box_as(const BoxResult& result, int64_t row, const Box<T>& box) {
  static_cast<StoredBox<S>*>(result.data)[row] = {
      {to_stored<S>(box.x1), to_stored<S>(box.y1), to_stored<S>(box.x2), to_stored<S>(box.y2)}};
}

template <typename T>
RNX_HD void store_box(const BoxResult& result, int64_t row, const Box<T>& box) {
  switch (result.type) {
    case BoxType::kFloat64:
      return store_box_as<double>(result, row, box);
    case BoxType::kFloat32:
      return store_box_as<float>(result, row, box);
    case BoxType::kFloat16:
      return store_box_as<Float16>(result, row, box);
    default:
      return store_box_as<BFloat16>(result, row, box);
  }
}

constexpr int kMaxBroadcastDims = 8;

// The leading dimensions of two tensors that broadcast, outermost first; neighbours that one stride each can walk are
// one dimension.
struct BroadcastDims {
  int count;
  int64_t sizes[kMaxBroadcastDims];
  int64_t strides[2][kMaxBroadcastDims];  // of the first and of the second tensor; 0 where it is repeated
};

struct BroadcastOffsets {
  int64_t first;
  int64_t second;
};

// Where entry `index` of the broadcast dimensions begins, in elements of each tensor.
RNX_HD BroadcastOffsets broadcast_offsets(const BroadcastDims& dims, int64_t index) {
  BroadcastOffsets offsets{0, 0};
  if (dims.count == 0) return offsets;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int d = dims.count - 1; d > 0; --d) {
    // A division in 64 bits takes several times as long.
    const bool narrow = static_cast<uint64_t>(index | dims.sizes[d]) >> 32 == 0;
    const int64_t rest = narrow ? static_cast<uint32_t>(index) / static_cast<uint32_t>(dims.sizes[d])
                                : index / dims.sizes[d];
    const int64_t place = index - rest * dims.sizes[d];
    offsets.first += place * dims.strides[0][d];
    offsets.second += place * dims.strides[1][d];
    index = rest;
  }
  offsets.first += index * dims.strides[0][0];
  offsets.second += index * dims.strides[1][0];
  return offsets;
}

}  // namespace retinanet_ext
