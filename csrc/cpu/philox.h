// Random bits for many consecutive elements: Philox with one counter per 64-bit lane of a register.
#pragma once

#include "math/philox.h"
#include "vec.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fusedtricks::FT_ISA {

// A word of the counter in the lower half of each lane; the upper halves hold anything.
using Lanes64 = Vec<uint64_t>;

struct MultiplyLanes {
  struct Product {
    Lanes64 hi, lo;
  };
  inline __attribute__((always_inline)) Product operator()(Lanes64 a, uint32_t b) const {
#if defined(__AVX512F__)
    const auto product = (Lanes64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    const auto product = (Lanes64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    const auto product = (Lanes64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
    const auto product = (Lanes64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
    const auto product = (a & 0xffffffffu) * b;
#endif
    return {product >> 32, product};
  }
};

// {a[0], b[0], a[2], b[2], ...} and {a[1], b[1], a[3], b[3], ...}.
inline __attribute__((always_inline)) void zip(Lanes64 a, Lanes64 b, Lanes64& even, Lanes64& odd) {
#if defined(__AVX512F__)
  even = (Lanes64)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b);
  odd = (Lanes64)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  even = (Lanes64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  odd = (Lanes64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  even = Lanes64{a[0], b[0]};
  odd = Lanes64{a[1], b[1]};
#endif
}

// The bits of consecutive blocks from `block` on, in memory order: kRandomBlocks blocks of 128 bits.
inline constexpr int kRandomChains = 2;  // independent, to hide the latency of the multiplications
inline constexpr int kRandomBlocks = kRandomChains * kLanes<uint64_t>;

inline __attribute__((always_inline)) void random_blocks(uint64_t seed, uint64_t block, uint32_t stream,
                                                         Lanes64 (&bits)[2 * kRandomChains]) {
  constexpr int L = kLanes<uint64_t>;
  Lanes64 first;  // the order in which `zip` leaves consecutive blocks
  for (int i = 0; i < L; ++i) first[i] = static_cast<uint64_t>(i / 2 + i % 2 * (L / 2));
  Lanes64 counter[kRandomChains][4];
#pragma GCC unroll 2
  for (int c = 0; c < kRandomChains; ++c) {
    counter[c][0] = first + (block + static_cast<uint64_t>(c * L));
    counter[c][1] = counter[c][0] >> 32;
    counter[c][2] = Lanes64{} + stream;
    counter[c][3] = Lanes64{};
    philox(counter[c], static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), MultiplyLanes{});
    const Lanes64 low = (counter[c][0] & 0xffffffffu) | (counter[c][1] << 32);
    const Lanes64 high = (counter[c][2] & 0xffffffffu) | (counter[c][3] << 32);
    zip(low, high, bits[2 * c], bits[2 * c + 1]);
  }
}

// Random bits of `count` elements from element `first` on. U is uint16_t or uint32_t; `to` has room for
// random_room<U>(count) of them, and the first is at the returned place in it.
template <class U>
inline constexpr int kOfBlock = 16 / static_cast<int>(sizeof(U));
template <class U>
constexpr int64_t random_room(int64_t count) {
  constexpr int64_t step = kRandomBlocks * kOfBlock<U>;
  return (count + kOfBlock<U> - 1 + step - 1) / step * step;
}

// each(i) is called before the bits from `to[i]` on are drawn: a place to ask for memory that is needed next.
template <class U, class F>
inline __attribute__((always_inline)) U* random_elements(uint64_t seed, int64_t first, int64_t count, U* to,
                                                         uint32_t stream, const F& each) {
  constexpr int64_t step = kRandomBlocks * kOfBlock<U>;
  const int64_t skip = first % kOfBlock<U>;
  auto block = static_cast<uint64_t>(first / kOfBlock<U>);
  for (int64_t i = 0; i < skip + count; i += step, block += kRandomBlocks) {
    each(i);
    Lanes64 bits[2 * kRandomChains];
    random_blocks(seed, block, stream, bits);
    std::memcpy(to + i, bits, sizeof bits);
  }
  return to + skip;
}

template <class U>
inline U* random_elements(uint64_t seed, int64_t first, int64_t count, U* to, uint32_t stream = 0) {
  return random_elements(seed, first, count, to, stream, [](int64_t) {});
}

}  // namespace fusedtricks::FT_ISA
