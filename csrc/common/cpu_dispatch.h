// One CPU kernel body, compiled for several instruction sets, chosen when the program runs.
//
// A body is a callable whose operator() and what it calls for every element are always_inline (RNX_HD): it is then compiled
// anew inside each of the functions below, under that function's instruction set. The wheel needs no -march and travels.
// A body may run another one for a block of elements: that is a call, and compiled once, not in every body.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "host_device.h"

namespace retinanet_ext {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

inline CpuIsa detect_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  CpuIsa best = CpuIsa::kBaseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuIsa::kAvx2;
  if (best == CpuIsa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = CpuIsa::kAvx512;
  }
  // For tests, and for machines on which wide vectors do not pay: never more than the processor has.
  const char* wanted = std::getenv("RETINANET_EXT_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return CpuIsa::kBaseline;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && best == CpuIsa::kAvx512) return CpuIsa::kAvx2;
  return best;
#else
  return CpuIsa::kBaseline;
#endif
}

inline CpuIsa cpu_isa() {
  static const CpuIsa isa = detect_cpu_isa();
  return isa;
}

template <typename Body>
__attribute__((noinline)) void run_baseline(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#if defined(__x86_64__)
template <typename Body>
__attribute__((noinline, target("avx2,fma"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <typename Body>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}
#endif

// body(begin, end) under the best instruction set of this processor.
template <typename Body>
void run_on_best_isa(const Body& body, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::kAvx512:
      return run_avx512(body, begin, end);
    case CpuIsa::kAvx2:
      return run_avx2(body, begin, end);
    case CpuIsa::kBaseline:
      break;
  }
#endif
  run_baseline(body, begin, end);
}

}  // namespace retinanet_ext
