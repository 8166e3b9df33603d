// Backward of batch normalization: regimes and bytes are in batch_norm.cuh.
#pragma once

#include "batch_norm.cuh"

namespace fusedtricks::cuda {

template <class T>
struct BatchBackward {
  using A = Acc<T>;
  Lines lines;
  const T *dy, *x, *residual;  // residual: null unless z is made of it again
  T *dx, *dresidual;           // null where not wanted
  const unsigned char* bits;   // the signs of z, or null
  const A* stats;
  Parameter weight, bias;
  const A* means;  // (2, C) over the whole batch, of g and g x^; null where dx does not depend on them
  A* parts;        // (2, chunks, columns): sums of g and g x^
  A* sums;         // (2, C): means of g and g x^, where the second launch needs them
  unsigned* counters;
  A slope;
  int activation;
  int64_t samples;
  void *dweight, *dbias;  // null where not wanted
  ScalarType parameter_dtype;
};

template <class A>
__device__ __forceinline__ A activate_backward(int activation, A g, A z, A slope) {
  switch (activation) {
    case kRelu:
      return rectified_gradient(g, z, A(0));
    case kLeakyRelu:
      return rectified_gradient(g, z, g * slope);
    case kSilu:
      return silu_gradient<DeviceMath>(g, z);
    case kGelu:
      return gelu_gradient<DeviceMath>(g, z);
    default:
      return g;
  }
}

// Sums: dweight, dbias, and the means that dx needs. Writes: dx and dresidual. One launch does both where it can.
template <class T, int Width, bool Planes, bool Summing, bool Writing>
__device__ __forceinline__ void walk_backward(const BatchBackward<T>& a) {
  using A = Acc<T>;
  constexpr int K = kColumns<Planes>;
  const Lines& s = a.lines;
  Group group(blockDim.x);
  // What only writes goes the opposite way, because the end of x and dy is what L2 still holds.
  Walk<Planes> walk(s, Summing ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  ChannelValues<Planes, A> values;
  values.template read<T>(s, a.stats, a.weight, a.bias, walk);
  A offset[K] = {}, incline[K] = {};
  if (Writing && a.means) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t c = Planes ? walk.channel : (walk.column + i) % s.C;
      const A rest = a.stats[s.C + c], rstd = a.stats[2 * s.C + c], mean_gx = a.means[s.C + c];
      incline[i] = rstd * mean_gx;
      offset[i] = a.means[c] - rest * incline[i];
    }
  }
  A sums[2][K] = {};
  const bool rectifies = a.activation == kRelu || a.activation == kLeakyRelu;
  for (; walk.at < walk.end; walk.at += walk.step) {
    const auto place = walk.place(s, walk.at);
    if (place.count <= 0) continue;
    constexpr Cache kCache = Writing ? Cache::kStream : Cache::kKeep;
    Bundle<T> dy{}, x{}, residual{};
    load_bundle<Width, kCache>(a.dy + place.element, place.count, dy.at);
    load_bundle<Width, kCache>(a.x + place.element, place.count, x.at);
    if (a.residual) load_bundle<Width, kCache>(a.residual + place.element, place.count, residual.at);
    const unsigned bits = a.bits ? a.bits[place.byte] : 0;
    A dx[kBundle], g[kBundle];
#pragma unroll
    for (int i = 0; i < kBundle; ++i) {
      const int k = Planes ? 0 : i;
      const A xi = widen(x.at[i]);
      g[i] = widen(dy.at[i]);
      if (a.bits && rectifies) {
        const A low = a.activation == kLeakyRelu ? g[i] * a.slope : A(0);
        g[i] = bits >> i & 1 ? g[i] : low;
      } else if (a.activation != kIdentity) {
        A z = values.preactivation(xi, i);
        if (a.residual) z += widen(residual.at[i]);
        g[i] = activate_backward(a.activation, g[i], z, a.slope);
      }
      if (Summing) {
        const bool live = i < place.count;
        sums[0][k] += live ? g[i] : A(0);
        sums[1][k] += live ? g[i] * (xi - values.mean[k]) : A(0);
      }
      if (Writing) {
        dx[i] = ChannelBackward<A>{values.mean[k], values.scale[k], offset[k], incline[k]}(g[i], xi);
        if (!a.means) dx[i] = values.scale[k] * g[i];
      }
    }
    if (Writing) {
      if (a.dx) store_bundle<Width>(dx, place.count, a.dx + place.element);
      if (a.dresidual) store_bundle<Width>(g, place.count, a.dresidual + place.element);
    }
  }
  if constexpr (Summing) {
    join<Planes>(sums, s.tx, group);
    const int64_t columns = s.columns(Planes), kind = s.chunks * columns;
    if (threadIdx.x < (Planes ? 1 : s.tx)) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const int64_t j = Planes ? walk.channel : walk.column + i;
        if (j >= columns) break;
        const int64_t c = Planes ? j : j % s.C;
        const A rest = a.stats[s.C + c], rstd = a.stats[2 * s.C + c];
        A* part = a.parts + walk.chunk * columns + j;
        part[0] = sums[0][i];
        part[kind] = rstd * (sums[1][i] - rest * sums[0][i]);
      }
    }
    int64_t begin, end;
    if (!last_of_group(s, walk, a.counters, begin, end)) return;
    each_channel<Planes>(begin, end, [&](int64_t c) {
      const auto sum = over_chunks<Planes, double, 2>(s, c, group, [&](int64_t q, int64_t j) {
        const A* at = a.parts + q * columns + j;
        return Sums<double, 2>{{static_cast<double>(__ldcg(at)), static_cast<double>(__ldcg(at + kind))}};
      });
      if (Planes && threadIdx.x != 0) return;
      if (a.dbias) store_as(a.parameter_dtype, a.dbias, c, sum.at[0]);
      if (a.dweight) store_as(a.parameter_dtype, a.dweight, c, sum.at[1]);
      if (a.sums) {
        a.sums[c] = static_cast<A>(sum.at[0] / static_cast<double>(a.samples));
        a.sums[s.C + c] = static_cast<A>(sum.at[1] / static_cast<double>(a.samples));
      }
    });
  }
}

template <class T, int Width, bool Planes>
__global__ void __launch_bounds__(kChannelThreads, sizeof(T) == 8 ? 1 : 2) sum_channels(const BatchBackward<T> a) {
  walk_backward<T, Width, Planes, true, false>(a);
}

template <class T, int Width, bool Planes, bool Summing>
__global__ void __launch_bounds__(kChannelThreads, sizeof(T) == 8 || (Summing && !Planes) ? 1 : 2)
    backward_channels(const BatchBackward<T> a) {
  walk_backward<T, Width, Planes, Summing, true>(a);
}

}  // namespace fusedtricks::cuda
