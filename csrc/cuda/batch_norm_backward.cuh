// Backward of batch normalization: regimes and bytes are in batch_norm.cuh.
#pragma once

#include "batch_norm_resident.cuh"

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

// ---- parts of a bundle's way ----------------------------------------------------------------------------------------

template <class T>
struct BackwardBundle {
  Bundle<T> dy{}, x{}, residual{};
  unsigned bits = 0;

  template <int Width, Cache cache>
  __device__ __forceinline__ void read(const BatchBackward<T>& a, const Place& place) {
    load_bundle<Width, cache>(a.dy + place.element, place.count, dy.at);
    load_bundle<Width, cache>(a.x + place.element, place.count, x.at);
    if (a.residual) load_bundle<Width, cache>(a.residual + place.element, place.count, residual.at);
    if (a.bits && place.count > 0) bits = a.bits[place.byte];
  }

  // g_i, the gradient of z.
  template <bool Planes, class A>
  __device__ __forceinline__ A gradient(const BatchBackward<T>& a, const ChannelValues<Planes, A>& values,
                                        int i) const {
    const A g = widen(dy.at[i]);
    if (a.bits && (a.activation == kRelu || a.activation == kLeakyRelu)) {
      const A low = a.activation == kLeakyRelu ? g * a.slope : A(0);
      return bits >> i & 1 ? g : low;
    }
    if (a.activation == kIdentity) return g;
    A z = values.preactivation(widen(x.at[i]), i);
    if (a.residual) z += widen(residual.at[i]);
    return activate_backward(a.activation, g, z, a.slope);
  }
};

// Sums of g and g (x - mean).
template <bool Planes, class A, int K = kColumns<Planes>>
__device__ __forceinline__ void add_gradient(const ChannelValues<Planes, A>& values, int i, A g, A x, A (&sums)[2][K]) {
  const int k = Planes ? 0 : i;
  sums[0][k] += g;
  sums[1][k] += g * (x - values.mean[k]);
}

// The sum of g x^ from these.
template <class T, class A>
__device__ __forceinline__ A project(const BatchBackward<T>& a, int64_t c, A sum_g, A sum_gd) {
  const A rest = a.stats[a.lines.C + c], rstd = a.stats[2 * a.lines.C + c];
  return rstd * (sum_gd - rest * sum_g);
}

// What sums of g and g x^ over a channel are wanted for.
template <class T>
__device__ __forceinline__ void store_sums(const BatchBackward<T>& a, int64_t c, double g, double gx) {
  using A = Acc<T>;
  if (a.dbias) store_as(a.parameter_dtype, a.dbias, c, g);
  if (a.dweight) store_as(a.parameter_dtype, a.dweight, c, gx);
  if (!a.sums) return;
  a.sums[c] = static_cast<A>(g / static_cast<double>(a.samples));
  a.sums[a.lines.C + c] = static_cast<A>(gx / static_cast<double>(a.samples));
}

// offset and slope of ChannelBackward, for the columns of a thread.
template <bool Planes, class A>
struct Corrections {
  static constexpr int K = kColumns<Planes>;
  A offset[K] = {}, incline[K] = {};

