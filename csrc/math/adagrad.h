// Adagrad (Duchi, Hazan and Singer 2011). Notation: fusedtricks/ops/adagrad.py.
#pragma once

#include "optimizer.h"

namespace fusedtricks {

struct Adagrad {
  enum { kLrDecay = kRule };
  static constexpr int kStates = 1;  // sum

  template <class A>
  struct Scalars {
    A lr, eps, l2;
  };

  template <class A, class Power>
  static FT_HD Scalars<A> prepare(const double* h, double t, bool, double&, Power&&) {
    return {A(h[kLr] / (1 + (t - 1) * h[kLrDecay])), A(h[kEps]), A(h[kWeightDecay])};
  }

  template <class Math, class V, class A>
  static FT_HD V update(V p, V g, V (&s)[kStates], const Scalars<A>& c) {
    if (c.l2 != 0) g = g + c.l2 * p;
    s[0] = s[0] + g * g;
    return c.lr * g / (Math::root(s[0]) + c.eps);
  }

  static FT_HD bool uses(const double*, int) { return true; }
};

}  // namespace fusedtricks
