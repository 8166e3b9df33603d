// Knowledge distillation: the sums of a row of both models, its divergence and the slopes of its gradient. A is the
// accumulation type. Derivation and notation: fusedtricks/ops/distillation.py.
#pragma once

#include "cross_entropy.h"

namespace fusedtricks {

// Of some classes of a row: those of the student's logits z as for labels; of the teacher's, v, teacher_top = max v;
// and sums of exp(u), of exp(v') and of exp(v') (v - teacher_top - (z - top)), where u = (z - top) / T and v' = (v -
// teacher_top) / T. What has exp(v') = 0 is left out of the last.
template <class A>
struct PairSums {
  ClassSums<A> hard;
  A student = 0, teacher_top = -kInfinity<A>, teacher = 0, cross = 0;
};

// over = 1 / T
template <class A, class Exp>
FT_HD PairSums<A> join(const PairSums<A>& a, const PairSums<A>& b, A over, const Exp& exp) {
  PairSums<A> s;
  s.hard = join(a.hard, b.hard, exp);
  s.teacher_top = a.teacher_top < b.teacher_top ? b.teacher_top : a.teacher_top;
  auto add = [&](const PairSums<A>& part) {
    const A fall = part.hard.top == s.hard.top ? A(0) : part.hard.top - s.hard.top;
    const A teacher_fall = part.teacher_top == s.teacher_top ? A(0) : part.teacher_top - s.teacher_top;
    const A shrink = exp(teacher_fall * over);
    s.student += part.student * exp(fall * over);
    s.teacher += part.teacher * shrink;
    const A cross = shrink * (part.cross + part.teacher * (teacher_fall - fall));
    s.cross += part.teacher == A(0) || shrink == A(0) ? A(0) : cross;
  };
  add(a);
  add(b);
  return s;
}

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

// What the exponentials of a row are multiplied by in its gradient: exp(u), exp(v), exp(z - top), and the weights.
template <class A>
struct Slopes {
  A student, teacher, hard, off;
};

// `unit` is 1 / sum exp(z - top). Without `both` exp(u) serves for exp(z - top).
template <class A>
FT_HD Slopes<A> slopes_of(SoftSlope<A> soft, RowSlope<A> hard, A unit, A off, bool both) {
  const A k = hard.softmax * unit;
  return {both ? soft.student : soft.student + k, soft.teacher, both ? k : A(0), hard.g * off};
}

// The numbers kept of each row for the backward.
enum DistillationStat { kTop, kSum, kQ, kTeacherTop, kTeacherSum, kStudentSum, kDivergence, kDistillationStats };

}  // namespace fusedtricks
