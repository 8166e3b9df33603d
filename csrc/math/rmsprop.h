// RMSprop (Hinton, lecture 6e; centered: Graves 2013, arXiv:1308.0850). Notation: fusedtricks/ops/rmsprop.py.
#pragma once

#include "optimizer.h"

namespace fusedtricks {

struct RMSprop {
  enum { kAlpha = kRule, kMomentum, kCentered };
  static constexpr int kStates = 3;  // square_avg, momentum_buffer, grad_avg

  template <class A>
  struct Scalars {
    A lr, weight, rest, momentum, eps, l2;
    bool has_momentum, centered;
  };

  template <class A, class Power>
  static FT_HD Scalars<A> prepare(const double* h, double, bool, double&, Power&&) {
    return {A(h[kLr]),  A(1 - h[kAlpha]),   A(h[kAlpha]),     A(h[kMomentum]),
            A(h[kEps]), A(h[kWeightDecay]), h[kMomentum] > 0, h[kCentered] != 0};
  }

  template <class Math, class V, class A>
  static FT_HD V update(V p, V g, V (&s)[kStates], const Scalars<A>& c) {
    if (c.l2 != 0) g = g + c.l2 * p;
    s[0] = lerp_squares(s[0], g, c.weight, c.rest);
    V variance = s[0];
    if (c.centered) {
      s[2] = lerp(s[2], g, c.weight, c.rest);
      // Of a constant gradient it is zero, and rounding may make it less.
      variance = larger(s[0] - s[2] * s[2], V{});
    }
    V step = g / (Math::root(variance) + c.eps);
    if (c.has_momentum) step = s[1] = c.momentum * s[1] + step;
    return c.lr * step;
  }

  static FT_HD bool uses(const double* h, int state) {
    return state == 0 || (state == 1 ? h[kMomentum] > 0 : h[kCentered] != 0);
  }
};

}  // namespace fusedtricks
