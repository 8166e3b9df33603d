// What mixup and cutmix share on the CPU: the cycles of a permutation, and batches as samples in memory order.
#pragma once

#include <vector>

#include "parallel.h"

namespace fusedtricks::FT_ISA {

// Batches from this size on are streamed past the caches, which could not hold them for whoever reads them next: the
// processor then need not read y before writing it.
inline constexpr int64_t kStreamedBytes = 32 << 20;

template <class U, class V>
inline __attribute__((always_inline)) void stream(U* y, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 2) return _mm256_stream_si256(reinterpret_cast<__m256i*>(y), (__m256i)narrow(v, U{}));
  if constexpr (sizeof(U) == 4) return _mm512_stream_ps(y, (__m512)v);
  if constexpr (sizeof(U) == 8) return _mm512_stream_pd(y, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(U) == 2) return _mm_stream_si128(reinterpret_cast<__m128i*>(y), (__m128i)narrow(v, U{}));
  if constexpr (sizeof(U) == 4) return _mm256_stream_ps(y, (__m256)v);
  if constexpr (sizeof(U) == 8) return _mm256_stream_pd(y, (__m256d)v);
#else
  store(y, v, Full{});
#endif
}

// Stores a register, or part of one; past the caches if Streamed, which asks for an aligned address.
template <bool Streamed, class U, class V, class Lanes>
inline __attribute__((always_inline)) void put(U* y, V v, Lanes lanes) {
  if constexpr (Streamed && std::is_same_v<Lanes, Full>) {
    stream(y, v);
  } else {
    store(y, v, lanes);
  }
}

// run.operator()<Streamed>() for one run of elements at `y`.
template <class U, class F>
inline void with_streaming(bool streamed, const U* y, const F& run) {
  if (streamed && reinterpret_cast<uintptr_t>(y) % kVecBytes == 0) return run.template operator()<true>();
  run.template operator()<false>();
}

// What was streamed is ordered before whatever follows.
inline void end_of_stream(bool streamed) {
#if defined(__x86_64__)
  if (streamed) _mm_sfence();
#endif
}

// The samples in the order in which the cycles of a permutation pass them, so that the partner of one is the next, and
// of the last of a cycle the first. A sample is then in the cache when it is needed again, and mixing in place needs a
// copy of the first of a cycle alone.
struct Cycles {
  std::vector<int64_t> order;
  std::vector<int64_t> start;  // in `order`; one more than there are cycles

  Cycles(const char* op, const Tensor& perm) {
    const int64_t N = perm.size(0);
    const auto* p = static_cast<const int64_t*>(perm.const_data_ptr());
    std::vector<bool> seen(static_cast<size_t>(N), false);
    order.reserve(static_cast<size_t>(N));
    for (int64_t first = 0; first < N; ++first) {
      if (seen[static_cast<size_t>(first)]) continue;
      start.push_back(static_cast<int64_t>(order.size()));
      for (int64_t i = first;;) {
        seen[static_cast<size_t>(i)] = true;
        order.push_back(i);
        i = p[i];
        STD_TORCH_CHECK(i >= 0 && i < N && (i == first || !seen[static_cast<size_t>(i)]), op,
                        ": perm is not a permutation of 0 to ", N - 1);
        if (i == first) break;
      }
    }
    start.push_back(N);
  }
};

// Two batches of one shape: runs of unit stride inside a sample, at the same places of every sample.
struct Samples {
  Rows<2> rows;  // the runs of a sample, in y and x
  int64_t count, run = 1, y_stride, x_stride;
  bool unit = true;

  Samples(const Tensor& y, const Tensor& x) : count(x.size(0)), y_stride(y.stride(0)), x_stride(x.stride(0)) {
    rows = collapse_rows<2>(x.dim() - 1, x.sizes().data() + 1, {y.strides().data() + 1, x.strides().data() + 1});
    if (rows.levels == 0) return;
    const int last = --rows.levels;
    run = rows.size[last];
    rows.count /= run;
    unit = rows.stride[0][last] == 1 && rows.stride[1][last] == 1;
  }
};

}  // namespace fusedtricks::FT_ISA
