// One SIMD register of the instruction set this file is compiled for. Vec<float> and Vec<double> are GCC/Clang vector
// types, so the formulas of csrc/math work on them as on a scalar; 16-bit types exist in memory only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// FT_ISA (baseline, avx2 or avx512) names the namespace of everything compiled once per instruction set.
namespace fusedtricks::FT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

template <class A, int Bytes = kVecBytes>
struct VecOf {
  typedef A type __attribute__((vector_size(Bytes)));
};
template <class A, int Bytes = kVecBytes>
using Vec = typename VecOf<A, Bytes>::type;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// bfloat16 on a CPU that rounds to it in one instruction (which turns subnormal results, below 1.2e-38, into zeros).
struct bf16_rounded_in_hardware : bf16 {};

inline bool rounds_bf16_in_hardware() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Arithmetic is fp32, and fp64 for fp64.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class A>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

// How many lanes of a register a step covers: all, or the first n at the end of a row.
struct Full {};
struct Tail {
  int n;
};

template <class A>
inline Vec<A> broadcast(A a) {
  return Vec<A>{} + a;
}

// The lanes of the tail from `v`, those beyond it from `beyond`.
template <class A>
inline Vec<A> select(Tail t, Vec<A> v, Vec<A> beyond) {
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vec<Int> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < static_cast<Int>(t.n) ? v : beyond;
}

// Lanes beyond the tail become zero.
template <class A>
inline Vec<A> keep(Vec<A> v, Full) {
  return v;
}
template <class A>
inline Vec<A> keep(Vec<A> v, Tail t) {
  return select<A>(t, v, Vec<A>{});
}

// Sum of the lanes, always in the same order.
template <class A, int Bytes = kVecBytes>
inline A sum_lanes(Vec<A, Bytes> v) {
  if constexpr (Bytes > static_cast<int>(2 * sizeof(A))) {
    Vec<A, Bytes / 2> half[2];
    std::memcpy(half, &v, sizeof v);
    return sum_lanes<A, Bytes / 2>(half[0] + half[1]);
  } else {
    return v[0] + v[1];
  }
}

// Sums of lanes in double precision.
template <class A>
struct WideSum {
  static constexpr int kParts = sizeof(double) / sizeof(A);
  Vec<double> part[kParts] = {};

  inline __attribute__((always_inline)) void operator+=(Vec<A> v) {
    Vec<A, kVecBytes / kParts> narrow[kParts];
    std::memcpy(narrow, &v, sizeof v);
    for (int i = 0; i < kParts; ++i) part[i] += __builtin_convertvector(narrow[i], Vec<double>);
  }
  inline double over_lanes() const {
    if constexpr (kParts == 2) return sum_lanes<double>(part[0] + part[1]);
    return sum_lanes<double>(part[0]);
  }
};

// ---- memory ---------------------------------------------------------------------------------------------------------

// 16-bit values travel in a register of half the width.
using Packed = Vec<uint16_t, kVecBytes / 2>;

inline Vec<uint32_t> extend(Packed p) {
#if defined(__AVX512F__)
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)p);
#elif defined(__AVX2__)
  return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)p);
#else
  return __builtin_convertvector(p, Vec<uint32_t>);
#endif
}

inline Packed truncate(Vec<uint32_t> v) {
#if defined(__AVX512F__)
  return (Packed)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, Packed);
#endif
}

inline Vec<float> widen(Packed p, bf16) {
#if defined(__AVX512F__)
  // One permutation: each value to the upper half of its lane, zero to the lower.
  constexpr Vec<uint16_t> kFrom = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                   0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)kFrom, _mm512_castsi256_si512((__m256i)p));
#else
  return (Vec<float>)(extend(p) << 16);
#endif
}

// Round to nearest even; NaN stays NaN.
inline Packed narrow(Vec<float> v, bf16) {
  auto bits = (Vec<uint32_t>)v;
  auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return truncate(v == v ? rounded : Vec<uint32_t>{} + 0x7fc0u);
}

#if defined(__AVX512F__)
inline Packed narrow(Vec<float> v, bf16_rounded_in_hardware) {
  Packed p;
  asm("vcvtneps2bf16 %1, %0" : "=v"(p) : "v"(v));  // needs no compiler flag, which would reach the rest of the file
  return p;
}
#endif

