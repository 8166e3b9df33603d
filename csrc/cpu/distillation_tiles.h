// Distillation on the CPU where lanes are positions and not classes, see cross_entropy_tiles.h.
#pragma once

#include "distillation_rows.h"

namespace fusedtricks::FT_ISA {

// One tile of both models: logits, then exponentials, then the gradient in place of the student's.
template <class T, class A = Acc<T>>
struct Tiles {
  static constexpr int V = kVectors<A>, L = kLanes<A>, kP = kPositions<A>;
  int64_t classes;
  A *u, *v, *s;  // (C, kP) each; s null where exp(u) serves for it
  PerPosition<A> top, teacher_top, sum, student_sum, teacher_sum, cross, rest;

  // Exponentials, and the sums of `distill_rows`. Blocks of classes are summed separately, so that rounding does not
  // grow with their number.
  void add_up(A over, const A* weight) {
    constexpr int64_t kBlock = 256;
    for (int i = 0; i < V; ++i) {
      const Vec<A> most = top[i], teacher_most = teacher_top[i];
      Vec<A> total[5] = {};
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        Vec<A> part[5] = {};
        for (int64_t c = begin; c < std::min(classes, begin + kBlock); ++c) {
          const int64_t at = c * kP + i * L;
          const Vec<A> z = load(u + at, Full{}) - most, d = load(v + at, Full{}) - teacher_most;
          const Vec<A> e_u = exp<A>(z * over), e_v = exp<A>(d * over);
          store(u + at, e_u, Full{}), store(v + at, e_v, Full{});
          part[0] += e_u;
          part[1] += e_v;
          part[2] += e_v != A(0) ? e_v * (d - z) : Vec<A>{};
          const A w = weight ? weight[c] : A(1);
          if (w != A(0)) part[3] += w * z;
          if (s) {
            const Vec<A> e_s = exp<A>(z);
            store(s + at, e_s, Full{});
            part[4] += e_s;
          }
        }
        for (int n = 0; n < 5; ++n) total[n] += part[n];
      }
      student_sum.set(i, total[0]), teacher_sum.set(i, total[1]), cross.set(i, total[2] * over);
      rest.set(i, total[3]), sum.set(i, s ? total[4] : total[0]);
    }
  }

  void differentiate(const PerPosition<A> (&k)[4], const A* weight) {
    for (int i = 0; i < V; ++i) {
      const Vec<A> student = k[0][i], teacher = k[1][i], hard = k[2][i], off = k[3][i];
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t at = c * kP + i * L;
        Vec<A> value = student * load(u + at, Full{}) - teacher * load(v + at, Full{});
        if (s) value += hard * load(s + at, Full{});
        store(u + at, value - off * (weight ? weight[c] : A(1)), Full{});
      }
    }
  }
};

template <bool Strided, class T, class P, class A = Acc<T>>
void distill_tiles(const Layout& l, const DistillationPass<T>& pass, bool both) {
  constexpr int kP = kPositions<A>;
  const int64_t R = l.rows.count, C = l.classes;
  const A* weight = pass.t ? pass.t->of_classes() : nullptr;
  const Loss<T, T, true> loss{{}, {}, C, nullptr};
  each_tile<Strided, T, P>(l, pass.dx, both ? 3 : 2, 2 * C, [&](A* scratch) {
    const size_t area = static_cast<size_t>(C) * kP;
    return [&, tile = Tiles<T>{C, scratch, scratch + area, both ? scratch + 2 * area : nullptr}](
               const Positions<T, P>& at) mutable {
      const int count = at.count;
      const auto& row = at.row;
      RowTarget<A> target[kP];
      for (int p = 0; p < count; ++p) set_or_dead(target[p], pass.t, row[p]);
      read_tile<Strided>(at.x, C, count, tile.u);
      read_tile<Strided>(at.t, C, count, tile.v);
      Tile<T, T, true> student{loss, tile.u, nullptr, nullptr}, teacher{loss, tile.v, nullptr, nullptr};
      student.find_top(), teacher.find_top();
      tile.top = student.top, tile.teacher_top = teacher.top;
      A za[kP], zb[kP];
      for (int p = 0; p < count; ++p) {
        za[p] = tile.u[target[p].a * kP + p] - tile.top.at[p];
        zb[p] = tile.u[target[p].b * kP + p] - tile.top.at[p];
      }
      tile.add_up(pass.over, weight);
      for (int p = 0; pass.forward && p < count; ++p) {
        const A log_sum = log<A>(broadcast(tile.sum.at[p]))[0];
        const A log_ratio = log<A>(broadcast(tile.student_sum.at[p] / tile.teacher_sum.at[p]))[0];
        const A kl = divergence(tile.cross.at[p], tile.teacher_sum.at[p], log_ratio);
        pass.losses[row[p]] = row_loss(target[p], tile.top.at[p], log_sum, za[p], zb[p], tile.rest.at[p]);
        const A stats[] = {tile.top.at[p],         tile.sum.at[p],         target[p].q, tile.teacher_top.at[p],
                           tile.teacher_sum.at[p], tile.student_sum.at[p], kl};
        for (int s = 0; s < kDistillationStats; ++s) pass.stats[s * R + row[p]] = stats[s];
      }
      if (!pass.dx) return;
      PerPosition<A> k[4];
      RowSlope<A> hard[kP];
      for (int p = 0; p < count; ++p) {
        const A dloss = pass.one_dloss ? *pass.dloss : pass.dloss[row[p]];
        hard[p] = row_slope(target[p], dloss * pass.hard, false, A(0), A(0));
        const auto soft = soft_slope(dloss * pass.soft, tile.student_sum.at[p], tile.teacher_sum.at[p]);
        const auto here = slopes_of(soft, hard[p], A(1) / tile.sum.at[p], target[p].off, both);
        k[0].at[p] = here.student, k[1].at[p] = here.teacher, k[2].at[p] = here.hard, k[3].at[p] = here.off;
      }
      tile.differentiate(k, weight);
      for (int p = 0; p < count; ++p) {
        if (hard[p].zero) continue;
        tile.u[target[p].a * kP + p] -= hard[p].g * target[p].at_a;
        tile.u[target[p].b * kP + p] -= hard[p].g * target[p].at_b;
      }
      write_tile<Strided>(tile.u, C, count, at.out);
    };
  });
}

}  // namespace fusedtricks::FT_ISA
