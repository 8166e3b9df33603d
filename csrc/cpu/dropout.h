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

}  // namespace fusedtricks::FT_ISA