inline Vec<float> widen(Packed p, fp16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)p);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)p);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) {
    _Float16 h;
    const uint16_t bits = p[i];
    std::memcpy(&h, &bits, 2);
    v[i] = static_cast<float>(h);
  }
  return v;
#endif
}

inline Packed narrow(Vec<float> v, fp16) {
#if defined(__AVX512F__)
  return (Packed)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Packed)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Packed p;
  for (int i = 0; i < kLanes<float>; ++i) {
    const auto h = static_cast<_Float16>(v[i]);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    p[i] = bits;
  }
  return p;
#endif
}

// One value in the storage type T.
template <class T, class A>
inline T rounded_to(A a) {
  if constexpr (sizeof(T) == 2) {
    T t;
    t.bits = narrow(broadcast(static_cast<float>(a)), T{})[0];
    return t;
  } else {
    return static_cast<T>(a);
  }
}

template <class R>
inline R load_bytes(const void* p) {
  R r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

template <class T>
inline Vec<Acc<T>> load(const T* p, Full) {
  if constexpr (sizeof(T) == 2) {
    return widen(load_bytes<Packed>(p), T{});
  } else {
    return load_bytes<Vec<T>>(p);
  }
}

template <class T>
inline Vec<Acc<T>> load(const T* p, Tail t) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << t.n) - 1;
  if constexpr (sizeof(T) == 2) return widen((Packed)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p), T{});
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
#else
  T buffer[kLanes<Acc<T>>] = {};
  for (int i = 0; i < t.n; ++i) buffer[i] = p[i];
  return load(buffer, Full{});
#endif
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v, Full) {
  if constexpr (sizeof(T) == 2) {
    const Packed packed = narrow(v, T{});
    std::memcpy(p, &packed, sizeof packed);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v, Tail t) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << t.n) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)narrow(v, T{}));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
#else
  T buffer[kLanes<Acc<T>>];
  store(buffer, v, Full{});
  for (int i = 0; i < t.n; ++i) p[i] = buffer[i];
#endif
}

// A store past the caches: memory is written without being read first, a third less traffic for a copy. `p` is aligned
// to what is written. Visible to other threads after `streamed()`.
template <class T>
inline void stream(T* p, Vec<Acc<T>> v, Full) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v, T{}));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(v, T{}));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
  }
#else
  store(p, v, Full{});
#endif
}
template <class T>
inline void stream(T* p, Vec<Acc<T>> v, Tail t) {
  store(p, v, t);
}

template <bool Stream, class T, class Lanes>
inline void store_or_stream(T* p, Vec<Acc<T>> v, Lanes lanes) {
  if constexpr (Stream) {
    stream(p, v, lanes);
  } else {
    store(p, v, lanes);
  }
}

// A cache line past the caches, from anywhere.
inline void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
  }
#else
  std::memcpy(to, from, 64);
#endif
}

inline void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The ends of what is stored past the caches piece after piece: where they meet in a cache line, they are brought
// together here and leave as a line, like the rest. To be flushed after the last.
class LineEnds {
 public:
  template <class T>
  void store(T* p, Vec<Acc<T>> v, Tail lanes) {
    FT_ISA::store(reinterpret_cast<T*>(open(p)), v, lanes);
    close(lanes.n * static_cast<int>(sizeof(T)));
  }
  void store(void* p, const void* from, int64_t bytes) {
    std::memcpy(open(p), from, static_cast<size_t>(bytes));
    close(bytes);
  }
  __attribute__((noinline)) void flush() {
    if (next_) std::memcpy(next_ - (end_ - begin_), line_ + begin_, static_cast<size_t>(end_ - begin_));
    next_ = nullptr;
  }

 private:
  // Where to put what belongs at p, of one line,
  uint8_t* open(void* p) {
    if (p == next_) return line_ + end_;
    if (next_) flush();
    next_ = static_cast<uint8_t*>(p);
    begin_ = end_ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 64);
    return line_ + begin_;
  }
  // and so many bytes are there.
  void close(int64_t bytes) {
    next_ += bytes, end_ += bytes;
    if (end_ < 64) return;
    if (begin_ > 0) return flush();
    stream_line(next_ - 64, line_);
    next_ = nullptr;
  }

  alignas(64) uint8_t line_[64];
  uint8_t* next_ = nullptr;      // where the line is continued
  int64_t begin_ = 0, end_ = 0;  // what it holds
};

