// Distillation on the CPU, rows whose classes lie side by side: those of cross_entropy, of both models at once.
//
// A row of either model is read from memory once. Bytes that must move, for n elements of s bytes: forward 2ns,
// backward 3ns, both in one pass 3ns; of a sparse teacher, but for its own few, ns, 2ns and 2ns.
#pragma once

#include <memory>

#include "cross_entropy_call.h"
#include "math/distillation.h"

namespace fusedtricks::FT_ISA {

// The classes that a teacher knows, `count` of each row, and their logits.
template <class A>
struct SparseTeacher {
  Labels classes;
  Tensor owner;
  const A* values;
  int64_t count;

  SparseTeacher(const Tensor& indices, const Tensor& teacher)
      : classes(indices),
        owner(torch::stable::contiguous(teacher.scalar_type() == kType ? teacher : torch::stable::to(teacher, kType))),
        values(static_cast<const A*>(owner.const_data_ptr())),
        count(teacher.size(1)) {}

  // Refuses what is no class.
  void check(int64_t rows, int64_t all) const {
    auto wrong = [&](int64_t i) { return static_cast<uint64_t>(classes[i]) >= static_cast<uint64_t>(all); };
    std::atomic<bool> any = false;
    parallel(rows * count, 1, [&](int64_t begin, int64_t end) {
      bool here = false;
      for (int64_t i = begin; i < end; ++i) here |= wrong(i);
      if (here) any = true;
    });
    for (int64_t i = 0; any && i < rows * count; ++i) {
      if (!wrong(i)) continue;
      throw std::out_of_range("Index " + std::to_string(classes[i]) + " of the teacher is out of bounds: row " +
                              std::to_string(i / count) + ", expected 0 to " + std::to_string(all - 1));
    }
  }

