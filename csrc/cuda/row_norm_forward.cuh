// Forward of layer and RMS normalization: regimes and bytes are in row_norm.cuh.
#pragma once

#include "row_norm.cuh"

namespace fusedtricks::cuda {

// ---- statistics -----------------------------------------------------------------------------------------------------

// Of x: the mean is mean + rest, the variance variance / scale^2. Without Center, means are 0.
template <class A>
struct Moments {
  A mean, rest, variance, scale;

  __device__ __forceinline__ Normalize<A> normalize(A eps) const { return {mean, rest, rstd_of(variance, eps, scale)}; }
};

template <bool Center, class T, int Width, class Tile, class A = Acc<T>>
__device__ __forceinline__ Moments<A> measure(const Tile& tile, const Columns<Width>& columns, A inverse_count,
                                              Group& group) {
  A mean = 0;
  if constexpr (Center) {
    Sums<A, 1> sum{};
    tile.each([&](int, const Vector<T>& x) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) sum.at[0] += widen(x.at[i]);
    });
    mean = group.sum(sum).at[0] * inverse_count;
  }
  // Sums of scale d and of its square, d = x - mean.
  auto centred = [&](A scale) {
    Sums<A, 2> sum{};
    tile.each([&](int k, const Vector<T>& x) {
      columns.template each<T>(k, [&](int i) {
        const A d = (widen(x.at[i]) - mean) * scale;
        if constexpr (Center) sum.at[0] += d;
        sum.at[1] += d * d;
      });
    });
    return group.sum(sum);
  };
  A scale = 1;
  auto sums = centred(scale);
  const bool overflow = !isfinite(sums.at[1]);
  // Rows of one warp go together, because the reduction asks for all lanes.
  if (__any_sync(kAllLanes, overflow)) {
    if (overflow) scale = kOverflowScale<A>;
    sums = centred(scale);
  }
  const A rest = sums.at[0] * inverse_count;
  return {mean, rest / scale, variance(sums.at[1], rest, inverse_count), scale};
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  using A = Acc<T>;
  const T* x;
  T* y;
  A* stats;
  Parameter weight, bias;
  RowMap<3> rows;  // y, x, stats
  int64_t R, C;
  A eps;
  int lanes;           // threads a row, or a strip
  int64_t strips;      // of a row
  A* moments;          // (R, strips, 4), for strips
  unsigned* counters;  // (R,), for strips
};

template <bool Center, class T, int Width, class Tile, class A = Acc<T>>
__device__ __forceinline__ void write_normalized(const Forward<T>& a, const Tile& tile, const Columns<Width>& columns,
                                                 const Normalize<A>& normalize, T* y, int64_t first) {
  tile.each([&](int k, const Vector<T>& x) {
    A weight[kLanes<T>], bias[kLanes<T>], value[kLanes<T>];
    load_parameter<T>(a.weight, first, columns, k, A(1), weight);
    if constexpr (Center) load_parameter<T>(a.bias, first, columns, k, A(0), bias);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const A xi = widen(x.at[i]);
      if constexpr (Center) {
        value[i] = normalize(xi) * weight[i] + bias[i];
      } else {
        value[i] = xi * normalize.rstd * weight[i];
      }
    }
    Vector<T> out;
    narrow(value, out);
    columns.template store<T, Cache::kStream>(out.at, k, y);
  });
}

// A row per `lanes` threads. N vectors a thread in registers; N = 0: the row is in shared memory.
template <bool Center, class T, int Width, int N>
__global__ void __launch_bounds__(kForwardThreads<T, Width>, 1) normalize_rows(const Forward<T> a) {
  using A = Acc<T>;
  Group group(a.lanes);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / a.lanes) + threadIdx.x / a.lanes;
  const auto at = a.rows.place(r < a.R ? r : 0);
  const int C = static_cast<int>(a.C);
  // A row past the last has no columns: nothing of it is loaded or stored.
  const Columns<Width> columns{r < a.R ? C : 0, a.lanes, group.rank};
  auto run = [&](auto& tile) {
    tile.template load<Cache::kStream>(a.x + a.rows.offset(1, at), columns);
    const auto n = measure<Center, T>(tile, columns, A(1) / static_cast<A>(C), group).normalize(a.eps);
    if (r < a.R && group.rank == 0) store_stats<Center>(a.stats, a.R, a.rows.offset(2, at), n);
    write_normalized<Center, T>(a, tile, columns, n, a.y + a.rows.offset(0, at), 0);
  };
  if constexpr (N > 0) {
    InRegisters<T, N> tile;
    run(tile);
  } else {
    const int vectors = (C + kLanes<T> * a.lanes - 1) / (kLanes<T> * a.lanes);
    const InShared<T> tile{dynamic_shared<Vector<T>>(), vectors, a.lanes, group.rank};
    run(tile);
  }
}

