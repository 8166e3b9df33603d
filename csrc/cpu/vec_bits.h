// Lanes of a register as bits: one bit per element in memory.
#pragma once

#include <algorithm>

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

// The bits of a run of elements from byte `row` on, the lowest first. j + shift is a multiple of the lanes, but of a
// shorter register that comes before all others.
struct RunBits {
  uint8_t* row;
  int64_t shift = 0;

  template <class A, class L>
  void store(int64_t j, uint32_t bits, L lanes) const {
    const int n = count(lanes, kLanes<A>);
    bits &= (1u << n) - 1;
    uint8_t* const to = row + (j + shift) / 8;
    if constexpr (kLanes<A> == 16) {
      const auto both = static_cast<uint16_t>(bits);
      std::memcpy(to, &both, n > 8 ? 2 : 1);
    } else if constexpr (kLanes<A> == 8) {
      *to = static_cast<uint8_t>(bits);
    } else {
      const int at = static_cast<int>((j + shift) % 8);
      *to = static_cast<uint8_t>((*to & ((1u << at) - 1)) | bits << at);
    }
  }
  template <class A, class L>
  uint32_t load(int64_t j, L lanes) const {
    const uint8_t* const from = row + (j + shift) / 8;
    uint32_t bits = from[0];
    if constexpr (kLanes<A> == 16) {
      if (count(lanes, kLanes<A>) > 8) bits |= static_cast<uint32_t>(from[1]) << 8;
    } else if constexpr (kLanes<A> < 8) {
      bits >>= (j + shift) % 8;
    }
    return bits;
  }
};

// The first eight bytes at p, or all `bytes` where they are fewer.
inline uint64_t load_word(const uint8_t* p, int64_t bytes) {
  uint64_t word = 0;
  if (bytes >= 8) {
    std::memcpy(&word, p, 8);
    return word;
  }
  int64_t at = 0;
  auto add = [&](auto part) {
    if (!(bytes & int64_t{sizeof part})) return;
    std::memcpy(&part, p + at, sizeof part);
    word |= static_cast<uint64_t>(part) << (8 * at);
    at += sizeof part;
  };
  add(uint32_t{}), add(uint16_t{}), add(uint8_t{});
  return word;
}
inline void store_word(uint8_t* p, uint64_t word, int64_t bytes) {
  if (bytes >= 8) {
    std::memcpy(p, &word, 8);
    return;
  }
  auto take = [&](auto part) {
    if (!(bytes & int64_t{sizeof part})) return;
    part = static_cast<decltype(part)>(word);
    std::memcpy(p, &part, sizeof part);
    p += sizeof part, word >>= 8 * sizeof part;
  };
  take(uint32_t{}), take(uint16_t{}), take(uint8_t{});
}

// `count` bits from bit i of `from` to bit j of `to` and on; those before j in its byte are kept. Not a byte but those
// of these bits is touched where that is `exact`, else perhaps seven more.
inline void copy_bits(uint8_t* to, uint64_t j, const uint8_t* from, uint64_t i, int64_t count, bool exact) {
  constexpr int64_t kSome = 56;  // eight bytes have so many from any bit of the first on
  for (; count > 0; i += kSome, j += kSome, count -= kSome) {
    const int64_t n = std::min(count, kSome);
    const uint64_t word = load_word(from + i / 8, exact ? (static_cast<int64_t>(i % 8) + count + 7) / 8 : 8);
    const uint64_t bits = word >> (i % 8) & ((uint64_t{1} << n) - 1), before = to[j / 8] & ((1u << j % 8) - 1);
    store_word(to + j / 8, bits << (j % 8) | before, exact ? (static_cast<int64_t>(j % 8) + count + 7) / 8 : 8);
  }
}

// The bits of neighbouring runs, each of which begins at a byte of its own, laid end to end for registers that hold
// elements of two runs: `head` elements come before the first whole register.
template <class A, int64_t Most>
class NeighbourBits {
 public:
  NeighbourBits(uint8_t* rows, int64_t row_bytes, int64_t runs, int64_t length, int64_t head)
      : rows_(rows), row_bytes_(row_bytes), runs_(runs), length_(length), head_(head) {
    bits_[0] = 0;  // a head leaves some of its bits alone
  }

  RunBits together() { return {bits_, shift()}; }
  void gather() {
    each([&](uint8_t* run, int64_t i, int64_t at, int64_t n, bool exact) { copy_bits(bits_, at, run, i, n, exact); });
  }
  void scatter() {
    each([&](uint8_t* run, int64_t i, int64_t at, int64_t n, bool exact) { copy_bits(run, i, bits_, at, n, exact); });
  }

 private:
  static constexpr int L = kLanes<A>;

  int64_t shift() const { return head_ ? L - head_ : 0; }
  // f(run, first element, its bit, how many, exact): what comes after a run may be spoilt where it is written next.
  template <class F>
  inline __attribute__((always_inline)) void each(const F& f) const {
    auto exact = [&](int64_t run) { return (runs_ - 1 - run) * row_bytes_ < 8; };
    // Where RunBits has the head.
    if (head_) f(rows_, 0, L % 8 == 0 ? shift() / 8 * 8 : shift(), head_, true);
    f(rows_, head_, head_ + shift(), length_ - head_, exact(0));
    for (int64_t run = 1; run < runs_; ++run) {
      f(rows_ + run * row_bytes_, 0, run * length_ + shift(), length_, exact(run));
    }
  }

  uint8_t* rows_;
  int64_t row_bytes_, runs_, length_, head_;
  uint8_t bits_[Most / 8 + 16];
};

}  // namespace fusedtricks::FT_ISA
