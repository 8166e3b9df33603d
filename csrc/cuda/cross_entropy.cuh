// Cross-entropy on CUDA devices: the two kernels. Launchers and operators are in cross_entropy.cu.
//
// R rows of C classes, s bytes a logit. A row is 16-byte slots, counted from its first aligned address, and the few
// elements before and behind them, so that an odd number of classes costs no bandwidth. Its length decides who reads
// it:
//
//   <= 8 KB          1 to 32 lanes of a warp, several rows a block
//   wider            a block
//   wider, few rows  several blocks, each a part; in the forward the last to arrive joins them
//   strided classes  a thread a row, so that neighbours read neighbours: (N, C, d1, ...) needs no copy
//
// Bytes that must move: forward R C s, backward 2 R C s, for class probabilities R C s more each way. Maximum and sums
// are found together, each logit being read once. The forward is one launch: sums over rows are joined in it.
#pragma once

#include "math/cross_entropy.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace fusedtricks::cuda {

inline constexpr int kLossThreads = 256;
inline constexpr int kSlotsAtOnce = 4;  // that a thread has in flight

// ---- arguments ------------------------------------------------------------------------------------------------------

struct LabelColumn {
  const void* data;  // null where there are none
  ScalarType type;

  __device__ __forceinline__ int64_t at(int64_t r) const {
    if (type == ScalarType::Long) return __ldg(static_cast<const int64_t*>(data) + r);
    if (type == ScalarType::Int) return __ldg(static_cast<const int32_t*>(data) + r);
    return __ldg(static_cast<const uint8_t*>(data) + r);
  }
};

template <class T>
struct LossArguments {
  using A = Acc<T>;
  const T* x;
  const void* t;  // class probabilities, of T or of A where `wide`
  bool wide;
  LabelColumn a, b;
  const A* lam;  // null: 1
  bool one_lam;
  const A* weight;
  LossOptions<A> o;
  RowMap<4> rows;  // y, x, index, t
  int64_t R, C, x_step, y_step, t_step;
  int lanes;              // threads a row
  int64_t parts, length;  // blocks that share a row, and the slots of each

  __device__ __forceinline__ void set_target(RowTarget<A>& target, int64_t r, A weight_sum) const {
    const int64_t first = a.at(r);
    const A m = lam ? __ldg(lam + (one_lam ? 0 : r)) : A(1);
    set_row_target(target, first, b.data ? b.at(r) : first, m, weight, weight_sum, C, o);
  }
};

// That of a row of class probabilities, but for q.
template <class A>
__device__ __forceinline__ RowTarget<A> soft_target(const LossOptions<A>& o) {
  RowTarget<A> t{};
  t.off = t.mass = 1;
  t.z = o.z_loss;
  return t;
}

template <class A>
struct Exp {
  // exp2 of the hardware: what its argument loses in rounding is at most |d| eps of exp(d), less than eps of the sum.
  __device__ __forceinline__ float operator()(float d) const {
    const float power = d * 1.4426950408889634f;
#ifdef __CUDA_ARCH__
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(power));
    return e;
#else
    return exp2f(power);
#endif
  }
  __device__ __forceinline__ double operator()(double d) const { return exp(d); }
};

template <class A>
struct Tanh {
  __device__ __forceinline__ A operator()(A v) const { return tanh(v); }
};

// ---- a row ----------------------------------------------------------------------------------------------------------

// `N` values of P with the stride `step`, in accesses as wide as the address allows.
template <int N, class P>
__device__ __forceinline__ void load_values(const P* from, int64_t step, P (&to)[N]) {
  constexpr int kBytes = N * static_cast<int>(sizeof(P)) < kVectorBytes ? N * sizeof(P) : kVectorBytes;
  if (step == 1 && reinterpret_cast<uintptr_t>(from) % kBytes == 0) return load<N, Cache::kStream>(from, to);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = __ldcs(from + i * step);
}

template <int N, class P>
__device__ __forceinline__ void store_values(const P (&from)[N], P* to, int64_t step) {
  if (step == 1 && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) return store<N, Cache::kStream>(from, to);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i * step] = from[i];
}

template <class T, bool Plain, bool Soft>
struct Row {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;
  const LossArguments<T>& a;
  const T* x;
  int64_t t, head, slots;

  __device__ __forceinline__ Row(const LossArguments<T>& arguments, typename RowMap<4>::Place at)
      : a(arguments), x(a.x + a.rows.offset(1, at)), t(a.rows.offset(3, at)), head(0) {
    if (a.x_step == 1) {
      const int64_t before = (kVectorBytes - reinterpret_cast<uintptr_t>(x) % kVectorBytes) % kVectorBytes / sizeof(T);
      head = before < a.C ? before : a.C;
    }
    slots = (a.C - head) / L;
  }

  // The class at which slot s begins, and that of the e-th element outside slots.
  __device__ __forceinline__ int64_t slot(int64_t s) const { return head + s * L; }
  __device__ __forceinline__ int64_t extra(int64_t e) const { return e < head ? e : e + slots * L; }
  __device__ __forceinline__ int64_t extras() const { return a.C - slots * L; }

  template <int N>
  __device__ __forceinline__ void logits(int64_t c, T (&to)[N]) const {
    load_values<N>(x + c * a.x_step, a.x_step, to);
  }

  __device__ __forceinline__ A scaled(A v) const {
    if constexpr (Plain) return v;
    return scaled_logit(v, a.o.softcap, a.o.scale, Tanh<A>());
  }

