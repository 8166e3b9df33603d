// Forward of batch normalization: regimes and bytes are in batch_norm.cuh.
#pragma once

#include "batch_norm_resident.cuh"

namespace fusedtricks::cuda {

template <class T>
struct BatchForward {
  using A = Acc<T>;
  Lines lines;
  const T *x, *residual;  // residual: null where there is none
  T* y;
  unsigned char* bits;  // null where the signs are not wanted
  A* stats;
  Parameter weight, bias;
  A* parts;  // (4, chunks, columns): shift, sums of d and d^2, unscale, see ShiftedSums
  unsigned* counters;
  A eps, slope, momentum;
  int activation;
  int64_t samples;
  void *running_mean, *running_var;  // null where there are none
  ScalarType mean_dtype, var_dtype;
  int64_t* tracked;
  bool cumulative;
};

template <class A>
__device__ __forceinline__ A activate(int activation, A z, A slope) {
  switch (activation) {
    case kRelu:
      return rectified(z, A(0));
    case kLeakyRelu:
      return rectified(z, z * slope);
    case kSilu:
      return silu<DeviceMath>(z);
    case kGelu:
      return gelu<DeviceMath>(z);
    default:
      return z;
  }
}

// mean, rest, rstd and var of a channel.
template <class T>
__device__ __forceinline__ void store_statistics(const BatchForward<T>& a, int64_t c, double mean, double variance) {
  using A = Acc<T>;
  const int64_t C = a.lines.C;
  const A near = static_cast<A>(mean);
  if (variance < 0) variance = 0;
  a.stats[c] = near;
  a.stats[C + c] = static_cast<A>(mean - near);
  a.stats[2 * C + c] = static_cast<A>(1 / ::sqrt(variance + a.eps));
  a.stats[3 * C + c] = static_cast<A>(variance);
}

// By the thread that stored the statistics.
template <class T>
__device__ __forceinline__ void update_averages(const BatchForward<T>& a, int64_t c) {
  using A = Acc<T>;
  if (!a.running_mean) return;
  const int64_t C = a.lines.C;
  const A mean = a.stats[c] + a.stats[C + c], var = a.stats[3 * C + c];
  const A factor = a.cumulative ? A(1) / static_cast<A>(*a.tracked + 1) : a.momentum;
  const A unbiased = var * (static_cast<A>(a.samples) / static_cast<A>(a.samples > 1 ? a.samples - 1 : 1));
  const A old_mean = load_as<A>(a.mean_dtype, a.running_mean, c), old_var = load_as<A>(a.var_dtype, a.running_var, c);
  store_as(a.mean_dtype, a.running_mean, c, old_mean * (A(1) - factor) + mean * factor);
  store_as(a.var_dtype, a.running_var, c, old_var * (A(1) - factor) + unbiased * factor);
}

// The batch is counted by the launch that measures it, or, where blocks need the counter as it was, by one after it.
template <class T>
__device__ __forceinline__ void count_meanwhile(const BatchForward<T>& a) {
  if (a.tracked && !a.cumulative && blockIdx.x == 0 && threadIdx.x == 0) *a.tracked += 1;
}
template <class T, int Width>
__global__ void __launch_bounds__(1) count_batch(const BatchForward<T> a) {
  *a.tracked += 1;
}

// Sums over the elements that there are (bits of `live`) of d = x - shift, of d^2, and of the squares of what fits
// where those do not: of d scaled by kFit.
template <class A>
inline constexpr A kFit = sizeof(A) == 8 ? A(0x1p-400) : A(0x1p-80);

template <bool Planes, class T, class A, int K = kColumns<Planes>>
__device__ __forceinline__ void add_shifted(const Bundle<T>& x, unsigned live, const A (&shift)[K], A (&sums)[3][K]) {
#pragma unroll
  for (int i = 0; i < kBundle; ++i) {
    const int at = Planes ? 0 : i;
    const A d = live >> i & 1 ? widen(x.at[i]) - shift[at] : A(0), e = d * kFit<A>;
    sums[0][at] += d;
    sums[1][at] += d * d;
    sums[2][at] += e * e;
  }
}
template <class A, int K>
__device__ __forceinline__ ShiftedSums<A> shifted_sums(const A (&shift)[K], const A (&sums)[3][K], int i) {
  const bool over = !(sums[1][i] - sums[1][i] == A(0));
  if (over) return {shift[i], sums[0][i] * kFit<A>, sums[2][i], A(1) / kFit<A>};
  return {shift[i], sums[0][i], sums[1][i], A(1)};
}

template <class T, int Width, bool Planes>
__global__ void __launch_bounds__(kChannelThreads, !Planes && (sizeof(T) == 8 || Width == 1) ? 1 : 2)
    measure_channels(const BatchForward<T> a) {
  using A = Acc<T>;
  constexpr int K = kColumns<Planes>;
  const Lines& s = a.lines;
  Group group(blockDim.x);
  Walk<Planes> walk(s, blockIdx.x);
  count_meanwhile(a);
  A shift[K] = {}, sums[3][K] = {};
  for (bool first = true; first || walk.at < walk.end; first = false) {
    Bundle<T> x[kInFlight<T>] = {};
    int count[kInFlight<T>];
#pragma unroll
    for (int k = 0; k < kInFlight<T>; ++k) {
      const auto place = walk.place(s, walk.at + k * walk.step);
      count[k] = place.count;
      load_bundle<Width, Cache::kKeep>(a.x + place.element, count[k], x[k].at);
    }
    if (first) {  // all threads of the block pass here together
      A sum[2][K] = {};
#pragma unroll
      for (int k = 0; k < kInFlight<T>; ++k) {
#pragma unroll
        for (int i = 0; i < kBundle; ++i) {
          sum[0][Planes ? 0 : i] += widen(x[k].at[i]);
          sum[1][Planes ? 0 : i] += A(i < count[k]);
        }
      }
      join<Planes>(sum, s.tx, group);
#pragma unroll
      for (int i = 0; i < K; ++i) shift[i] = sum[1][i] > A(0) ? sum[0][i] / sum[1][i] : A(0);
    }
#pragma unroll
    for (int k = 0; k < kInFlight<T>; ++k) add_shifted<Planes>(x[k], (1u << count[k]) - 1, shift, sums);
    walk.at += kInFlight<T> * walk.step;
  }
  join<Planes>(sums, s.tx, group);
  const int64_t columns = s.columns(Planes), kind = s.chunks * columns;
  if (threadIdx.x < (Planes ? 1 : s.tx)) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t j = Planes ? walk.channel : walk.column + i;
      if (j >= columns) break;
      const auto of_chunk = shifted_sums(shift, sums, i);
      A* part = a.parts + walk.chunk * columns + j;
      part[0] = of_chunk.shift;
      part[kind] = of_chunk.d;
      part[2 * kind] = of_chunk.d2;
      part[3 * kind] = of_chunk.unscale;
    }
  }
  int64_t begin, end;
  if (!last_of_group(s, walk, a.counters, begin, end)) return;
  const double samples = static_cast<double>(a.samples);
  auto part = [&](int64_t q, int64_t j) {
    const A* at = a.parts + q * columns + j;
    return ShiftedSums<A>{__ldcg(at), __ldcg(at + kind), __ldcg(at + 2 * kind), __ldcg(at + 3 * kind)};
  };
  each_channel<Planes>(begin, end, [&](int64_t c) {
    const auto sum = over_chunks<Planes, double, 1>(s, c, group, [&](int64_t q, int64_t j) {
      return Sums<double, 1>{{part_sum(part(q, j), static_cast<double>(elements<Planes>(s, q, j)))}};
    });
    const double mean = sum.at[0] / samples;
    const auto square = over_chunks<Planes, double, 1>(s, c, group, [&](int64_t q, int64_t j) {
      return Sums<double, 1>{{part_square(part(q, j), static_cast<double>(elements<Planes>(s, q, j)), mean)}};
    });
    if (Planes && threadIdx.x != 0) return;
    store_statistics(a, c, mean, square.at[0] / samples);
    update_averages(a, c);
  });
}

// Statistics that are known.
template <class T, int Width>
__global__ void __launch_bounds__(kChannelThreads)
    take_statistics(const BatchForward<T> a, Parameter mean, Parameter rest, Parameter var) {
  using A = Acc<T>;
  const int64_t C = a.lines.C, c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= C) return;
  const A variance = parameter_at<T>(var, c, A(1));
  a.stats[c] = parameter_at<T>(mean, c, A(0));
  a.stats[C + c] = parameter_at<T>(rest, c, A(0));
  a.stats[2 * C + c] = A(1) / ::sqrt(variance + a.eps);
  a.stats[3 * C + c] = variance;
}

// y of a bundle; the result is the signs of z.
template <bool Planes, class T, class A>
__device__ __forceinline__ unsigned activated(const BatchForward<T>& a, const ChannelValues<Planes, A>& values,
                                              const Bundle<T>& x, const Bundle<T>& residual, unsigned live,
                                              A (&y)[kBundle]) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kBundle; ++i) {
    A z = values.preactivation(widen(x.at[i]), i);
    if (a.residual) z += widen(residual.at[i]);
    bits |= static_cast<unsigned>(!(z <= A(0))) << i;
    y[i] = activate(a.activation, z, a.slope);
  }
  return bits & live;
}

// In the opposite order of the statistics, because the end of x is what L2 still holds.
template <class T, int Width, bool Planes>
__global__ void __launch_bounds__(kChannelThreads, 2) normalize_channels(const BatchForward<T> a) {
  using A = Acc<T>;
  const Lines& s = a.lines;
  Walk<Planes> walk(s, gridDim.x - 1 - blockIdx.x);
  ChannelValues<Planes, A> values;
  values.template read<T>(s, a.stats, a.weight, a.bias, walk.first_column());
  for (; walk.at < walk.end; walk.at += walk.step) {
    const auto place = walk.place(s, walk.at);
    if (place.count <= 0) continue;
    Bundle<T> x{}, residual{};
    load_bundle<Width, Cache::kStream>(a.x + place.element, place.count, x.at);
    if (a.residual) load_bundle<Width, Cache::kStream>(a.residual + place.element, place.count, residual.at);
    A y[kBundle];
    const unsigned bits = activated(a, values, x, residual, (1u << place.count) - 1, y);
    if (a.bits) a.bits[place.byte] = static_cast<unsigned char>(bits);
    store_bundle<Width>(y, place.count, a.y + place.element);
  }
}

// A block per channel, see batch_norm_resident.cuh. With all of x at hand the shift is the mean but for its rounding,
// however the channel begins. Each bundle has sums of its own, as short chains round less.
template <class T, int Width>
__global__ void __launch_bounds__(kResidentThreads<T>, 1) forward_resident(const BatchForward<T> a) {
  using A = Acc<T>;
  const Lines& s = a.lines;
  Group group(blockDim.x);
  const int64_t channel = blockIdx.x;
  const Turns<Width> first(s, channel);
  const Held<T> held(s, 0);
  count_meanwhile(a);
  Sums<A, 1> sum{};
  for (auto turn = first; turn.left();) {
    Bundle<T> x[kInFlight<T>] = {};
    auto put = turn;
#pragma unroll
    for (int k = 0; k < kInFlight<T>; ++k, turn.step()) turn.load(a.x, x[k]);
#pragma unroll
    for (int k = 0; k < kInFlight<T>; ++k, put.step()) {
      A part = 0;
#pragma unroll
      for (int i = 0; i < kBundle; ++i) part += widen(x[k].at[i]);
      sum.at[0] += part;
      if (put.left()) held.put(put.slot, x[k]);
    }
  }
  const A shift[1] = {group.sum(sum).at[0] / static_cast<A>(a.samples)};
  A sums[3][1] = {};
  for (auto turn = first; turn.left(); turn.step()) {
    A part[3][1] = {};
    add_shifted<true>(held.get(turn.slot), turn.live(), shift, part);
#pragma unroll
    for (int n = 0; n < 3; ++n) sums[n][0] += part[n][0];
  }
  join<true>(sums, 1, group);
  if (threadIdx.x == 0) {
    const auto all = shifted_sums(shift, sums, 0);
    const double samples = static_cast<double>(a.samples), mean = part_sum(all, samples) / samples;
    store_statistics(a, channel, mean, part_square(all, samples, mean) / samples);
  }
  __syncthreads();
  if (threadIdx.x == 0) update_averages(a, channel);
  ChannelValues<true, A> values;
  values.template read<T>(s, a.stats, a.weight, a.bias, channel);
  for (auto turn = first; turn.left();) {
    Bundle<T> residual[kInFlight<T>] = {};
    if (a.residual) {
      auto ahead = turn;
#pragma unroll
      for (int k = 0; k < kInFlight<T>; ++k, ahead.step()) ahead.load(a.residual, residual[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight<T>; ++k, turn.step()) {
      if (!turn.left()) break;
      A y[kBundle];
      const unsigned bits = activated(a, values, held.get(turn.slot), residual[k], turn.live(), y);
      if (a.bits) turn.store_bits(bits, a.bits);
      turn.store(y, a.y);
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

struct BatchCall {
  const char* op;
  const Tensor& input;
  const MaybeTensor &residual, &weight, &bias;
  double eps;
  int64_t activation;
  double slope;
  bool need_y, need_mask;
};
using Triple = std::tuple<Tensor, Tensor, Tensor>;

template <class T, bool Planes>
int64_t shared_for(int threads) {
  return Planes ? 0 : int64_t{threads} * kBundle * int64_t{sizeof(Acc<T>)};
}

// measure.operator()<T, Width, Planes>(device, arguments, blocks, threads) leaves the statistics, and where it says so
// the result as well.
template <class Measure>
Triple batch_forward(const BatchCall& call, const Measure& measure) {
  check_batch(call.op, call.input, call.activation);
  check_like(call.op, "residual", call.residual, call.input);
  check_channels(call.op, "weight", call.weight, call.input);
  check_channels(call.op, "bias", call.bias, call.input);
  const Tensor& input = call.input;
  const Device device(input);
  const auto y = fusedtricks::empty_like(input), nothing = empty({0}, input.scalar_type(), input);
  auto stats = empty({4, input.size(1)}, accumulate_dtype(input.scalar_type()), input);
  const Channels shape(y);
  const bool masked = call.need_mask && call.need_y;
  const bool moved = masked && shape.bits_moved() && shape.total() > 0;
  const int64_t rows = moved ? shape.outer * shape.channels : shape.total() ? shape.mask_rows() : 0;
  auto mask = masked ? empty({rows, moved  ? shape.plane_bytes()
                                    : rows ? shape.mask_columns()
                                           : 0},
                             ScalarType::Byte, input)
                     : empty({0}, ScalarType::Byte, input);
  const bool empty_input = shape.total() == 0;
  if (empty_input) torch::stable::zero_(stats);
  const Tensor x = dense(input, y);
  const MaybeTensor residual =
      call.residual && call.need_y ? MaybeTensor(dense(*call.residual, y)) : MaybeTensor(std::nullopt);
  const int threads = std::min(device.threads_per_block(), kChannelThreads);
  dispatch(call.op, input.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const KernelParameter<T> weight(call.weight), bias(call.bias);
    BatchForward<T> a{};
    a.lines = empty_input ? Lines{} : cut(shape, masked, device, threads);
    a.lines.C = shape.channels;
    a.x = static_cast<const T*>(x.const_data_ptr());
    a.residual = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    a.y = static_cast<T*>(y.mutable_data_ptr());
    a.bits = masked ? static_cast<unsigned char*>(mask.mutable_data_ptr()) : nullptr;
    a.stats = static_cast<A*>(stats.mutable_data_ptr());
    a.weight = weight, a.bias = bias;
    a.eps = static_cast<A>(call.eps), a.slope = static_cast<A>(call.slope);
    a.activation = static_cast<int>(call.activation);
    a.samples = shape.outer * shape.inner;
    const int64_t blocks = a.lines.chunks * (shape.planes() ? shape.channels : a.lines.strips);
    if (empty_input) {
      measure.template operator()<T, 1, false>(device, a, 0, threads);
      return;
    }
    with_width<T>(width_of<T>(a.lines, {a.x, a.residual, a.y}), [&]<int Width>() {
      auto run = [&]<bool Planes>() {
        const bool written = measure.template operator()<T, Width, Planes>(device, a, blocks, threads);
        if (call.need_y && !written) device.launch(normalize_channels<T, Width, Planes>, blocks, threads, 0, a);
      };
      shape.planes() ? run.template operator()<true>() : run.template operator()<false>();
    });
  });
  if (moved) mask = moved_bits<true>(shape, mask, device);
  return {call.need_y ? y : nothing, stats, mask};
}

}  // namespace fusedtricks::cuda