  template <class T>
  __device__ __forceinline__ void read(const BatchBackward<T>& a, const A* means, int64_t column) {
    const int64_t C = a.lines.C;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t c = Planes ? column : (column + i) % C;
      const A rest = a.stats[C + c], rstd = a.stats[2 * C + c], mean_gx = means[C + c];
      incline[i] = rstd * mean_gx;
      offset[i] = means[c] - rest * incline[i];
    }
  }
  __device__ __forceinline__ A gradient(const ChannelValues<Planes, A>& values, int i, A g, A x) const {
    const int k = Planes ? 0 : i;
    return ChannelBackward<A>{values.mean[k], values.scale[k], offset[k], incline[k]}(g, x);
  }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

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
  values.template read<T>(s, a.stats, a.weight, a.bias, walk.first_column());
  Corrections<Planes, A> corrections;
  if (Writing && a.means) corrections.read(a, a.means, walk.first_column());
  A sums[2][K] = {};
  for (; walk.at < walk.end; walk.at += walk.step) {
    const auto place = walk.place(s, walk.at);
    if (place.count <= 0) continue;
    BackwardBundle<T> bundle;
    bundle.template read<Width, Writing ? Cache::kStream : Cache::kKeep>(a, place);
    A dx[kBundle], g[kBundle];
#pragma unroll
    for (int i = 0; i < kBundle; ++i) {
      const int k = Planes ? 0 : i;
      const A x = widen(bundle.x.at[i]);
      g[i] = bundle.gradient(a, values, i);
      if (Summing) add_gradient(values, i, i < place.count ? g[i] : A(0), x, sums);
      if (Writing) {
        dx[i] = a.means ? corrections.gradient(values, i, g[i], x) : values.scale[k] * g[i];
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
        A* part = a.parts + walk.chunk * columns + j;
        part[0] = sums[0][i];
        part[kind] = project(a, Planes ? j : j % s.C, sums[0][i], sums[1][i]);
      }
    }
    int64_t begin, end;
    if (!last_of_group(s, walk, a.counters, begin, end)) return;
    each_channel<Planes>(begin, end, [&](int64_t c) {
      const auto sum = over_chunks<Planes, double, 2>(s, c, group, [&](int64_t q, int64_t j) {
        const A* at = a.parts + q * columns + j;
        return Sums<double, 2>{{static_cast<double>(__ldcg(at)), static_cast<double>(__ldcg(at + kind))}};
      });
      if (!Planes || threadIdx.x == 0) store_sums(a, c, sum.at[0], sum.at[1]);
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

// A block per channel, see batch_norm_resident.cuh. It holds x, dy, the residual if z is made of it, and the signs.
template <class T, int Width>
__global__ void __launch_bounds__(kResidentThreads<T>, 1) backward_resident(const BatchBackward<T> a) {
  using A = Acc<T>;
  constexpr int kAtOnce = kInFlight<T> > 1 ? kInFlight<T> / 2 : 1;
  const Lines& s = a.lines;
  Group group(blockDim.x);
  const int64_t channel = blockIdx.x;
  const Turns<Width> first(s, channel);
  const int tensors = a.residual ? 3 : 2;
  const Held<T> held_dy(s, 0), held_x(s, 1), held_residual(s, 2);
  unsigned char* held_bits = reinterpret_cast<unsigned char*>(Held<T>(s, tensors).vectors);
  ChannelValues<true, A> values;
  values.template read<T>(s, a.stats, a.weight, a.bias, channel);
  A sums[2][1] = {};
  for (auto turn = first; turn.left();) {
    BackwardBundle<T> bundle[kAtOnce];
    auto put = turn;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k, turn.step()) {
      turn.load(a.dy, bundle[k].dy);
      turn.load(a.x, bundle[k].x);
      if (a.residual) turn.load(a.residual, bundle[k].residual);
      if (a.bits && turn.left()) bundle[k].bits = turn.load_bits(a.bits);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k, put.step()) {
      if (!put.left()) break;
      const unsigned live = put.live();
      A part[2][1] = {};  // short chains round less
#pragma unroll
      for (int i = 0; i < kBundle; ++i) {
        const A g = live >> i & 1 ? bundle[k].gradient(a, values, i) : A(0);
        add_gradient(values, i, g, widen(bundle[k].x.at[i]), part);
      }
      sums[0][0] += part[0][0];
      sums[1][0] += part[1][0];
      held_dy.put(put.slot, bundle[k].dy);
      held_x.put(put.slot, bundle[k].x);
      if (a.residual) held_residual.put(put.slot, bundle[k].residual);
      if (a.bits) held_bits[put.slot] = static_cast<unsigned char>(bundle[k].bits);
    }
  }
  join<true>(sums, 1, group);
  if (threadIdx.x == 0) store_sums(a, channel, sums[0][0], project(a, channel, sums[0][0], sums[1][0]));
  __syncthreads();
  Corrections<true, A> corrections;
  corrections.read(a, a.sums, channel);
  for (auto turn = first; turn.left(); turn.step()) {
    BackwardBundle<T> bundle;
    bundle.dy = held_dy.get(turn.slot);
    bundle.x = held_x.get(turn.slot);
    if (a.residual) bundle.residual = held_residual.get(turn.slot);
    if (a.bits) bundle.bits = held_bits[turn.slot];
    A dx[kBundle], g[kBundle];
#pragma unroll
    for (int i = 0; i < kBundle; ++i) {
      g[i] = bundle.gradient(a, values, i);
      dx[i] = corrections.gradient(values, i, g[i], widen(bundle.x.at[i]));
    }
    turn.store(dx, a.dx);
    if (a.dresidual) turn.store(g, a.dresidual);
  }
}

}  // namespace fusedtricks::cuda
