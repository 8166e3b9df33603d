// Cross-entropy: what one row's target amounts to, its loss and the slope of its gradient. A is the accumulation type.
// Derivation and notation: fusedtricks/ops/cross_entropy.py.
#pragma once

#include <cstdint>

#include "hd.h"

namespace fusedtricks {

template <class A>
struct LossOptions {
  int64_t ignore_index;
  A on, off, z_loss, softcap, scale;
};

// z = scale softcap tanh(x / softcap), or scale x without a softcap, and dz / dx. V: A, or a register of it. It is
// rounded wherever it is used: the largest z less `top` must be 0, even where their last digit is larger than 1.
template <class V, class A, class Tanh>
FT_HD V scaled_logit(V x, A softcap, A scale, const Tanh& tanh) {
  if (softcap != A(0)) x = softcap * tanh(x / softcap);
  return rounded_product(x, scale);
}

template <class V, class A, class Tanh>
FT_HD V scaled_slope(V x, A softcap, A scale, const Tanh& tanh) {
  if (softcap == A(0)) return V{} + scale;
  const V t = tanh(x / softcap);
  return scale * (A(1) - t * t);
}

// q_c of a class probability t
template <class V, class A>
FT_HD V soft_coefficient(V t, V weight, const LossOptions<A>& o) {
  return (o.on * t + o.off) * weight;
}

// Of some classes of a row: top = max z, and sums of exp(z - top), of q (z - top) and of q. What has q = 0 is left out.
template <class A>
struct ClassSums {
  A top = -kInfinity<A>, total = 0, rest = 0, q = 0;
};

// A running maximum (Milakov and Gimelshein 2018, section 3) that survives parts without a finite logit.
template <class A, class Exp>
FT_HD ClassSums<A> join(const ClassSums<A>& a, const ClassSums<A>& b, const Exp& exp) {
  ClassSums<A> s;
  s.top = a.top < b.top ? b.top : a.top;
  s.q = a.q + b.q;
  auto add = [&](const ClassSums<A>& part) {
    const A fall = part.top - s.top;
    s.total += part.top == s.top ? part.total : part.total * exp(fall);
    s.rest += part.q == A(0) || part.top == s.top || part.top == -kInfinity<A> ? part.rest : part.rest + part.q * fall;
  };
  add(a);
  add(b);
  return s;
}

// q_c = off w_c + [c = a] at_a + [c = b] at_b, with sum q; for class probabilities q and what is left of this.
template <class A>
struct RowTarget {
  int64_t a, b;  // classes, always in range
  A at_a, at_b, off, q, z, mass;
  bool dead;  // nothing of it counts
};

// Written to `t` field by field: a copy of it as a whole would wait for these stores. A label that is no class makes
// the row NaN; the CPU has refused it before.
template <class A>
FT_HD void set_row_target(RowTarget<A>& t, int64_t a, int64_t b, A lam, const A* weight, A weight_sum, int64_t classes,
                          const LossOptions<A>& o) {
  const bool kept_a = a != o.ignore_index, kept_b = b != o.ignore_index;
  const bool class_a = a >= 0 && a < classes, class_b = b >= 0 && b < classes;
  const A other = A(1) - lam;
  t.a = class_a ? a : 0;
  t.b = class_b ? b : 0;
  const A share_a = kept_a ? lam : A(0), share_b = kept_b ? other : A(0);
  const A weight_a = !kept_a ? A(0) : !class_a ? kNaN<A> : weight ? weight[t.a] : A(1);
  const A weight_b = !kept_b ? A(0) : !class_b ? kNaN<A> : weight ? weight[t.b] : A(1);
  const A mass_a = share_a * weight_a, mass_b = share_b * weight_b, share = share_a + share_b;
  t.at_a = o.on * mass_a;
  t.at_b = o.on * mass_b;
  t.off = o.off * share;
  t.q = o.on * (mass_a + mass_b) + (t.off != A(0) ? t.off * weight_sum : A(0));  // weights need not be finite
  t.z = o.z_loss * share;
  t.mass = mass_a + mass_b;
  t.dead = share_a == A(0) && share_b == A(0);
}

// top = max z, logsum = log sum exp(z - top); za, zb: z - top at the labels; rest: sum over classes of w_c (z_c - top),
// or of q_c (z_c - top) for probabilities, whose off is 1.
template <class A>
FT_HD A row_loss(const RowTarget<A>& t, A top, A logsum, A za, A zb, A rest) {
  if (t.dead) return A(0);
  A inner = t.off != A(0) ? t.off * rest : A(0);
  if (t.at_a != A(0)) inner += t.at_a * za;
  if (t.at_b != A(0)) inner += t.at_b * zb;
  const A loss = t.q * logsum - inner, lse = top + logsum;
  return t.z != A(0) ? loss + t.z * lse * lse : loss;
}

// d loss / d z_c = softmax * softmax_c - g q_c
template <class A>
struct RowSlope {
  A softmax, g;
  bool zero;
};

template <class A>
FT_HD RowSlope<A> row_slope(const RowTarget<A>& t, A g, bool has_dlse, A dlse, A lse) {
  if (t.dead) return {has_dlse ? dlse : A(0), A(0), !has_dlse};
  const A softmax = g * (t.z != A(0) ? t.q + A(2) * t.z * lse : t.q);
  return {has_dlse ? softmax + dlse : softmax, g, false};
}

}  // namespace fusedtricks
