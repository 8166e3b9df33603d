// Layer and RMS normalization, one element at a time. A is the accumulation type: float, double, or a vector of either.
// Derivation and notation: fusedtricks/ops/layer_norm.py and rms_norm.py.
#pragma once

#include <cmath>

#include "hd.h"

namespace fusedtricks {

// Rows whose squares overflow are measured again after an exact scaling by a power of two.
template <class A>
inline constexpr A kOverflowScale = A(0x1p-64);
template <>
inline constexpr double kOverflowScale<double> = 0x1p-512;

// x^ = ((x - mean) - rest) * rstd. `rest` is what the precision of `mean` rounds away; x - mean is exact near the mean,
// so the error does not grow with it. Spelled with rest * rstd, which is the same for a whole row.
template <class A>
struct Normalize {
  A mean, rest, rstd;

  FT_HD A operator()(A x) const { return (x - mean) * rstd - rest * rstd; }
};

// Variance from sums over d = x - mean, where mean is itself rounded: mean(d^2) - mean(d)^2.
template <class A>
FT_HD A variance(A sum_d2, A rest, A inverse_count) {
  A v = sum_d2 * inverse_count - rest * rest;
  return v > A(0) || v != v ? v : A(0);
}

// rstd of a row that was measured as scale * x, so that its squares do not overflow.
template <class A>
FT_HD A rstd_of(A scaled_variance, A eps, A scale) {
  using std::sqrt;
  return scale / sqrt(scaled_variance + eps * scale * scale);
}

// dx = rstd (g - mean(g) - x^ mean(g x^)); without the second term for RMS normalization, where mean_g is 0.
template <class A>
FT_HD A norm_backward(A g, A xhat, A rstd, A mean_g, A mean_gx) {
  return rstd * ((g - mean_g) - xhat * mean_gx);
}

}  // namespace fusedtricks
