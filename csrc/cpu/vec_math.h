// exp and erf of a register, and one bit per lane in memory.
#pragma once

#include <cmath>

#include "vec.h"

namespace fusedtricks::FT_ISA {

struct VecMath {
  // 2^n e^r with |r| <= ln(2) / 2; the polynomial is the Taylor series of e^r, off by less than 1e-7 of the result
  // there.
  static inline Vec<float> exp(Vec<float> x) {
    const auto low = broadcast(-87.0f), high = broadcast(88.0f);
    const auto given = x;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const auto magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const auto n = (x * 1.44269504088896341f + magic) - magic;
    const auto r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    auto p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const auto bits = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
    const auto result = p * (Vec<float>)bits;
    // Beyond the range it saturates; NaN stays NaN.
    return given == given ? (given > high ? broadcast(__builtin_inff()) : (given < low ? Vec<float>{} : result))
                          : given;
  }

  // Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
  static inline Vec<float> erf(Vec<float> x) {
    const auto a = x < 0 ? -x : x;
    const auto t = 1 / (a * 0.3275911f + 1);
    auto p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const auto e = 1 - p * t * exp(-a * a);
    return x < 0 ? -e : e;
  }

  static inline Vec<double> exp(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static inline Vec<double> erf(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
    return x;
  }
};

// ---- bits -----------------------------------------------------------------------------------------------------------

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
