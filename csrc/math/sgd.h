// Stochastic gradient descent with momentum (Sutskever et al. 2013) as torch writes it, and SGDW (Loshchilov and Hutter
// 2019, algorithm 1). Notation: fusedtricks/ops/sgd.py.
#pragma once

#include "optimizer.h"

namespace fusedtricks {

struct SGD {
  enum { kMomentum = kRule, kDampening, kNesterov };
  static constexpr int kStates = 1;  // momentum_buffer

  template <class A>
  struct Scalars {
    A lr, momentum, share, l2, decay;
    bool has_momentum, first, nesterov;
  };

  // `first`: the momentum buffer is new.
  template <class A, class Power>
  static FT_HD Scalars<A> prepare(const double* h, double, bool first, double&, Power&&) {
    const bool decoupled = h[kDecoupled] != 0;
    return {A(h[kLr]),
            A(h[kMomentum]),
            A(1 - h[kDampening]),
            A(decoupled ? 0 : h[kWeightDecay]),
            A(decoupled ? h[kLr] * h[kWeightDecay] : 0),
            h[kMomentum] != 0,
            first,
            h[kNesterov] != 0};
  }

  template <class Math, class V, class A>
  static FT_HD V update(V p, V g, V (&s)[kStates], const Scalars<A>& c) {
    if (c.l2 != 0) g = g + c.l2 * p;
    if (c.has_momentum) {
      s[0] = c.first ? g : c.momentum * s[0] + c.share * g;
      g = c.nesterov ? g + c.momentum * s[0] : s[0];
    }
    V u = rounded_product(g, c.lr);  // the same whether or not a loop subtracts it from p at once
    if (c.decay != 0) u = with_decay(u, p, c.decay);
    return u;
  }

  static FT_HD bool uses(const double* h, int) { return h[kMomentum] != 0; }
};

}  // namespace fusedtricks
