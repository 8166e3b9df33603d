// Cross-entropy on CUDA devices: what forward and backward share. Their kernels are in the two files named after them,
// launchers and operators in cross_entropy.cu.
//
// R rows of C classes, s bytes a logit. A row is 16-byte slots, counted from its first aligned address, and the few
// elements before and behind them, so that an odd number of classes costs no bandwidth. Who reads it:
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
  const void* t;  // class probabilities, or the logits of another model; of T or of A where `wide`
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

  // Is c a class, and in the part `here`?
  __device__ __forceinline__ bool holds(const Part& here, int64_t c) const {
    if (c < 0 || c >= a.C) return false;
    const int64_t s = (c - head) / L;
    return c < head || s >= slots ? here.part == 0 : s / a.length == here.part;
  }

  // f.operator()<K, N>(class_of): runs of N classes of the part `here` for a thread to take at once, of which the k-th,
  // k < K, begins at class_of(k), or is none where that is negative. AtOnce slots, and single classes outside of slots,
  // which go with the first part.
  template <int AtOnce, class F>
  __device__ __forceinline__ void each_run(const Part& here, int lane, const F& f) const {
    const int64_t first = here.part * a.length, last = first + a.length < slots ? first + a.length : slots;
    for (int64_t s = first + lane; s < last; s += AtOnce * a.lanes) {
      f.template operator()<AtOnce, L>(
          [&](int k) { return s + k * a.lanes < last ? slot(s + k * a.lanes) : int64_t{-1}; });
    }
    for (int64_t e = lane; here.part == 0 && e < extras(); e += a.lanes) {
      f.template operator()<1, 1>([&](int) { return extra(e); });
    }
  }

  template <int N>
  __device__ __forceinline__ void logits(int64_t c, T (&to)[N]) const {
    load_values<N>(x + c * a.x_step, a.x_step, to);
  }

  // Class probabilities, or the logits of another model.
  template <int N, class P>
  __device__ __forceinline__ void beside(int64_t c, P (&to)[N]) const {
    load_values<N>(static_cast<const P*>(a.t) + t + c * a.t_step, a.t_step, to);
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
    if (a.weight && (Soft || a.o.off != A(0))) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = __ldg(a.weight + c + i);
    }
    if constexpr (Soft) {
      auto read = [&]<class P>() {
        alignas(kVectorBytes) P value[N];
        beside(c, value);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = soft_coefficient<A>(widen(value[i]), to[i], a.o);
      };
      a.wide ? read.template operator()<A>() : read.template operator()<T>();
    }
  }
};

// ---- results --------------------------------------------------------------------------------------------------------

// What a label among the classes c to c + N takes away.
template <int N, class A>
__device__ __forceinline__ void subtract_at(int64_t label, A much, int64_t c, A (&value)[N]) {
  if (static_cast<uint64_t>(label - c) >= N) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (label == c + i) value[i] -= much;
  }
}

// A run of a gradient: a slot, or a single class.
template <class T, int N, class A>
__device__ __forceinline__ void store_gradient(const A (&value)[N], T* to, int64_t step) {
  if constexpr (N == 1) {
    *to = narrow<T>(value[0]);
  } else {
    Vector<T> out;
    narrow(value, out);
    store_values(out.at, to, step);
  }
}

// `sum` of all threads of a launch of `tiles` blocks, of which this is `tile`: finish(all) runs in one thread. `sums`
// is (tiles, N), and every counter was zero.
template <class A, int N, class Finish>
__device__ __forceinline__ void sum_blocks(Sums<A, N> sum, A* sums, unsigned* counters, int64_t tiles, int64_t tile,
                                           const Finish& finish) {
  Group block(blockDim.x);
  alignas(kVectorBytes) const Sums<A, N> mine = block.sum(sum);
  if (threadIdx.x == 0) store<N, Cache::kKeep>(mine.at, sums + N * tile);
  join_blocks(counters, static_cast<int>(tiles), static_cast<int>(tile),
              [&](int64_t place, int64_t step, int members, bool root) {
                if (threadIdx.x != 0) return;
                alignas(kVectorBytes) Sums<A, N> all{};
                for (int m = 0; m < members; ++m) {
                  alignas(kVectorBytes) Sums<A, N> one;
                  load<N, Cache::kShared>(sums + N * (place + m * step), one.at);
                  all = all + one;
                }
                root ? finish(all) : store<N, Cache::kKeep>(all.at, sums + N * place);
              });
}

}  // namespace fusedtricks::cuda
