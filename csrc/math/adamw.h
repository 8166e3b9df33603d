// Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and AMSGrad (Reddi
// et al. 2018). Notation: fusedtricks/ops/adamw.py.
#pragma once

#include <cmath>

#include "optimizer.h"

namespace fusedtricks {

struct AdamW {
  enum { kBeta1 = kRule, kBeta2, kAmsgrad };
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  template <class A>
  struct Scalars {
    A weight1, rest1, weight2, rest2, rate, eps, l2, decay;
    bool amsgrad;
  };

  // For step t; every scalar is rounded once. `factor` is not used.
  // power(slot, base, exponent): the slots number the powers of a rule, for who keeps them from group to group.
  template <class A, class Power>
  static FT_HD Scalars<A> prepare(const double* h, double t, bool, double&, Power&& power) {
    const bool decoupled = h[kDecoupled] != 0;
    const double root = sqrt(1 - power(0, h[kBeta2], t));
    return {A(1 - h[kBeta1]),
            A(h[kBeta1]),
            A(1 - h[kBeta2]),
            A(h[kBeta2]),
            A(h[kLr] / (1 - power(1, h[kBeta1], t)) * root),
            A(h[kEps] * root),
            A(decoupled ? 0 : h[kWeightDecay]),
            A(decoupled ? h[kLr] * h[kWeightDecay] : 0),
            h[kAmsgrad] != 0};
  }

  // What to take from the parameter.
  template <class Math, class V, class A>
  static FT_HD V update(V p, V g, V (&s)[kStates], const Scalars<A>& c) {
    if (c.l2 != 0) g = g + c.l2 * p;
    s[0] = lerp(s[0], g, c.weight1, c.rest1);
    s[1] = lerp_squares(s[1], g, c.weight2, c.rest2);
    V second = s[1];
    if (c.amsgrad) second = s[2] = larger(s[2], s[1]);
    V u = c.rate * s[0] / (Math::root(second) + c.eps);
    if (c.decay != 0) u = with_decay(u, p, c.decay);
    return u;
  }

  static FT_HD bool uses(const double* h, int state) { return state < 2 || h[kAmsgrad] != 0; }
};

}  // namespace fusedtricks
