// exp, log and tanh of a register. Polynomials are near-minimax (interpolation at Chebyshev nodes); with fused
// multiply-add the errors are below 1 ulp (exp, log) and 2 ulp (tanh).
#pragma once

#include <cmath>
#include <limits>

#include "vec.h"

namespace fusedtricks::FT_ISA {

template <class A>
using IntOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// a > b ? a : b, so NaN in `a` is passed over.
template <class A>
inline Vec<A> larger(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class A, int Bytes = kVecBytes>
inline A max_lanes(Vec<A, Bytes> v) {
  if constexpr (Bytes > static_cast<int>(2 * sizeof(A))) {
    Vec<A, Bytes / 2> half[2];
    std::memcpy(half, &v, sizeof v);
    return max_lanes<A, Bytes / 2>(half[0] > half[1] ? half[0] : half[1]);
  } else {
    return v[0] > v[1] ? v[0] : v[1];
  }
}

// Lanes beyond the tail become `other`.
template <class A>
inline Vec<A> keep_or(Vec<A> v, Full, A) {
  return v;
}
template <class A>
inline Vec<A> keep_or(Vec<A> v, Tail t, A other) {
  Vec<IntOf<A>> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < static_cast<IntOf<A>>(t.n) ? v : broadcast(other);
}

template <class A, size_t N>
inline __attribute__((always_inline)) Vec<A> horner(Vec<A> x, const A (&c)[N]) {
  Vec<A> p = broadcast(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) p = p * x + c[i];
  return p;
}

// v 2^n for integral n, through subnormal results.
template <class A>
inline Vec<A> times_power(Vec<A> v, Vec<A> n, Vec<IntOf<A>> integer) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
  if constexpr (sizeof(A) == 8) return (Vec<A>)_mm512_maskz_scalef_pd(0xff, (__m512d)v, (__m512d)n);
#endif
  constexpr int kMantissa = std::numeric_limits<A>::digits - 1, kBias = std::numeric_limits<A>::max_exponent - 1;
  const auto half = integer >> 1, rest = integer - half;
  return v * (Vec<A>)((half + kBias) << kMantissa) * (Vec<A>)((rest + kBias) << kMantissa);
}

// Of x up to 88 (fp32) or 709 (fp64), NaN and -inf included.
template <class A>
inline __attribute__((always_inline)) Vec<A> exp(Vec<A> x) {
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr A kLowest = kSingle ? A(-105) : A(-750);
  constexpr A kLog2e = A(1.4426950408889634074);
  // ln 2 in two parts, of which n times the first is exact.
  constexpr A kHigh = kSingle ? A(0x1.62e4p-1) : A(0x1.62e42fefa2p-1);
  constexpr A kLow = kSingle ? A(0x1.7f7d1cf79abcap-20) : A(0x1.9ef35793c7673p-41);
  constexpr A kRound = kSingle ? A(0x1.8p23) : A(0x1.8p52);  // adding it rounds to an integer
  x = larger<A>(broadcast(kLowest), x);                      // NaN stays
  const Vec<A> shifted = x * kLog2e + kRound, n = shifted - kRound;
  const auto integer = (Vec<IntOf<A>>)shifted - (Vec<IntOf<A>>)broadcast(kRound);
  const Vec<A> r = (x - n * kHigh) - n * kLow;
  Vec<A> p;
  if constexpr (kSingle) {
    constexpr A c[] = {0.5f, 0.16666576666f, 0.041666554212984f, 0.0083632328836827f, 0.0013926250831497612f};
    p = horner(r, c);
  } else {
    constexpr A c[] = {0.5,
                       0.1666666666666667103,
                       0.041666666666666669783,
                       0.0083333333333260831202,
                       0.0013888888888883711167,
                       0.00019841269875002278793,
                       0.0000248015873256774619,
                       2.7557255170000887438e-6,
                       2.7557273478718580474e-7,
                       2.5105312729622101787e-8,
                       2.09147553258932022e-9};
    p = horner(r, c);
  }
  return times_power<A>((p * r + A(1)) * r + A(1), n, integer);
}

// Of normal x > 0; NaN stays NaN. x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); with s = f / (2 + f),
// log(1 + f) = 2 atanh(s) = f - s (f - s^2 P(s^2)).
template <class A>
inline Vec<A> log(Vec<A> x) {
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kMantissa = std::numeric_limits<A>::digits - 1, kBias = std::numeric_limits<A>::max_exponent - 1;
  constexpr A kHigh = kSingle ? A(0x1.62e4p-1) : A(0x1.62e42fefa2p-1);
  constexpr A kLow = kSingle ? A(0x1.7f7d1cf79abcap-20) : A(0x1.9ef35793c7673p-41);
  const auto bits = (Vec<IntOf<A>>)x;
  auto n = (bits >> kMantissa) - kBias;
  auto mantissa = (Vec<A>)((bits & ((IntOf<A>{1} << kMantissa) - 1)) | (IntOf<A>{kBias} << kMantissa));
  const auto upper = mantissa > A(1.4142135623730951);
  mantissa = upper ? mantissa * A(0.5) : mantissa;
  n = upper ? n + 1 : n;
  const Vec<A> f = mantissa - A(1), s = f / (f + A(2)), z = s * s;
  Vec<A> p;
  if constexpr (kSingle) {
    constexpr A c[] = {0.66666666554f, 0.40000122221811f, 0.28550778633192f, 0.2333161447184350f};
    p = horner(z, c);
  } else {
    constexpr A c[] = {0.66666666666666666463, 0.40000000000000883236, 0.28571428570799785031, 0.22222222392581045097,
                       0.18181795547521136235, 0.15386244737621666606, 0.13268638369266823879, 0.1308803485092755383};
    p = horner(z, c);
  }
  const Vec<A> k = __builtin_convertvector(n, Vec<A>);
  const Vec<A> result = k * kHigh + (f - (s * (f - z * p) - k * kLow));
  return x <= std::numeric_limits<A>::max() ? result : x;
}

template <class A>
inline Vec<A> tanh(Vec<A> x) {
  if constexpr (sizeof(A) == 8) {
    Vec<A> y = x;
    for (int i = 0; i < kLanes<A>; ++i) y[i] = std::tanh(y[i]);
    return y;
  } else {
    constexpr A c[] = {-0.333333331721f, 0.133333035569f,    -0.0539592595772f,
                       0.021768918651f,  -0.00834394551584f, 0.00229274481618f};
    const Vec<A> square = x * x, magnitude = x < A(0) ? -x : x;
    const Vec<A> near = x + x * square * horner(square, c);
    const Vec<A> far = A(1) - A(2) / (exp<A>(magnitude > A(40) ? broadcast(A(80)) : magnitude + magnitude) + A(1));
    return magnitude < A(0.625) ? near : x < A(0) ? -far : far;
  }
}

// The functions that formulas of csrc/math take as a parameter.
struct VecMath {
  template <class V, class A = std::remove_reference_t<decltype(V{}[0])>>
  static inline V exp(V x) {
    const auto most = broadcast(sizeof(A) == 4 ? A(130) : A(800));  // its power of e is infinite already
    return fusedtricks::FT_ISA::exp<A>(x > most ? most : x);
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
  static inline Vec<double> erf(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
    return x;
  }
};

}  // namespace fusedtricks::FT_ISA