// So many bytes, read and written, are in no cache when they are next needed.
inline bool worth_streaming(int64_t bytes) { return bytes > int64_t{16} << 20; }

// How many elements come before the first that a streamed store may begin with.
template <class T>
inline int64_t unaligned_head(const T* p) {
  constexpr uintptr_t kWidth = kLanes<Acc<T>> * sizeof(T);
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % kWidth / sizeof(T));
}

// Rows that have such heads are streamed from this length on: in shorter ones heads and tails are too many.
inline constexpr int64_t kFewestStreamed = 256;

// ---- loops ----------------------------------------------------------------------------------------------------------

// f(j, lanes, k) over columns j = begin .. end in steps of one register. k in 0..Unroll-1 names one of several
// independent accumulators, which hide the latency of the additions.
template <class A, int Unroll = 4, class F>
inline __attribute__((always_inline)) void sweep(int64_t begin, int64_t end, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t j = begin;
  for (; j + Unroll * L <= end; j += Unroll * L) {
    f(j, Full{}, 0);
    if constexpr (Unroll > 1) f(j + L, Full{}, 1);
    if constexpr (Unroll > 2) f(j + 2 * L, Full{}, 2), f(j + 3 * L, Full{}, 3);
  }
  if constexpr (Unroll > 1) {
    for (; j + L <= end; j += L) f(j, Full{}, 0);
  }
  if (j < end) f(j, Tail{static_cast<int>(end - j)}, 0);
}

// sweep over the `count` columns of a row that is stored from `p` on, past the caches with Stream: whole cache lines
// are, since memory would be read for a part of one. The ends of a row go through the caches as tails; the line that
// holds the last end is asked for in time, as stores wait for one another.
template <bool Stream, int Unroll, bool Fetch = true, class T, class F>
inline __attribute__((always_inline)) void sweep_stored(const T* p, int64_t count, F&& f) {
  using A = Acc<T>;
  if constexpr (!Stream) {
    sweep<A, Unroll>(0, count, f);
  } else {
    constexpr int64_t L = kLanes<A>, kLine = 64 / sizeof(T);
    const auto ends = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t j = begin; j < end; j += L) f(j, Tail{static_cast<int>(std::min(L, end - j))}, 0);
    };
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kLine);
    const int64_t head = std::min((kLine - past) % kLine, count), whole = head + (count - head) / kLine * kLine;
    if (Fetch && whole < count) __builtin_prefetch(p + whole, 1);
    ends(0, head);
    sweep<A, Unroll>(head, whole, f);
    ends(whole, count);
  }
}

// N sums over columns at once: f(j, lanes, terms) adds to terms[0..N-1]. Blocks are summed separately first and meet in
// double precision, so neither a million columns nor one that outweighs all others costs digits. In a few registers
// there is nothing to gain.
template <class A, int Unroll, int N, class F>
inline __attribute__((always_inline)) void reduce(int64_t columns, A (&sums)[N], F&& f) {
  static_assert(Unroll == 1 || Unroll == 2 || Unroll == 4);
  constexpr int64_t kBlock = 64 * kLanes<A>, kFew = 16 * kLanes<A>;
  WideSum<A> total[N];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    Vec<A> part[Unroll][N] = {};
    const int64_t end = columns - begin < kBlock ? columns : begin + kBlock;
    sweep<A, Unroll>(begin, end,
                     [&](int64_t j, auto lanes, int k) __attribute__((always_inline)) { f(j, lanes, part[k]); });
    for (int n = 0; n < N; ++n) {
      if constexpr (Unroll == 2) part[0][n] += part[1][n];
      if constexpr (Unroll == 4) part[0][n] = (part[0][n] + part[1][n]) + (part[2][n] + part[3][n]);
    }
    if (columns <= kFew) {
      for (int n = 0; n < N; ++n) sums[n] = sum_lanes<A>(part[0][n]);
      return;
    }
    for (int n = 0; n < N; ++n) total[n] += part[0][n];
  }
  for (int n = 0; n < N; ++n) sums[n] = static_cast<A>(total[n].over_lanes());
}

}  // namespace fusedtricks::FT_ISA
