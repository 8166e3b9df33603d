// Forward of cross-entropy: regimes and bytes are in cross_entropy.cuh.
#pragma once

#include "cross_entropy.cuh"

namespace fusedtricks::cuda {

template <class T>
struct LossForward : LossArguments<T> {
  using A = Acc<T>;
  A *losses, *stats, *total, *loss;
  int32_t* rank;  // null where it is not wanted
  int64_t tiles;
  int reduction;
  ClassSums<A>* part_sums;  // (R, parts), where several blocks share a row
  int* part_counts;         // (R, parts, 2)
  A* sums;                  // (tiles, 2): loss and mass
  unsigned* counters;       // of tiles, where several blocks share a row, and of the tree over tiles
};

// What a thread learns of its part of a row.
template <class T, bool Plain, bool Soft>
struct Seen {
  using A = Acc<T>;
  ClassSums<A> sums{};
  Sums<int, 2> before{};  // classes that come before the labels
  bool ranking;
  int64_t label[2];
  A at_label[2];

  // Classes c to c + N, whose logits are x.
  template <int N>
  __device__ __forceinline__ void add(const Row<T, Plain, Soft>& row, int64_t c, const T (&x)[N], A base,
                                      ClassSums<A>& part) {
    A q[N];
    row.coefficients(c, q);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = row.scaled(widen(x[i])) - base;
      part.total += Exp<A>()(d);
      if constexpr (Plain) {
        part.rest += d;
      } else {
        part.rest += q[i] != A(0) ? q[i] * d : A(0);
        part.q += q[i];
      }
    }
    if constexpr (Plain) part.q += A(N);
    if (!Plain && ranking) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A v = widen(x[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          before.at[h] += v > at_label[h] || (v == at_label[h] && c + i < label[h]);
        }
      }
    }
  }

  // The share of thread `lane` of slots first to last, and of what is outside of slots, which goes with the first.
  __device__ __forceinline__ void read(const Row<T, Plain, Soft>& row, int64_t first, int64_t last, int lane,
                                       int lanes) {
    constexpr int L = kLanes<T>;
    auto finite = [](A top) { return top == -kInfinity<A> ? A(0) : top; };
    for (int64_t s = first + lane; s < last; s += kSlotsAtOnce * lanes) {
      Vector<T> x[kSlotsAtOnce];
#pragma unroll
      for (int k = 0; k < kSlotsAtOnce; ++k) {
        if (s + k * lanes < last) row.logits(row.slot(s + k * lanes), x[k].at);
      }
      A top = -kInfinity<A>;
#pragma unroll
      for (int k = 0; k < kSlotsAtOnce; ++k) {
        if (s + k * lanes >= last) continue;
#pragma unroll
        for (int i = 0; i < L; ++i) top = max(top, widen(x[k].at[i]));
      }
      ClassSums<A> part;
      part.top = row.scaled(top);
      const A base = finite(part.top);
#pragma unroll
      for (int k = 0; k < kSlotsAtOnce; ++k) {
        if (s + k * lanes < last) add(row, row.slot(s + k * lanes), x[k].at, base, part);
      }
      sums = join(sums, part, Exp<A>());
    }
    const int64_t extras = first == 0 ? row.extras() : 0;
    if (lane >= extras) return;
    A top = -kInfinity<A>;
    T x[1];
    for (int64_t e = lane; e < extras; e += lanes) {
      row.logits(row.extra(e), x);
      top = max(top, widen(x[0]));
    }
    ClassSums<A> part;
    part.top = row.scaled(top);
    for (int64_t e = lane; e < extras; e += lanes) {
      row.logits(row.extra(e), x);
      add(row, row.extra(e), x, finite(part.top), part);
    }
    sums = join(sums, part, Exp<A>());
  }
};

