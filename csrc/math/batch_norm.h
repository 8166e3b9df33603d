// Batch normalization of one channel, one element at a time, and the activations that may follow it. V is float, double
// or a vector of either; derivation and notation: fusedtricks/ops/batch_norm.py.
#pragma once

#include <type_traits>

#include "hd.h"

namespace fusedtricks {

// ---- statistics -----------------------------------------------------------------------------------------------------

// Sums over `count` samples of d = scale (x - shift) and of d^2, with unscale = 1 / scale a power of two that keeps d^2
// finite. A shift near the mean keeps cancellation small.
template <class A>
struct ShiftedSums {
  A shift, d, d2, unscale;
};

// The parts of a channel are merged in a type W of about twice the precision of the parts, in a fixed order:
// first the sum of x, then with the mean of all the sum of (x - mean)^2 (Chan, Golub, LeVeque 1979).
template <class W, class A>
FT_HD W part_sum(const ShiftedSums<A>& s, W count) {
  return count * W(s.shift) + W(s.d) * W(s.unscale);
}
template <class W, class A>
FT_HD W part_square(const ShiftedSums<A>& s, W count, W mean) {
  const W off = W(s.shift) - mean, d = W(s.d) * W(s.unscale);
  return W(s.d2) * W(s.unscale) * W(s.unscale) + W(2) * d * off + count * off * off;
}

// `center` to within 1/64 of `spread` with trailing zeros, as far as its digits go: x - center is then exact for nearly
// every x, where the lowest digits of an arbitrary center would be lost to one and the same side again and again.
template <class V, class A>
FT_HD V coarse(V center, V spread, A digits) {
  const V grid = spread * (digits / 64);
  return (center + grid) - grid;
}
template <class A>
inline constexpr A kDigits = A(0x1p23);
template <>
inline constexpr double kDigits<double> = 0x1p52;

// Would another shift have kept more digits? Where it is not within two standard deviations of the mean, as that of a
// few samples nearly always is.
template <class A>
FT_HD bool poorly_shifted(A d, A d2, A count) {
  return d * d > A(0.8) * d2 * count;
}

// ---- one element ----------------------------------------------------------------------------------------------------

// z = x^ weight + bias with x^ = (x - mean - rest) rstd, spelled with what is the same for a whole channel:
// scale = rstd weight and shift = bias - rest scale. x - mean is exact near the mean.
template <class V>
struct ChannelForward {
  V mean, scale, shift;

  FT_HD V operator()(V x) const { return (x - mean) * scale + shift; }
};

// dx = scale (g - mean(g) - x^ mean(g x^)), spelled with slope = rstd mean(g x^) and
// offset = mean(g) - rest rstd mean(g x^).
template <class V>
struct ChannelBackward {
  V mean, scale, offset, slope;

  FT_HD V operator()(V g, V x) const { return scale * ((g - offset) - (x - mean) * slope); }
};

// ---- activations ----------------------------------------------------------------------------------------------------

// The order of fusedtricks/ops/_batch_norm.py.
enum Activation { kIdentity, kRelu, kLeakyRelu, kSilu, kGelu };

// y = z above 0 (and for NaN), low below; `low` is z slope, or 0 for relu. The derivative at 0 is that of below.
template <class V>
FT_HD V rectified(V z, V low) {
  return z < V{} ? low : z;
}
template <class V>
FT_HD V rectified_gradient(V g, V z, V low) {
  return z <= V{} ? low : g;
}

// A number in the type of a scalar, or in every lane of a vector.
template <class V>
FT_HD V constant(double c) {
  if constexpr (std::is_floating_point_v<V>) {
    return static_cast<V>(c);
  } else {
    return V{} + static_cast<std::remove_cvref_t<decltype(V{}[0])>>(c);
  }
}

// M has exp and erf for V.
template <class M, class V>
FT_HD V sigmoid(V z) {
  const V one = constant<V>(1);
  return one / (M::exp(-z) + one);
}
template <class M, class V>
FT_HD V silu(V z) {
  return z * sigmoid<M>(z);
}
template <class M, class V>
FT_HD V silu_gradient(V g, V z) {
  const V s = sigmoid<M>(z), one = constant<V>(1);
  return g * (s * (one + z * (one - s)));
}

// z Phi(z) with the normal distribution function itself, not its approximation by tanh.
template <class M, class V>
FT_HD V normal_cdf(V z) {
  return constant<V>(0.5) * (constant<V>(1) + M::erf(z * constant<V>(0.70710678118654752440)));
}
template <class M, class V>
FT_HD V gelu(V z) {
  return z * normal_cdf<M>(z);
}
template <class M, class V>
FT_HD V gelu_gradient(V g, V z) {
  const V density = M::exp(z * z * constant<V>(-0.5)) * constant<V>(0.39894228040143267794);
  return g * (normal_cdf<M>(z) + z * density);
}

}  // namespace fusedtricks
