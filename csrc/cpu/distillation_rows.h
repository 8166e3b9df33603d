// Distillation on the CPU, rows whose classes lie side by side: those of cross_entropy, of both models at once.
//
// A row of either model is read from memory once. Bytes that must move, for n elements of s bytes: forward 2ns,
// backward 3ns, both in one pass 3ns.
#pragma once

#include <memory>

#include "cross_entropy_call.h"
#include "math/distillation.h"

namespace fusedtricks::FT_ISA {

// What a pass is to make; null where it is not wanted.
template <class T, class A = Acc<T>>
struct DistillationPass {
  bool forward;
  A over;               // 1 / temperature
  A soft, hard;         // what dloss is multiplied by in the gradient: alpha T, 1 - alpha, and what "mean" divides by
  const Targets<A>* t;  // null: alpha T^2 KL alone
  A* losses;            // (R,), of the cross-entropy
  A* stats;             // (7, R), read by a backward
  T* dx;
  const A* dloss;  // one, or one a row
  bool one_dloss;
};

template <class A>
inline void set_or_dead(RowTarget<A>& target, const Targets<A>* t, int64_t r) {
  if (t) {
    t->set(target, r);
  } else {
    target = {};
    target.dead = true;
  }
}

template <class A>
Vec<A> weights(const A* weight, int64_t j, auto lanes) {
  return weight ? load(weight + j, lanes) : broadcast(A(1));
}

// Both: the student's exponentials at the temperature and at 1 are not the same.
template <bool Both, class T, class P, class A = Acc<T>>
void distill_rows(const Layout& l, const DistillationPass<T>& pass) {
  const T* x0 = static_cast<const T*>(l.x.const_data_ptr());
  const P* t0 = static_cast<const P*>(l.t.const_data_ptr());
  const int64_t R = l.rows.count, C = l.classes;
  const Loss<T, T, true> student{{}, {}, C, nullptr};
  const Loss<P, P, true> teacher{{}, {}, C, nullptr};
  const A* weight = pass.t ? pass.t->weight : nullptr;
  const A over = pass.over;
  const bool smooth = pass.t && pass.t->o.off != A(0);  // else no class but the labels has a share of its own
  const bool far = goes_far(R * C * static_cast<int64_t>(sizeof(T)));
  parallel(R, 2 * C, [&](int64_t begin, int64_t end) {
    const bool keeps = pass.forward && pass.dx;
    const std::unique_ptr<A[]> scratch(keeps ? new A[static_cast<size_t>(C * (Both ? 3 : 2))] : nullptr);
    A* const eu = scratch.get();
    A *const ev = keeps ? eu + C : nullptr, *const es = keeps && Both ? eu + 2 * C : nullptr;
    typename Rows<4>::Walk at(l.rows, begin);
    for (int64_t left = end - begin; left > 0; --left) {
      const T* x = x0 + at.offset[1];
      const P* t = t0 + at.offset[3];
      T* dx = pass.dx ? pass.dx + at.offset[0] : nullptr;
      const int64_t r = at.offset[2];
      if (left > 1) at.next();
      const T* next_x = x0 + at.offset[1];
      const P* next_t = t0 + at.offset[3];
      auto stat = [&](DistillationStat s) -> A& { return pass.stats[s * R + r]; };
      RowTarget<A> target{};
      set_or_dead(target, pass.t, r);
      if (pass.forward) {
        const A top = row_top(student, x), teacher_top = row_top(teacher, t);
        // exp(u), exp(v), exp(v) (v - u) T, w (z - top), exp(student)
        A sums[5];
        auto add = [&]<bool Keep>() {
          reduce<A, 2>(C, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
            __builtin_prefetch(next_x + j, 0, 2);
            __builtin_prefetch(next_t + j, 0, 2);
            const Vec<A> z = load(x + j, lanes) - top, v = load(t + j, lanes) - teacher_top;
            const Vec<A> e_u = exp<A>(z * over), e_v = keep<A>(exp<A>(v * over), lanes);
            s[0] += keep<A>(e_u, lanes);
            s[1] += e_v;
            s[2] += e_v != A(0) ? e_v * (v - z) : Vec<A>{};
            if (smooth) {
              const Vec<A> w = keep<A>(weights(weight, j, lanes), lanes);
              s[3] += w != A(0) ? w * z : Vec<A>{};
            }
            if constexpr (Keep) store(eu + j, e_u, lanes), store(ev + j, e_v, lanes);
            if constexpr (Both) {
              const Vec<A> e_s = exp<A>(z);
              s[4] += keep<A>(e_s, lanes);
              if constexpr (Keep) store(es + j, e_s, lanes);
            }
          });
        };
        keeps ? add.template operator()<true>() : add.template operator()<false>();
        const A sum = Both ? sums[4] : sums[0];
        stat(kTop) = top, stat(kSum) = sum, stat(kQ) = target.q;
        stat(kTeacherTop) = teacher_top, stat(kTeacherSum) = sums[1], stat(kStudentSum) = sums[0];
        stat(kDivergence) = divergence(sums[2] * over, sums[1], log<A>(broadcast(sums[0] / sums[1]))[0]);
        const A za = target.at_a != A(0) ? load(x + target.a, Tail{1})[0] - top : A(0);
        const A zb = target.at_b != A(0) ? load(x + target.b, Tail{1})[0] - top : A(0);
        pass.losses[r] = row_loss(target, top, log<A>(broadcast(sum))[0], za, zb, sums[3]);
      }
      if (!dx) continue;
      const A dloss = pass.one_dloss ? *pass.dloss : pass.dloss[r];
      const auto hard = row_slope(target, dloss * pass.hard, false, A(0), A(0));
      const auto soft = soft_slope(dloss * pass.soft, stat(kStudentSum), stat(kTeacherSum));
      const auto k = slopes_of(soft, hard, A(1) / stat(kSum), target.off, Both);
      const A top = stat(kTop), teacher_top = stat(kTeacherTop);
      auto differentiate = [&]<bool Stream>(const auto& value) {
        auto smoothed = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
          const Vec<A> v = value(j, lanes);
          return smooth ? v - k.off * weights(weight, j, lanes) : v;
        };
        auto at_label = [&](int64_t c) {
          A v = smoothed(c, Tail{1})[0];
          if (c == target.a) v -= hard.g * target.at_a;
          if (c == target.b) v -= hard.g * target.at_b;
          return v;
        };
        auto put = [&](int64_t j, auto lanes, int)
                       __attribute__((always_inline)) { store_or_stream<Stream>(dx + j, smoothed(j, lanes), lanes); };
        const int64_t head = Stream ? unaligned_head(dx) : 0;
        if (head > 0) put(0, Tail{static_cast<int>(head)}, 0);
        sweep<A, 4>(head, C, put);
        if (hard.zero) return;
        // Rounded once, with what the label takes away.
        dx[target.a] = rounded_to<T>(at_label(target.a));
        dx[target.b] = rounded_to<T>(at_label(target.b));
      };
      auto from = [&](const auto& value) {
        const bool past_caches = far && (C >= kFewestStreamed || unaligned_head(dx) == 0);
        past_caches ? differentiate.template operator()<true>(value) : differentiate.template operator()<false>(value);
      };
      if (keeps) {
        from([&](int64_t j, auto lanes) __attribute__((always_inline)) {
          Vec<A> v = k.student * load(eu + j, lanes) - k.teacher * load(ev + j, lanes);
          if constexpr (Both) v += k.hard * load(es + j, lanes);
          return v;
        });
      } else {
        from([&](int64_t j, auto lanes) __attribute__((always_inline)) {
          const Vec<A> z = load(x + j, lanes) - top;
          Vec<A> v = k.student * exp<A>(z * over) - k.teacher * exp<A>((load(t + j, lanes) - teacher_top) * over);
          if constexpr (Both) v += k.hard * exp<A>(z);
          return v;
        });
      }
    }
    streamed();
  });
}

}  // namespace fusedtricks::FT_ISA
