// Distillation on CUDA devices: the kernels. Rows of two models at once, dealt to threads and blocks as
// cross_entropy.cuh has it.
//
// Bytes that must move, for R rows of C classes of s bytes: forward 2 R C s, backward 3 R C s. Slots are counted from
// the student's first aligned address; a teacher that is aligned otherwise is read class by class.
//
// A sparse teacher, whose type P of logits is void, has k entries a row: R C s and 2 R C s, for its own are few. The
// forward takes them as further parts of the row. The backward stores their classes a second time, as a whole.
#pragma once

#include "cross_entropy.cuh"
#include "math/distillation.h"

namespace fusedtricks::cuda {

inline constexpr int kPairsAtOnce = kSlotsAtOnce / 2;  // slots of each model that a thread has in flight

template <class T>
struct DistillationArguments : LossArguments<T> {
  using A = Acc<T>;
  A over;        // 1 / temperature
  A soft, hard;  // what KL and cross-entropy count for; the latter is still to be divided by `total` in a mean
  bool mean;
  bool both;          // exp(z - top) is wanted, and not what exp((z - top) / temperature) is
  LabelColumn known;  // (R, k), of a sparse teacher, with its logits
  const A* values;
  int64_t k;
};

template <class T>
struct DistillationForward : DistillationArguments<T> {
  using A = Acc<T>;
  A *losses, *stats, *total, *loss;  // losses null: the sum over rows is wanted
  int64_t tiles;
  PairSums<A>* part_sums;  // (R, parts), where several blocks share a row
  A* sums;                 // (tiles, 4): KL, cross-entropy, mass, nothing
  unsigned* counters;      // of tiles, where several blocks share a row, and of the tree over tiles
};

template <class T>
struct DistillationBackward : DistillationArguments<T> {
  using A = Acc<T>;
  T* y;
  const A *dloss, *stats, *total;
  bool one_dloss;
};

// Runs of N classes of both models.
template <class T, class P, int K, int N>
struct Pairs {
  alignas(kVectorBytes) T x[K][N];
  alignas(kVectorBytes) P v[K][N];

  template <class Row, class ClassOf>
  __device__ __forceinline__ Pairs(const Row& row, const ClassOf& class_of) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (class_of(k) >= 0) row.logits(class_of(k), x[k]), row.beside(class_of(k), v[k]);
    }
  }
};

template <class T, int K, int N>
struct Pairs<T, void, K, N> {
  alignas(kVectorBytes) T x[K][N];

  template <class Row, class ClassOf>
  __device__ __forceinline__ Pairs(const Row& row, const ClassOf& class_of) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (class_of(k) >= 0) row.logits(class_of(k), x[k]);
    }
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

// The sums of some runs, each logit below the maximum of its model in them.
template <class T, class P, int K, int N, class Row, class ClassOf>
__device__ __forceinline__ PairSums<Acc<T>> sums_of(const DistillationArguments<T>& a, const Row& row,
                                                    const ClassOf& class_of) {
  using A = Acc<T>;
  const Pairs<T, P, K, N> of(row, class_of);
  PairSums<A> s;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (class_of(k) < 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s.hard.top = max(s.hard.top, widen(of.x[k][i]));
      if constexpr (!std::is_void_v<P>) s.teacher_top = max(s.teacher_top, static_cast<A>(widen(of.v[k][i])));
    }
  }
  auto finite = [](A top) { return top == -kInfinity<A> ? A(0) : top; };
  const A base = finite(s.hard.top), teacher_base = finite(s.teacher_top);
  const Exp<A> exp{};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (class_of(k) < 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A z = widen(of.x[k][i]) - base;
      s.student += exp(z * a.over);
      if constexpr (!std::is_void_v<P>) {
        const A v = static_cast<A>(widen(of.v[k][i])) - teacher_base, e = exp(v * a.over);
        s.teacher += e;
        s.cross += e != A(0) ? e * (v - z) : A(0);
      }
    }
    if (a.both) {
#pragma unroll
      for (int i = 0; i < N; ++i) s.hard.total += exp(widen(of.x[k][i]) - base);
    }
    if (a.o.off != A(0)) {
      A w[N];
      row.coefficients(class_of(k), w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        s.hard.rest += w[i] != A(0) ? w[i] * (widen(of.x[k][i]) - base) : A(0);
        s.hard.q += w[i];
      }
    }
  }
  return s;
}

