// Knowledge distillation: a row's divergence and the slope of its gradient. A is the accumulation type.
// Derivation and notation: fusedtricks/ops/distillation.py.
#pragma once

#include "hd.h"

namespace fusedtricks {

// KL(p || s). cross: sum of exp(v) (v - u), with u and v below their maxima; sums of exp(u) and exp(v).
template <class A>
FT_HD A divergence(A cross, A teacher_sum, A log_student_over_teacher) {
  return cross / teacher_sum + log_student_over_teacher;
}

// d loss / d student_c = student exp(u_c) - teacher exp(v_c), where g = alpha T dloss.
template <class A>
struct SoftSlope {
  A student, teacher;
};

template <class A>
FT_HD SoftSlope<A> soft_slope(A g, A student_sum, A teacher_sum) {
  return {g / student_sum, g / teacher_sum};
}

}  // namespace fusedtricks
