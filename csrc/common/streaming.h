// Stores that go around the caches, for results larger than these hold: an ordinary store first reads the line that it
// then overwrites.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <emmintrin.h>
#include <unistd.h>
#endif

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

// Copies `count` elements; around the caches from the first 16-byte boundary of `target` to the last.
template <typename S>
RNX_HD void stream_copy(S* target, const S* source, int64_t count) {
  int64_t i = 0;
#if defined(__x86_64__)
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(S));
  for (; i < count && reinterpret_cast<std::uintptr_t>(target + i) % 16 != 0; ++i) target[i] = source[i];
  for (; i + kWidth <= count; i += kWidth) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  }
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