// Those of one entry of a sparse teacher; `place` counts them over all rows. The student's own sums are of its classes,
// and not of these. An index that is no class makes the row NaN.
template <class T, class Row>
__device__ __forceinline__ PairSums<Acc<T>> sums_of_entry(const DistillationArguments<T>& a, const Row& row,
                                                          int64_t place) {
  using A = Acc<T>;
  const int64_t c = a.known.at(place);
  const bool inside = c >= 0 && c < a.C;
  const A z = inside ? static_cast<A>(widen(row.x[c * a.x_step])) : A(0), v = __ldg(a.values + place);
  PairSums<A> s;
  s.hard.top = z;
  s.teacher_top = v;
  s.teacher = v == -kInfinity<A> ? A(0) : A(1);
  s.cross = s.teacher == A(0) || z > -kInfinity<A> ? A(0) : kInfinity<A>;
  if (!inside) s.student = s.hard.total = kNaN<A>;
  return s;
}

// Blocks of rows, or of parts of them: losses, statistics, and the sums over all rows.
template <class T, int Width, class P>
__global__ void __launch_bounds__(kLossThreads, 1) row_divergences(const DistillationForward<T> a) {
  using A = Acc<T>;
  static_assert(Width == kLanes<T>);
  const Part here(a);
  const bool live = here.live;
  Group group(a.lanes);
  const auto at = a.rows.place(live ? here.r : 0);
  const int64_t index = a.rows.offset(2, at);
  const Row<T, false, false> row(a, at);
  auto join_sums = [&](const auto& p, const auto& q) { return join(p, q, a.over, Exp<A>()); };
  PairSums<A> s;
  if (live) {
    row.template each_run<kPairsAtOnce>(here, group.rank, [&]<int K, int N>(const auto& class_of) {
      s = join_sums(s, sums_of<T, P, K, N>(a, row, class_of));
    });
    if constexpr (std::is_void_v<P>) {
      for (int64_t j = group.rank; here.part == 0 && j < a.k; j += a.lanes) {
        s = join_sums(s, sums_of_entry<T>(a, row, index * a.k + j));
      }
    }
  }
  s = group.reduce(s, join_sums);
  if (a.parts > 1) {
    PairSums<A>* of_row = a.part_sums + here.r * a.parts;
    if (live && group.rank == 0) of_row[here.part] = s;
    if (!arrives_last(a.counters + here.tile, static_cast<unsigned>(a.parts))) return;
    s = {};
    for (int64_t p = group.rank; live && p < a.parts; p += a.lanes) {
      alignas(kVectorBytes) PairSums<A> part;
      load<sizeof part / sizeof(A), Cache::kShared>(reinterpret_cast<const A*>(of_row + p),
                                                    reinterpret_cast<A*>(&part));
      s = join_sums(s, part);
    }
    s = group.reduce(s, join_sums);
  }

  Sums<A, 4> sum{};
  if (live && group.rank == 0) {
    const A top = s.hard.top, teacher_sum = s.teacher_top > -kInfinity<A> ? s.teacher : kNaN<A>;
    // What is NaN of a teacher is NaN in the whole row, also where the teacher does not know the class.
    const A student_sum = top > -kInfinity<A> && teacher_sum == teacher_sum ? s.student : kNaN<A>;
    const A total = a.both ? (top > -kInfinity<A> ? s.hard.total : kNaN<A>) : student_sum;
    const A kl = divergence(s.cross * a.over, teacher_sum, static_cast<A>(log(student_sum / teacher_sum)));
    RowTarget<A> target{};
    target.dead = true;
    if (a.a.data) a.set_target(target, index, s.hard.q);
    auto below_top = [&](A q, int64_t c) { return q != A(0) ? widen(row.x[c * a.x_step]) - top : A(0); };
    const A hard = row_loss(target, top, static_cast<A>(log(total)), below_top(target.at_a, target.a),
                            below_top(target.at_b, target.b), s.hard.rest);
    sum = {kl, hard, target.mass, A(0)};
    if (a.losses) a.losses[index] = a.soft * kl + (a.a.data ? a.hard * hard : A(0));
    A stat[kDistillationStats];
    stat[kTop] = top, stat[kSum] = total, stat[kQ] = target.q, stat[kTeacherTop] = s.teacher_top;
    stat[kTeacherSum] = teacher_sum, stat[kStudentSum] = student_sum, stat[kDivergence] = kl;
#pragma unroll
    for (int i = 0; i < kDistillationStats; ++i) a.stats[i * a.R + index] = stat[i];
  }
  sum_blocks(sum, a.sums, a.counters + (a.parts > 1 ? a.tiles : 0), a.tiles, here.tile, [&](const Sums<A, 4>& all) {
    *a.total = a.a.data ? all.at[2] : A(1);
    if (!a.losses)
      *a.loss = a.soft * all.at[0] + (a.a.data ? a.hard * (a.mean ? all.at[1] / all.at[2] : all.at[1]) : A(0));
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// dx = student exp(u) - teacher exp(v') + hard exp(z - top) - off w, less what the labels take away.
template <class T, int Width, class P>
__global__ void __launch_bounds__(kLossThreads, 1) row_distillation_gradients(const DistillationBackward<T> a) {
  using A = Acc<T>;
  static_assert(Width == kLanes<T>);
  const Part here(a);
  if (!std::is_void_v<P> && !here.live) return;
  const auto at = a.rows.place(here.live ? here.r : 0);
  const int64_t index = a.rows.offset(2, at);
  const Row<T, false, false> row(a, at);
  T* y = a.y + a.rows.offset(0, at);
  auto stat = [&](DistillationStat s) { return __ldg(a.stats + s * a.R + index); };
  RowTarget<A> target{};
  target.dead = true;
  if (a.a.data) a.set_target(target, index, A(0)), target.q = stat(kQ);
  const A dloss = __ldg(a.dloss + (a.one_dloss ? 0 : index));
  const auto hard =
      row_slope(target, dloss * (a.mean && a.a.data ? a.hard / __ldg(a.total) : a.hard), false, A(0), A(0));
  const auto soft = soft_slope(dloss * a.soft, stat(kStudentSum), stat(kTeacherSum));
  const auto slope = slopes_of(soft, hard, A(1) / stat(kSum), target.off, a.both);
  const A top = stat(kTop), teacher_top = stat(kTeacherTop);
  const A at_a = hard.g * target.at_a, at_b = hard.g * target.at_b;
  const Exp<A> exp{};
  // At classes c to c + N, of which the student's logits are x, but for what the teacher takes away.
  auto of_student = [&]<int N>(int64_t c, const T(&x)[N], A(&value)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = slope.student * exp((widen(x[i]) - top) * a.over);
    if (a.both) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] += slope.hard * exp(widen(x[i]) - top);
    }
    if (a.o.off != A(0)) {
      A w[N];
      row.coefficients(c, w);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] -= slope.off * w[i];
    }
    subtract_at(target.a, at_a, c, value);
    subtract_at(target.b, at_b, c, value);
  };
  const int lane = threadIdx.x % a.lanes;
  if (here.live) {
    row.template each_run<kPairsAtOnce>(here, lane, [&]<int K, int N>(const auto& class_of) {
      const Pairs<T, P, K, N> of(row, class_of);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t c = class_of(k);
        if (c < 0) continue;
        A value[N];
        of_student(c, of.x[k], value);
        if constexpr (!std::is_void_v<P>) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            value[i] -= slope.teacher * exp((static_cast<A>(widen(of.v[k][i])) - teacher_top) * a.over);
          }
        }
        store_gradient(value, y + c * a.y_step, a.y_step);
      }
    });
  }
  if constexpr (std::is_void_v<P>) {
    // What follows is stored over what other threads have stored.
    __syncthreads();
    const int64_t entries = index * a.k;
    for (int64_t j = lane; here.live && j < a.k; j += a.lanes) {
      const int64_t c = a.known.at(entries + j);
      if (!row.holds(here, c)) continue;
      // All entries of a class store the same.
      A e = 0;
      for (int64_t i = 0; i < a.k; ++i) {
        if (a.known.at(entries + i) == c) e += exp((__ldg(a.values + entries + i) - teacher_top) * a.over);
      }
      const T x[1] = {row.x[c * a.x_step]};
      A value[1];
      of_student(c, x, value);
      value[0] -= slope.teacher * e;
      store_gradient(value, y + c * a.y_step, a.y_step);
    }
  }
}

}  // namespace fusedtricks::cuda