// Statistics of a row from those of its strips, which are equally long but for the last. Each counts with its share of
// the row, so that no sum is larger than the largest term.
template <bool Center, class T, class A = Acc<T>>
__device__ __forceinline__ Moments<A> join_moments(const Forward<T>& a, const Moments<A>* strips, int64_t length,
                                                   Group& group) {
  const A inverse_count = A(1) / static_cast<A>(a.C);
  auto each = [&](const auto& f) {
    for (int64_t s = threadIdx.x; s < a.strips; s += blockDim.x) {
      alignas(kVectorBytes) Moments<A> m;
      load<4, Cache::kShared>(reinterpret_cast<const A*>(strips + s), reinterpret_cast<A*>(&m));
      f(m, static_cast<A>(s + 1 < a.strips ? length : a.C - s * length) * inverse_count);
    }
  };
  Sums<A, 2> sum{};  // mean; strips whose squares overflow
  each([&](const Moments<A>& m, A share) {
    sum.at[0] += share * m.mean;
    sum.at[1] += m.scale == A(1) ? A(0) : A(1);
  });
  sum = group.sum(sum);
  const A mean = sum.at[0], scale = sum.at[1] == A(0) ? A(1) : kOverflowScale<A>;
  Sums<A, 2> centred{};
  each([&](const Moments<A>& m, A share) {
    const A d = ((m.mean - mean) + m.rest) * scale, rescale = scale / m.scale;
    centred.at[0] += share * d;
    centred.at[1] += share * (m.variance * rescale * rescale + d * d);
  });
  centred = group.sum(centred);
  return {mean, centred.at[0] / scale, variance(centred.at[1], centred.at[0], A(1)), scale};
}

// First launch of two for wide rows: statistics. A block per strip; the last of a row joins them.
template <bool Center, class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) measure_strips(const Forward<T> a) {
  using A = Acc<T>;
  Group group(blockDim.x);
  const Strip<T> strip(blockIdx.x, a.strips, a.C, kForwardVectors);
  const auto at = a.rows.place(strip.r);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  InRegisters<T, kForwardVectors> tile;
  tile.template load<Cache::kKeep>(a.x + a.rows.offset(1, at) + strip.first, columns);
  auto* of_row = reinterpret_cast<Moments<A>*>(a.moments) + strip.r * a.strips;
  const auto moments = measure<Center, T>(tile, columns, A(1) / static_cast<A>(strip.count), group);
  if (threadIdx.x == 0) of_row[strip.s] = moments;
  if (!arrives_last(a.counters + strip.r, static_cast<unsigned>(a.strips))) return;
  const int64_t length = static_cast<int64_t>(blockDim.x) * kForwardVectors * kLanes<T>;
  const auto n = join_moments<Center, T>(a, of_row, length, group).normalize(a.eps);
  if (threadIdx.x == 0) store_stats<Center>(a.stats, a.R, a.rows.offset(2, at), n);
}