// Blocks of rows, or of parts of them: losses, statistics, ranks, and the sums over all rows.
template <class T, int Width, bool Plain, bool Soft>
__global__ void __launch_bounds__(kLossThreads, 1) row_losses(const LossForward<T> a) {
  using A = Acc<T>;
  static_assert(Width == kLanes<T>);
  const Part here(a);
  const bool live = here.live;
  Group group(a.lanes);
  const auto at = a.rows.place(live ? here.r : 0);
  const int64_t index = a.rows.offset(2, at);
  const Row<T, Plain, Soft> row(a, at);
  Seen<T, Plain, Soft> seen;
  seen.ranking = !Plain && !Soft && a.rank;
  int64_t label[2] = {0, 0};
  if (seen.ranking) {
    label[0] = a.a.at(index);
    label[1] = a.b.data ? a.b.at(index) : label[0];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      seen.label[h] = label[h] >= 0 && label[h] < a.C ? label[h] : 0;
      seen.at_label[h] = widen(row.x[seen.label[h] * a.x_step]);
    }
  }
  const int64_t first = here.part * a.length, last = first + a.length < row.slots ? first + a.length : row.slots;
  if (live) seen.read(row, first, last, group.rank, a.lanes);
  auto join_sums = [](const auto& p, const auto& q) { return join(p, q, Exp<A>()); };
  auto whole_row = [&] {
    seen.sums = group.reduce(seen.sums, join_sums);
    if (!Plain && a.rank) seen.before = group.sum(seen.before);
  };
  whole_row();
  if (a.parts > 1) {
    const int64_t of_row = here.r * a.parts;
    if (live && group.rank == 0) {
      a.part_sums[of_row + here.part] = seen.sums;
#pragma unroll
      for (int h = 0; h < 2; ++h) a.part_counts[2 * (of_row + here.part) + h] = seen.before.at[h];
    }
    if (!arrives_last(a.counters + here.tile, static_cast<unsigned>(a.parts))) return;
    seen.sums = {};
    seen.before = {};
    for (int64_t p = group.rank; live && p < a.parts; p += a.lanes) {
      alignas(kVectorBytes) ClassSums<A> part;
      load<4, Cache::kShared>(reinterpret_cast<const A*>(a.part_sums + of_row + p), reinterpret_cast<A*>(&part));
      seen.sums = join(seen.sums, part, Exp<A>());
#pragma unroll
      for (int h = 0; h < 2; ++h) seen.before.at[h] += __ldcg(a.part_counts + 2 * (of_row + p) + h);
    }
    whole_row();
  }

  Sums<A, 2> sum{};  // of the losses and masses of the rows
  if (live && group.rank == 0) {
    const auto& s = seen.sums;
    const A total = s.top > -kInfinity<A> ? s.total : kNaN<A>;
    RowTarget<A> target = soft_target(a.o);
    if constexpr (Soft) {
      target.q = s.q;
    } else {
      a.set_target(target, index, s.q);
    }
    auto below_top = [&](A q, int64_t c) { return q != A(0) ? row.scaled(widen(row.x[c * a.x_step])) - s.top : A(0); };
    sum.at[0] = row_loss(target, s.top, static_cast<A>(log(total)), below_top(target.at_a, target.a),
                         below_top(target.at_b, target.b), s.rest);
    sum.at[1] = target.mass;
    a.losses[index] = sum.at[0];
    a.stats[index] = s.top;
    a.stats[a.R + index] = total;
    a.stats[2 * a.R + index] = target.q;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!seen.ranking || (h && !a.b.data)) continue;
      const bool counted = label[h] != a.o.ignore_index && seen.at_label[h] == seen.at_label[h];
      a.rank[h * a.R + index] = counted ? seen.before.at[h] : static_cast<int32_t>(a.C);
    }
  }
  sum_blocks(sum, a.sums, a.counters + (a.parts > 1 ? a.tiles : 0), a.tiles, here.tile, [&](const Sums<A, 2>& all) {
    *a.total = all.at[1];
    if (a.reduction != 0) *a.loss = a.reduction == 1 ? all.at[0] / all.at[1] : all.at[0];
  });
}

}  // namespace fusedtricks::cuda
