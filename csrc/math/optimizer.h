// What every optimizer rule shares: the table of parameters and the hyper-parameters of a group, as the step plan lays
// them out for the CPU, CUDA and Triton kernels alike, and the arithmetic that the rules have in common.
#pragma once

#include <cstdint>

#include "hd.h"

namespace fusedtricks {

// One row of int64 for each parameter that has a gradient. Pointers are addresses, 0 where there is nothing.
// fusedtricks/ops/_table.py names the same columns.
enum Column : int {
  kNumel,
  kKind,   // dtype of the parameter and its gradient + 4 * dtype of the moments; see Dtype
  kGroup,  // row of the hyper-parameters
  kFlags,  // see Flag
  kParam,
  kGrad,
  kState,                // three columns; a rule uses the first kStates of them
  kMaster = kState + 3,  // fp32 weights, or the 16 bits that the bfloat16 parameter lacks of them
  kEma,
  kStep,    // 0-dim, float32 or float64
  kFactor,  // 0-dim, as the step: the running product of momenta of NAdam
  kStream,  // tells this parameter's random numbers from another's
  kStart,   // elements in the rows before this one
  kColumns = 16,
};

enum Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum Flag : int64_t {
  kFirstMomentum = 1,  // the momentum buffer is new: it becomes the gradient (torch's SGD)
  kStepFloat64 = 2,
  kRemainder = 4,   // kMaster holds 16-bit remainders
  kStochastic = 8,  // round the bfloat16 parameter stochastically
};

// One row of float64 for each group.
enum Hyper : int {
  kLr,
  kWeightDecay,
  kEps,
  kMaximize,
  kDecoupled,  // weight decay beside the update, not through the gradient
  kRule,       // three columns that the rule names
  kEmaDecay = kRule + 3,
  kSeed,
  kHyper = 12,
};

// start + weight (end - start), from whichever end is nearer. `rest` is 1 - weight, prepared in double as weight is: an
// fp32 decay rate of 0.999 is off by 1e-8, which its sum over a thousand steps makes 1e-5; an fp32 weight of 0.001 is
// not.
template <class V, class A>
FT_HD V lerp(V start, V end, A weight, A rest) {
  return weight < A(0.5) ? start + weight * (end - start) : end + rest * (start - end);
}

// The same from an average of squares to g^2. Where that overflows, its share may not; infinity stays infinity.
template <class V, class A>
FT_HD V lerp_squares(V start, V g, A weight, A rest) {
  const V average = lerp(start, g * g, weight, rest);
  return average < kInfinity<A> ? average : rest * start + weight * g * g;
}

// `u` and what decoupled weight decay takes from p: nothing from infinite weights, which stay.
template <class V, class A>
FT_HD V with_decay(V u, V p, A decay) {
  const V zero = p - p;  // or NaN
  return zero == zero ? u + decay * p : u;
}

// The larger one; NaN if either is.
template <class V>
FT_HD V larger(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

}  // namespace fusedtricks