 private:
  static constexpr ScalarType kType = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
};

// Of the classes that the teacher of row r knows: sums of e = exp(v) and of e (v - z), v and z below their maxima. e is
// added to `spread` at its class, unless that is null.
template <class T, class A = Acc<T>>
inline void known_sums(const SparseTeacher<A>& teacher, int64_t r, const T* x, A top, A teacher_top, A over, A* spread,
                       A (&sums)[2]) {
  const int64_t first = r * teacher.count;
  reduce<A, 1>(teacher.count, sums, [&](int64_t j, auto lanes, Vec<A>* s) {
    const int n = std::is_same_v<decltype(lanes), Full> ? kLanes<A> : static_cast<int>(teacher.count - j);
    const Vec<A> v = load(teacher.values + first + j, lanes) - teacher_top, e = keep<A>(exp<A>(v * over), lanes);
    A z[kLanes<A>] = {}, each[kLanes<A>];
    store(each, e, Full{});
    for (int i = 0; i < n; ++i) {
      const int64_t c = teacher.classes[first + j + i];
      z[i] = load(x + c, Tail{1})[0] - top;
      if (spread) spread[c] += each[i];
    }
    s[0] += e;
    s[1] += e != A(0) ? e * (v - load(z, Full{})) : Vec<A>{};
  });
}

// What a pass is to make; null where it is not wanted.
template <class T, class A = Acc<T>>
struct DistillationPass {
  bool forward;
  A over;               // 1 / temperature
  A soft, hard;         // what dloss is multiplied by in the gradient: alpha T, 1 - alpha, and what "mean" divides by
  const Targets<A>* t;  // null: alpha T^2 KL alone
  const SparseTeacher<A>* sparse;
  A* losses;  // (R,), of the cross-entropy
  A* stats;   // (7, R), read by a backward
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

// Both: the student's exponentials at the temperature and at 1 are not the same. Sparse: of the teacher's exponentials
// there is a row that is zero but at the classes it knows, so that what follows does not care. Exponentials are kept
// for the gradient that is made with them; of a sparse teacher also where nothing else is made, which costs little and
// saves instances.
template <bool Both, bool Sparse, class T, class P, class A = Acc<T>>
void distill_rows(const Layout& l, const DistillationPass<T>& pass) {
  static_assert(!Sparse || std::is_same_v<P, A>);
  const T* x0 = static_cast<const T*>(l.x.const_data_ptr());
  const P* t0 = Sparse ? nullptr : static_cast<const P*>(l.t.const_data_ptr());
  const int64_t R = l.rows.count, C = l.classes, known = Sparse ? pass.sparse->count : C;
  const Loss<T, T, true> student{{}, {}, C, nullptr};
  const Loss<P, P, true> teacher{{}, {}, known, nullptr};
  const A* weight = pass.t ? pass.t->of_classes() : nullptr;
  const A over = pass.over;
  const bool smooth = pass.t && pass.t->o.off != A(0);  // else no class but the labels has a share of its own
  const bool far = goes_far(R * C * static_cast<int64_t>(sizeof(T)));
  parallel_pieces(R, C + known, [&](Pieces& pieces) {
    const bool exponentiates = pass.forward || Sparse, keeps = exponentiates && pass.dx;
    const std::unique_ptr<A[]> scratch(keeps ? new A[static_cast<size_t>(C * (Both ? 3 : 2))] : nullptr);
    A* const eu = scratch.get();
    A *const ev = keeps ? eu + C : nullptr, *const es = keeps && Both ? eu + 2 * C : nullptr;
    if (Sparse && keeps) std::fill_n(ev, C, A(0));
    auto rows = [&](int64_t begin, int64_t end) {
      typename Rows<4>::Walk at(l.rows, begin);
      for (int64_t left = end - begin; left > 0; --left) {
        const T* x = x0 + at.offset[1];
        const int64_t r = at.offset[2];
        auto teacher_at = [&](const auto& place) {
          if constexpr (Sparse) return pass.sparse->values + place.offset[2] * known;
          return t0 + place.offset[3];
        };
        const P* t = teacher_at(at);
        T* dx = pass.dx ? pass.dx + at.offset[0] : nullptr;
        if (left > 1 || pieces.next() == end) at.next();
        const T* next_x = x0 + at.offset[1];
        const P* next_t = teacher_at(at);
        auto stat = [&](DistillationStat s) -> A& { return pass.stats[s * R + r]; };
        RowTarget<A> target{};
        set_or_dead(target, pass.t, r);
        if (exponentiates) {
          const A top = pass.forward ? row_top(student, x) : stat(kTop);
          const A teacher_top = pass.forward ? row_top(teacher, t) : stat(kTeacherTop);
          // exp(u), exp(v), exp(v) (v - u) T, w (z - top), exp(student)
          A sums[5], of_known[2];
          auto add = [&]<bool Keep>() {
            reduce<A, 2>(C, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
              __builtin_prefetch(next_x + j, 0, 2);
              const Vec<A> z = load(x + j, lanes) - top, e_u = exp<A>(z * over);
              s[0] += keep<A>(e_u, lanes);
              if constexpr (Keep) store(eu + j, e_u, lanes);
              if constexpr (!Sparse) {
                __builtin_prefetch(next_t + j, 0, 2);
                const Vec<A> v = load(t + j, lanes) - teacher_top, e_v = keep<A>(exp<A>(v * over), lanes);
                s[1] += e_v;
                s[2] += e_v != A(0) ? e_v * (v - z) : Vec<A>{};
                if constexpr (Keep) store(ev + j, e_v, lanes);
              }
              if (smooth) {
                const Vec<A> w = keep<A>(weights(weight, j, lanes), lanes);
                s[3] += w != A(0) ? w * z : Vec<A>{};
              }
              if constexpr (Both) {
                const Vec<A> e_s = exp<A>(z);
                s[4] += keep<A>(e_s, lanes);
                if constexpr (Keep) store(es + j, e_s, lanes);
              }
            });
          };
          keeps ? add.template operator()<true>() : add.template operator()<false>();
          if constexpr (Sparse) {
            known_sums(*pass.sparse, r, x, top, teacher_top, over, ev, of_known);
            sums[1] = of_known[0], sums[2] = of_known[1];
          }
          if (pass.forward) {
            const A sum = Both ? sums[4] : sums[0];
            stat(kTop) = top, stat(kSum) = sum, stat(kQ) = target.q;
            stat(kTeacherTop) = teacher_top, stat(kTeacherSum) = sums[1], stat(kStudentSum) = sums[0];
            stat(kDivergence) = divergence(sums[2] * over, sums[1], log<A>(broadcast(sums[0] / sums[1]))[0]);
            const A za = target.at_a != A(0) ? load(x + target.a, Tail{1})[0] - top : A(0);
            const A zb = target.at_b != A(0) ? load(x + target.b, Tail{1})[0] - top : A(0);
            pass.losses[r] = row_loss(target, top, log<A>(broadcast(sum))[0], za, zb, sums[3]);
          }
        }
        if (!dx) continue;
        const A dloss = pass.one_dloss ? *pass.dloss : pass.dloss[r];
        const auto hard = row_slope(target, dloss * pass.hard, false, A(0), A(0));
        const auto soft = soft_slope(dloss * pass.soft, stat(kStudentSum), stat(kTeacherSum));
        const auto k = slopes_of(soft, hard, A(1) / stat(kSum), target.off, Both);
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
          sweep_stored<Stream, 4>(dx, C, put);
          if (hard.zero) return;
          // Rounded once, with what the label takes away.
          dx[target.a] = rounded_to<T>(at_label(target.a));
          dx[target.b] = rounded_to<T>(at_label(target.b));
        };
        auto from = [&](const auto& value) {
          const bool past_caches = far && (C >= kFewestStreamed || unaligned_head(dx) == 0);
          past_caches ? differentiate.template operator()<true>(value)
                      : differentiate.template operator()<false>(value);
        };
        if (keeps) {
          from([&](int64_t j, auto lanes) __attribute__((always_inline)) {
            Vec<A> v = k.student * load(eu + j, lanes) - k.teacher * load(ev + j, lanes);
            if constexpr (Both) v += k.hard * load(es + j, lanes);
            return v;
          });
        } else if constexpr (!Sparse) {
          const A top = stat(kTop), teacher_top = stat(kTeacherTop);
          from([&](int64_t j, auto lanes) __attribute__((always_inline)) {
            const Vec<A> z = load(x + j, lanes) - top;
            Vec<A> v = k.student * exp<A>(z * over) - k.teacher * exp<A>((load(t + j, lanes) - teacher_top) * over);
            if constexpr (Both) v += k.hard * exp<A>(z);
            return v;
          });
        }
        if constexpr (Sparse) {
          for (int64_t i = r * known; i < (r + 1) * known; ++i) ev[pass.sparse->classes[i]] = 0;
        }
      }
    };
    pieces.each(rows);
    streamed();
  });
}

}  // namespace fusedtricks::FT_ISA
