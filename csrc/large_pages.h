// Large pages for large memory.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedtricks {

// Tells the system that large pages are welcome for memory that is yet to be written. Memory beyond 32 MiB comes fresh
// from the system each time, and is mapped when it is first written: page by page that takes several times as long as
// computing what is written, and every later pass looks up more addresses. This is advice, and concerns pages that lie
// in these bytes alone. Static: what is compiled for other instruction sets must not be shared.
static inline void advise_large_pages([[maybe_unused]] const void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  constexpr int64_t kFresh = 32 << 20;
  if (bytes <= kFresh) return;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (first + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (first + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedtricks
