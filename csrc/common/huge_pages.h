// Large results in large pages.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace retinanet_ext {

// The allocator may take blocks of this size afresh from the system, and then a write to every 4 KiB page is a page fault,
// which costs more than computing what is written.
constexpr std::size_t kLargeResultBytes = std::size_t{4} << 20;
constexpr std::uintptr_t kHugePageBytes = std::uintptr_t{2} << 20;

// Asks the system to back a new result with large pages. A hint: where it is refused or not known, nothing changes.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeResultBytes) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePageBytes - 1) / kHugePageBytes;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePageBytes;
  if (begin < end) {
    static_cast<void>(
        madvise(reinterpret_cast<void*>(begin * kHugePageBytes), (end - begin) * kHugePageBytes, MADV_HUGEPAGE));
  }
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace retinanet_ext
