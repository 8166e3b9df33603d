// Dropout of one register of elements, for every CPU kernel that drops.
#pragma once

#include "math/dropout.h"
#include "parallel.h"
#include "philox.h"

namespace fusedtricks::FT_ISA {

template <class A>
inline __attribute__((always_inline)) Vec<A> dropped_lanes(Vec<A> x, const uint16_t* bits, uint32_t keep, A scale) {
  if constexpr (sizeof(A) == 4) {
    return dropped(x, extend(load_bytes<Packed>(bits)), Vec<uint32_t>{} + keep, scale);
  } else {
    const auto narrow = load_bytes<Vec<uint16_t, kVecBytes / 4>>(bits);
    return dropped(x, __builtin_convertvector(narrow, Vec<uint64_t>), Vec<uint64_t>{} + keep, scale);
  }
}

// Elements whose random bits are drawn at once; with the elements themselves they stay in the first-level cache.
inline constexpr int64_t kDropped = 2048;

// y = dropout(x) of at most kDropped elements from number `first` on; they may be the same.
template <class T, class A = Acc<T>>
inline void drop_elements(const T* x, T* y, int64_t count, int64_t first, uint64_t seed, uint32_t keep, A scale) {
  alignas(64) uint16_t room[random_room<uint16_t>(kDropped)];
  // The elements travel while their bits are drawn.
  constexpr int64_t kLine = 64 / sizeof(T), kStep = kRandomBlocks * kOfBlock<uint16_t>;
  const uint16_t* bits = random_elements(seed, first, count, room, 0, [&](int64_t i) __attribute__((always_inline)) {
    for (int64_t j = i; j < i + kStep; j += kLine) {
      __builtin_prefetch(x + j);
      __builtin_prefetch(y + j, 1);
    }
  });
  sweep<A>(0, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    store(y + j, dropped_lanes<A>(load(x + j, lanes), bits + j, keep, scale), lanes);
  });
}

}  // namespace fusedtricks::FT_ISA
