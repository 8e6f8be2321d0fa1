// Runs of half-precision elements to and from float on the CPU, out of line: compiled once for each instruction set, not
// inside each of the many kernels that read and write them, where they were most of what there was to compile. Sources that
// differ in whether they may contract products share these functions, which have none.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"
#include "half_convert.h"
#include "host_device.h"

namespace retinanet_ext {

RNX_HD void from_float(float value, Float16& half) {
  half = to_float16(value);
}

RNX_HD void from_float(float value, BFloat16& half) {
  half = to_bfloat16(value);
}

template <typename Half>
struct WidenBody {
  const Half* source;
  float* target;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) target[i] = to_float(source[i]);
  }
};

template <typename Half>
struct NarrowBody {
  const float* source;
  Half* target;

  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) from_float(source[i], target[i]);
  }
};

template <typename Half>
void widen(const Half* source, int64_t count, float* target) {
  run_on_best_isa(WidenBody<Half>{source, target}, 0, count);
}

template <typename Half>
void narrow(const float* source, int64_t count, Half* target) {
  run_on_best_isa(NarrowBody<Half>{source, target}, 0, count);
}

}  // namespace retinanet_ext
