// Lanes of a register as bits: one bit per element in memory.
#pragma once

#include "vec.h"

namespace fusedtricks::FT_ISA {

template <class A>
using Lanes = Vec<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;  // all bits of a lane set, or none

template <class A>
inline uint32_t to_bits(Lanes<A> v) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)v);
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask((__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)v));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)v));
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)v));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)v));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= static_cast<uint32_t>(v[i] & 1) << i;
  return bits;
#endif
}

template <class A>
inline Lanes<A> from_bits(uint32_t bits) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 4) return (Lanes<A>)_mm512_movm_epi32(static_cast<__mmask16>(bits));
  if constexpr (sizeof(A) == 8) return (Lanes<A>)_mm512_movm_epi64(static_cast<__mmask8>(bits));
#else
  Lanes<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = 1 << i;
  return ((Lanes<A>{} + static_cast<int>(bits)) & lane) != 0;
#endif
}

inline int count(Full, int lanes) { return lanes; }
inline int count(Tail t, int) { return t.n; }

// The bits of the lanes from element j on, j a multiple of the lanes, in a row that starts at byte `row`. Bits are
// stored from the lowest element up.
template <class A, class L>
inline void store_bits(uint8_t* row, int64_t j, uint32_t bits, L lanes) {
  const int n = count(lanes, kLanes<A>);
  bits &= (1u << n) - 1;
  if constexpr (kLanes<A> == 16) {
    const auto both = static_cast<uint16_t>(bits);
    std::memcpy(row + j / 8, &both, n > 8 ? 2 : 1);
  } else if constexpr (kLanes<A> == 8) {
    row[j / 8] = static_cast<uint8_t>(bits);
  } else {
    const int at = static_cast<int>(j % 8);
    row[j / 8] = static_cast<uint8_t>((at ? row[j / 8] : 0) | bits << at);
  }
}

template <class A, class L>
inline Lanes<A> load_bits(const uint8_t* row, int64_t j, L lanes) {
  uint32_t bits = row[j / 8];
  if constexpr (kLanes<A> == 16) {
    if (count(lanes, kLanes<A>) > 8) bits |= static_cast<uint32_t>(row[j / 8 + 1]) << 8;
  } else if constexpr (kLanes<A> < 8) {
    bits >>= j % 8;
  }
  return from_bits<A>(bits);
}

}  // namespace fusedtricks::FT_ISA
