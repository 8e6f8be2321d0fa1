// Stores that go around the caches, for results larger than these hold: an ordinary store first reads the line that it
// then overwrites.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#include <unistd.h>
#endif

#include "cpu_dispatch.h"
#include "host_device.h"

namespace retinanet_ext {

// Whether a result of this size would push itself out of the last-level cache before anybody reads it.
inline bool outgrows_cache(std::size_t bytes) {
#if defined(__x86_64__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const long known = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const std::size_t cache = known > 0 ? static_cast<std::size_t>(known) : std::size_t{32} << 20;
  return bytes > cache / 2;
#else
  static_cast<void>(bytes);
  return false;
#endif
}

#if defined(__x86_64__)
constexpr int64_t kCacheLine = 64;  // bytes

// `lines` whole cache lines by the widest stores there are: a line that arrives in pieces waits for its last one.
__attribute__((noinline, target("avx512f"))) inline void stream_lines_avx512(char* target, const char* source,
                                                                             int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i * kCacheLine),
                        _mm512_loadu_si512(source + i * kCacheLine));
  }
}

__attribute__((noinline, target("avx"))) inline void stream_lines_avx(char* target, const char* source, int64_t lines) {
  for (int64_t i = 0; i < 2 * lines; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i,
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source) + i));
  }
}

inline void stream_lines(char* target, const char* source, int64_t lines, CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return stream_lines_avx512(target, source, lines);
    case CpuIsa::kAvx2:
      return stream_lines_avx(target, source, lines);
    case CpuIsa::kBaseline:
      break;
  }
  for (int64_t i = 0; i < 4 * lines; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target) + i,
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i));
  }
}
#endif

// Copies `count` elements; around the caches from the first 16-byte boundary of `target` to the last. Out of line: it
// chooses its instructions itself, and kernels that call it are compiled for each instruction set.
template <typename S>
__attribute__((noinline)) void stream_copy(S* target, const S* source, int64_t count, CpuIsa isa = cpu_isa()) {
  int64_t i = 0;
#if defined(__x86_64__)
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(S));
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(S));
  const auto off = [&](std::uintptr_t boundary) __attribute__((always_inline)) {
    return reinterpret_cast<std::uintptr_t>(target + i) % boundary != 0;
  };
  const auto stream_16_bytes = [&]() __attribute__((always_inline)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    i += kWidth;
  };
  for (; i < count && off(16); ++i) target[i] = source[i];
  while (i + kWidth <= count && off(kCacheLine)) stream_16_bytes();
  const int64_t lines = (count - i) / kLine;
  if (lines > 0) {
    stream_lines(reinterpret_cast<char*>(target + i), reinterpret_cast<const char*>(source + i), lines, isa);
    i += lines * kLine;
  }
  while (i + kWidth <= count) stream_16_bytes();
#else
  static_cast<void>(isa);
#endif
  for (; i < count; ++i) target[i] = source[i];
}

// Makes streamed stores visible before what this thread stores next.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace retinanet_ext
