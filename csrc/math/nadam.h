// NAdam (Dozat 2016) with torch's schedule of momenta. Notation: fusedtricks/ops/nadam.py.
#pragma once

#include <cmath>

#include "optimizer.h"

namespace fusedtricks {

struct NAdam {
  enum { kBeta1 = kRule, kBeta2, kMomentumDecay };
  static constexpr int kStates = 2;  // exp_avg, exp_avg_sq

  template <class A>
  struct Scalars {
    A weight1, rest1, weight2, rest2, of_grad, of_average, eps, l2, decay;
  };

  // For step t; `factor` is the product of the momenta so far, and becomes that with this step's.
  // power(slot, base, exponent): the slots number the powers of a rule, for who keeps them from group to group.
  template <class A, class Power>
  static FT_HD Scalars<A> prepare(const double* h, double t, bool, double& factor, Power&& power) {
    const bool decoupled = h[kDecoupled] != 0;
    const double lr = h[kLr], root = sqrt(1 - power(0, h[kBeta2], t));
    const double mu = h[kBeta1] * (1 - 0.5 * power(1, 0.96, t * h[kMomentumDecay]));
    const double next = h[kBeta1] * (1 - 0.5 * power(2, 0.96, (t + 1) * h[kMomentumDecay]));
    factor *= mu;
    return {A(1 - h[kBeta1]),
            A(h[kBeta1]),
            A(1 - h[kBeta2]),
            A(h[kBeta2]),
            A(lr * (1 - mu) / (1 - factor) * root),
            A(lr * next / (1 - factor * next) * root),
            A(h[kEps] * root),
            A(decoupled ? 0 : h[kWeightDecay]),
            A(decoupled ? lr * h[kWeightDecay] : 0)};
  }

  template <class Math, class V, class A>
  static FT_HD V update(V p, V g, V (&s)[kStates], const Scalars<A>& c) {
    if (c.l2 != 0) g = g + c.l2 * p;
    s[0] = lerp(s[0], g, c.weight1, c.rest1);
    s[1] = lerp_squares(s[1], g, c.weight2, c.rest2);
    V u = (c.of_grad * g + c.of_average * s[0]) / (Math::root(s[1]) + c.eps);
    if (c.decay != 0) u = with_decay(u, p, c.decay);
    return u;
  }

  static FT_HD bool uses(const double*, int) { return true; }
};

}  // namespace fusedtricks