  // Of classes c to c + N: weights, or the q of class probabilities.
  template <int N>
  __device__ __forceinline__ void coefficients(int64_t c, A (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = A(1);
    if constexpr (Plain) return;
    if (a.weight) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = __ldg(a.weight + c + i);
    }
    if constexpr (Soft) {
      auto read = [&](const auto* p) {
        alignas(kVectorBytes) std::remove_cvref_t<decltype(*p)> value[N];
        load_values<N>(p + t + c * a.t_step, a.t_step, value);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = soft_coefficient<A>(widen(value[i]), to[i], a.o);
      };
      a.wide ? read(static_cast<const A*>(a.t)) : read(static_cast<const T*>(a.t));
    }
  }
};

// The part of the rows that a block has, and the row of a thread.
struct Part {
  int64_t tile, part, r;
  bool live;

  template <class T>
  __device__ __forceinline__ explicit Part(const LossArguments<T>& a)
      : tile(blockIdx.x / a.parts),
        part(blockIdx.x % a.parts),
        r(tile * (blockDim.x / a.lanes) + threadIdx.x / a.lanes),
        live(r < a.R) {}
};

// ---- forward --------------------------------------------------------------------------------------------------------

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

  alignas(kVectorBytes) Sums<A, 2> sum{};  // of the losses and masses of the rows
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
  Group block(blockDim.x);
  sum = block.sum(sum);
  if (threadIdx.x == 0) store<2, Cache::kKeep>(sum.at, a.sums + 2 * here.tile);
  unsigned* counters = a.counters + (a.parts > 1 ? a.tiles : 0);
  join_blocks(counters, static_cast<int>(a.tiles), static_cast<int>(here.tile),
              [&](int64_t place, int64_t step, int members, bool root) {
                if (threadIdx.x != 0) return;
                alignas(kVectorBytes) Sums<A, 2> all{};
                for (int m = 0; m < members; ++m) {
                  alignas(kVectorBytes) Sums<A, 2> one;
                  load<2, Cache::kShared>(a.sums + 2 * (place + m * step), one.at);
                  all = all + one;
                }
                if (!root) return store<2, Cache::kKeep>(all.at, a.sums + 2 * place);
                *a.total = all.at[1];
                if (a.reduction != 0) *a.loss = a.reduction == 1 ? all.at[0] / all.at[1] : all.at[0];
              });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct LossBackward : LossArguments<T> {
  using A = Acc<T>;
  T* y;
  const A *dloss, *dlse, *stats, *total;  // dlse null: none
  bool one_dloss, mean;
};

// dx = slope.softmax softmax - g q, times dz / dx. x and y may be one memory.
template <class T, int Width, bool Plain, bool Soft>
__global__ void __launch_bounds__(kLossThreads, 1) row_gradients(const LossBackward<T> a) {
  using A = Acc<T>;
  static_assert(Width == kLanes<T>);
  const Part here(a);
  if (!here.live) return;
  const auto at = a.rows.place(here.r);
  const int64_t index = a.rows.offset(2, at);
  const Row<T, Plain, Soft> row(a, at);
  T* y = a.y + a.rows.offset(0, at);
  const A top = __ldg(a.stats + index), sum = __ldg(a.stats + a.R + index);
  RowTarget<A> target = soft_target(a.o);
  if constexpr (!Soft) a.set_target(target, index, A(0));
  target.q = __ldg(a.stats + 2 * a.R + index);
  A g = __ldg(a.dloss + (a.one_dloss ? 0 : index));
  if (a.mean) g /= __ldg(a.total);
  const A lse = target.z != A(0) ? top + static_cast<A>(log(sum)) : A(0);
  const auto slope = row_slope(target, g, a.dlse != nullptr, a.dlse ? __ldg(a.dlse + index) : A(0), lse);
  const A k = slope.softmax / sum, off = Soft ? slope.g : slope.g * target.off;
  const A at_a = slope.g * target.at_a, at_b = slope.g * target.at_b;

  // Of classes c to c + N, whose logits are x.
  auto differentiate = [&]<int N>(int64_t c, const T(&x)[N], A(&value)[N]) {
    A q[N];
    row.coefficients(c, q);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = k * Exp<A>()(row.scaled(widen(x[i])) - top) - off * q[i];
    }
    auto subtract = [&](int64_t label, A much) {
      if (static_cast<uint64_t>(label - c) >= N) return;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (label == c + i) value[i] -= much;
      }
    };
    if constexpr (!Soft) subtract(target.a, at_a), subtract(target.b, at_b);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (!Plain) value[i] *= scaled_slope<A>(widen(x[i]), a.o.softcap, a.o.scale, Tanh<A>());
      if (slope.zero) value[i] = A(0);  // whatever the row holds
    }
  };
  const int lane = threadIdx.x % a.lanes;
  const int64_t first = here.part * a.length, last = first + a.length < row.slots ? first + a.length : row.slots;
  for (int64_t s = first + lane; s < last; s += kSlotsAtOnce * a.lanes) {
    Vector<T> x[kSlotsAtOnce];
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; ++j) {
      if (s + j * a.lanes < last) row.logits(row.slot(s + j * a.lanes), x[j].at);
    }
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; ++j) {
      if (s + j * a.lanes >= last) continue;
      const int64_t c = row.slot(s + j * a.lanes);
      A value[kLanes<T>];
      differentiate(c, x[j].at, value);
      Vector<T> out;
      narrow(value, out);
      store_values(out.at, y + c * a.y_step, a.y_step);
    }
  }
  for (int64_t e = lane; here.part == 0 && e < row.extras(); e += a.lanes) {
    const int64_t c = row.extra(e);
    T x[1];
    A value[1];
    row.logits(c, x);
    differentiate(c, x, value);
    y[c * a.y_step] = narrow<T>(value[0]);
  }
}

}  // namespace fusedtricks::cuda