// Second launch: normalization, in the opposite order, because the end of x is what L2 still holds.
template <bool Center, class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) normalize_strips(const Forward<T> a) {
  const Strip<T> strip(gridDim.x - 1 - blockIdx.x, a.strips, a.C, kForwardVectors);
  const auto at = a.rows.place(strip.r);
  const Columns<Width> columns{strip.count, a.lanes, static_cast<int>(threadIdx.x)};
  InRegisters<T, kForwardVectors> tile;
  tile.template load<Cache::kStream>(a.x + a.rows.offset(1, at) + strip.first, columns);
  const auto n = load_stats<Center>(a.stats, a.R, a.rows.offset(2, at));
  write_normalized<Center, T>(a, tile, columns, n, a.y + a.rows.offset(0, at) + strip.first, strip.first);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// The two launches of wide rows; `a` is a Forward<T> and what else the kernels take.
template <class T, class Arguments>
void launch_strips(const Device& device, void (*measure)(Arguments), void (*normalize)(Arguments), int threads,
                   Arguments a, const Tensor& x) {
  using A = Acc<T>;
  a.lanes = std::min(threads, kStripThreads);
  a.strips = ceil_div(a.C, int64_t{a.lanes} * kForwardVectors * kLanes<T>);
  const Tensor moments = empty({a.R, a.strips, 4}, scalar_type<A>, x);
  const Tensor counters = empty({a.R}, ScalarType::Int, x);
  a.moments = static_cast<A*>(moments.mutable_data_ptr());
  a.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
  device.zero(a.counters, a.R * sizeof(unsigned));
  device.launch(measure, a.R * a.strips, a.lanes, 0, a);
  device.launch(normalize, a.R * a.strips, a.lanes, 0, a);
}

template <bool Center, class T, int Width, class A = Acc<T>>
void launch_forward(const Device& device, Forward<T> a, const Tensor& x) {
  const int threads = std::min(device.threads_per_block(), kForwardThreads<T, Width>);
  const int64_t lanes = lanes_for<T>(a.C, kForwardVectors);
  if (lanes <= threads) {
    a.lanes = static_cast<int>(lanes);
    const int block = block_for(a.lanes, std::min(threads, 128));
    const int64_t blocks = ceil_div(a.R, block / a.lanes);
    return device.launch(normalize_rows<Center, T, Width, kForwardVectors>, blocks, block, 0, a);
  }
  const int64_t bytes = ceil_div(ceil_div(a.C, kLanes<T>), threads) * threads * kVectorBytes;
  if (bytes <= device.shared_per_block() - kStaticShared) {
    a.lanes = threads;
    return device.launch(normalize_rows<Center, T, Width, 0>, a.R, threads, bytes, a);
  }
  launch_strips<T>(device, measure_strips<Center, T, Width>, normalize_strips<Center, T, Width>, threads, a, x);
}

template <bool Center>
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& input, const MaybeTensor& weight,
                                   const MaybeTensor& bias, double eps, int64_t dims) {
  const auto shape = check_rows(op, input, weight, bias, dims);
  const Device device(input);
  auto y = fusedtricks::empty_like(input);
  const auto dtype = accumulate_dtype(input.scalar_type());
  auto stats = Center ? empty({3, shape.rows}, dtype, input) : empty({shape.rows}, dtype, input);
  if (shape.rows == 0 || shape.columns == 0) return {y, stats};

  auto run = [&](const Tensor& x, const Tensor& out) {
    const auto leading = row_major(input, dims);
    const auto rows = map_rows(
        collapse_rows<3>(x.dim() - dims, x.sizes().data(), {out.strides().data(), x.strides().data(), leading.data()}));
    if (!rows) return false;
    dispatch(op, x.scalar_type(), [&]<class T>() {
      const KernelParameter<T> w(weight), b(bias);
      Forward<T> a{};
      a.x = static_cast<const T*>(x.const_data_ptr());
      a.y = static_cast<T*>(out.mutable_data_ptr());
      a.stats = static_cast<Acc<T>*>(stats.mutable_data_ptr());
      a.weight = w;
      a.bias = b;
      a.rows = *rows;
      a.R = shape.rows;
      a.C = shape.columns;
      a.eps = static_cast<Acc<T>>(eps);
      with_width<T>(access_width<T>(a.C, a.rows, {a.y, a.x}),
                    [&]<int Width>() { launch_forward<Center, T, Width>(device, a, x); });
    });
    return true;
  };
  // Columns that are strided, and rows on three levels, go through plain copies.
  if (unit_columns(input, dims) && unit_columns(y, dims) && run(input, y)) return {y, stats};
  const auto x = torch::stable::contiguous(input);
  const auto out = fusedtricks::empty_like(x);
  run(x, out);
  torch::stable::copy_(y, out);
  return {y, stats};
}

}  // namespace fusedtricks::cuda
