// Memory for results.
#pragma once

#include <cstdint>

#include "torch_api.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedtricks::FT_ISA {

// Tells the system that large pages are welcome for a large result that is about to be written. Memory beyond 32 MiB
// comes fresh from the system each time, and is mapped when it is first written: page by page that takes several times
// as long as computing what is written. This is advice, and concerns pages that are the result's alone.
inline void advise_large_pages([[maybe_unused]] const Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  constexpr int64_t kFresh = 32 << 20;
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes <= kFresh) return;
  const auto first = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  const uintptr_t begin = (first + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (first + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// As torch.empty_like gives it; of `dtype` where one is given.
template <class... Dtype>
Tensor result_like(const Tensor& t, Dtype... dtype) {
  auto out = fusedtricks::empty_like(t, dtype...);
  advise_large_pages(out);
  return out;
}

}  // namespace fusedtricks::FT_ISA
