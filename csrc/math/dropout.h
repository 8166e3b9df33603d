// Dropout of one element. A is the accumulation type or a vector of it; R its 16 random bits, as wide as A.
#pragma once

#include <cstdint>

#include "hd.h"

namespace fusedtricks {

// `keep` of the 65536 values of 16 bits keep an element; scaling by the inverse of that leaves the mean exact.
template <class A>
FT_HD A dropout_scale(int64_t keep) {
  return keep > 0 ? A(65536) / static_cast<A>(keep) : A(0);
}

// A choice, not a product: what is dropped is zero even where it was infinite or NaN.
template <class A, class R, class S>
FT_HD A dropped(A x, R bits, R keep, S scale) {
  return bits < keep ? x * scale : A{};
}

}  // namespace fusedtricks
