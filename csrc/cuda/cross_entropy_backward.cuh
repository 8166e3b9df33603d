// Backward of cross-entropy: regimes and bytes are in cross_entropy.cuh.
#pragma once

#include "cross_entropy.cuh"

namespace fusedtricks::cuda {

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
    if constexpr (!Soft) subtract_at(target.a, at_a, c, value), subtract_at(target.b, at_b, c, value);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (!Plain) value[i] *= scaled_slope<A>(widen(x[i]), a.o.softcap, a.o.scale, Tanh<A>());
      if (slope.zero) value[i] = A(0);  // whatever the row holds
    }
  };
  row.template each_run<kSlotsAtOnce>(here, threadIdx.x % a.lanes, [&]<int K, int N>(const auto& class_of) {
    alignas(kVectorBytes) T x[K][N];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (class_of(k) >= 0) row.logits(class_of(k), x[k]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = class_of(k);
      if (c < 0) continue;
      A value[N];
      differentiate(c, x[k], value);
      store_gradient(value, y + c * a.y_step, a.y_step);
    }
  });
}

}  // namespace fusedtricks::cuda
