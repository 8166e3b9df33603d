// Backward of layer and RMS normalization: regimes and bytes are in row_norm.cuh.
#pragma once

#include "row_norm.cuh"

namespace fusedtricks::cuda {

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  using A = Acc<T>;
  const T *dy, *x;
  T* dx;  // null where it is not wanted
  const A* stats;
  Parameter weight;
  RowMap<4> rows;  // dx, x, dy, stats
  int64_t R, C;
  int lanes;
  int64_t strips;
  int row_blocks;  // blocks that share a strip
  A* projections;  // (R, strips, 2), then (R, 2): mean(g) and mean(g x^); null where blocks find those of their rows
  A* sums;         // (row_blocks, parts, C); null where neither dweight nor dbias is wanted
  unsigned* counters;
  int64_t counters_per_strip;
  void *dweight, *dbias;  // null where not wanted
  ScalarType parameter_dtype;
};

// What a thread holds of a row.
template <bool Center, class T, int N>
struct RowPair {
  using A = Acc<T>;
  InRegisters<T, N> dy, x;
  Normalize<A> n;

  template <Cache cache, int Width>
  __device__ __forceinline__ void load(const Backward<T>& a, int64_t r, int64_t first, const Columns<Width>& columns) {
    const auto at = a.rows.place(r < a.R ? r : 0);
    const Columns<Width> live{r < a.R ? columns.count : 0, columns.lanes, columns.lane};
    dy.template load<cache>(a.dy + a.rows.offset(2, at) + first, live);
    x.template load<cache>(a.x + a.rows.offset(1, at) + first, live);
    n = load_stats<Center>(a.stats, a.R, a.rows.offset(3, at));
  }

  __device__ __forceinline__ A grad(int k, int i) const { return widen(dy.v[k].at[i]); }

  __device__ __forceinline__ A normalized(int k, int i) const {
    const A xi = widen(x.v[k].at[i]);
    if constexpr (Center) return n(xi);
    return xi * n.rstd;
  }

  // Sums of g and g x^; outside the row dy is 0, and so is g.
  template <class Weight>
  __device__ __forceinline__ Sums<A, 2> project(const Weight& weight) const {
    Sums<A, 2> sum{};
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A w[kLanes<T>];
      weight(k, w);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        const A g = grad(k, i) * w[i];
        if constexpr (Center) sum.at[0] += g;
        sum.at[1] += g * normalized(k, i);
      }
    }
    return sum;
  }

  // Vector k of the gradient of x, into `value`, which holds the weights, each element `finish`ed; its terms go to the
  // sums over rows, if they are wanted.
  template <class SumsHere, class Finish>
  __device__ __forceinline__ void gradient(const Backward<T>& a, int k, const Sums<A, 2>& mean, SumsHere& sums,
                                           A (&value)[kLanes<T>], const Finish& finish) const {
    A g[kLanes<T>], product[kLanes<T>];
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const A xhat = normalized(k, i);
      g[i] = grad(k, i);
      product[i] = g[i] * xhat;
      value[i] = finish(i, norm_backward(g[i] * value[i], xhat, n.rstd, mean.at[0], mean.at[1]));
    }
    if (a.sums) {
      sums.add(0, k, product);
      if constexpr (Center) sums.add(1, k, g);
    }
  }
};

// Sums over rows of dy x^ and, with Center, dy: those of the columns of one thread.
template <class A, int Parts, int N, int Lanes>
struct SumsInRegisters {
  A at[Parts][N][Lanes] = {};

  __device__ __forceinline__ void add(int part, int k, const A (&terms)[Lanes]) {
#pragma unroll
    for (int i = 0; i < Lanes; ++i) at[part][k][i] += terms[i];
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
#pragma unroll
      for (int k = 0; k < N; ++k) f(part, k, at[part][k]);
    }
  }
};

template <class A, int Parts, int N, int Lanes>
struct SumsInShared {
  // Vector v of a thread is at v * blockDim.x: neighbouring threads, neighbouring banks.
  Vector<A>* at = dynamic_shared<Vector<A>>() + threadIdx.x;
  static constexpr int kVectors = Lanes / kLanes<A>;

  __device__ __forceinline__ SumsInShared() {
    for (int v = 0; v < Parts * N * kVectors; ++v) at[v * blockDim.x] = {};
  }

  __device__ __forceinline__ void add(int part, int k, const A (&terms)[Lanes]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Vector<A>& to = at[((part * N + k) * kVectors + v) * blockDim.x];
      Vector<A> sum = to;
#pragma unroll
      for (int i = 0; i < kLanes<A>; ++i) sum.at[i] += terms[v * kLanes<A> + i];
      to = sum;
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    for (int part = 0; part < Parts; ++part) {
      for (int k = 0; k < N; ++k) {
        alignas(kVectorBytes) A values[Lanes];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          reinterpret_cast<Vector<A>*>(values)[v] = at[((part * N + k) * kVectors + v) * blockDim.x];
        }
        f(part, k, values);
      }
    }
  }
};

// The rows of a block are dealt to groups of lanes; their sums are added up in the first group.
template <class A, int Parts, int N, int Lanes>
__device__ __forceinline__ void join_groups(SumsInRegisters<A, Parts, N, Lanes>& sums, int lanes) {
  if (lanes == blockDim.x) return;
  A* shared = dynamic_shared<A>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  sums.each([&](int, int, A(&values)[Lanes]) {
#pragma unroll
    for (int i = 0; i < Lanes; ++i) {
      for (int mask = lanes; mask < kWarp; mask *= 2) values[i] += shuffle_xor(values[i], mask);
    }
  });
  for (int turn = 0; turn < blockDim.x / kWarp; ++turn) {
    if (warp == turn && lane < lanes) {
      sums.each([&](int part, int k, A(&values)[Lanes]) {
#pragma unroll
        for (int i = 0; i < Lanes; ++i) {
          A& to = shared[((part * N + k) * Lanes + i) * lanes + lane];
          values[i] = to = turn ? to + values[i] : values[i];
        }
      });
    }
    __syncthreads();
  }
  if (threadIdx.x < lanes) {
    sums.each([&](int part, int k, A(&values)[Lanes]) {
#pragma unroll
      for (int i = 0; i < Lanes; ++i) values[i] = shared[((part * N + k) * Lanes + i) * lanes + lane];
    });
  }
}

// dweight and dbias of the columns of a strip: the block's sums go to its row of a.sums, and the rows are joined.
template <int Parts, class T, int Width, class SumsHere>
__device__ __forceinline__ void write_parameter_gradients(const Backward<T>& a, SumsHere& sums,
                                                          const Columns<Width>& columns, int64_t first, int64_t s,
                                                          int block) {
  using A = Acc<T>;
  A* strip = a.sums + first;
  if (threadIdx.x < a.lanes) {
    sums.each([&](int part, int k, const A(&values)[kLanes<T>]) {
      columns.template store<T, Cache::kShared>(values, k, strip + (static_cast<int64_t>(block) * Parts + part) * a.C);
    });
  }
  constexpr int kWidth = Width < kLanes<A> ? Width : kLanes<A>;
  const auto fold = [&](int64_t row, int64_t step, int members, bool root) {
    for (int part = 0; part < Parts; ++part) {
      void* out = part ? a.dbias : a.dweight;
      for (int j = threadIdx.x * kWidth; j < columns.count; j += blockDim.x * kWidth) {
        A* at = strip + (row * Parts + part) * a.C + j;
        alignas(kVectorBytes) A terms[kFan][kWidth] = {};
#pragma unroll
        for (int m = 0; m < kFan; ++m) {
          if (m < members) load<kWidth, Cache::kShared>(at + m * step * Parts * a.C, terms[m]);
        }
#pragma unroll
        for (int m = 1; m < kFan; ++m) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) terms[0][i] += terms[m][i];
        }
        if (!root) {
          store<kWidth, Cache::kShared>(terms[0], at);
        } else if (out) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) store_as(a.parameter_dtype, out, first + j + i, terms[0][i]);
        }
      }
    }
  };
  join_blocks(a.counters + s * a.counters_per_strip, a.row_blocks, block, fold);
}

// Persistent blocks, each over its share of the rows and one strip of the columns (the only one but for wide rows). The
// next row is on its way while one is computed.
template <bool Center, class T, int Width, int N, bool kSumsInShared>
__global__ void __launch_bounds__(kSumsInShared ? kBackwardThreadsInShared : kBackwardThreads<T, Width>, 1)
    backward_rows(const Backward<T> a) {
  using A = Acc<T>;
  constexpr int kParts = Center ? 2 : 1;
  Group group(a.lanes);
  const int block = static_cast<int>(blockIdx.x % a.row_blocks);
  const Strip<T> strip(blockIdx.x / a.row_blocks, a.strips, a.C, N);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  const A inverse_count = A(1) / static_cast<A>(a.C);
  auto weight = [&](int k, A(&w)[kLanes<T>]) { load_parameter<T>(a.weight, strip.first, columns, k, A(1), w); };
  std::conditional_t<kSumsInShared, SumsInShared<A, kParts, N, kLanes<T>>, SumsInRegisters<A, kParts, N, kLanes<T>>>
      sums;

  const int rows_at_once = blockDim.x / a.lanes;
  const int64_t step = static_cast<int64_t>(a.row_blocks) * rows_at_once;
  int64_t r = static_cast<int64_t>(block) * rows_at_once + threadIdx.x / a.lanes;
  RowPair<Center, T, N> row, next;
  row.template load<Cache::kStream>(a, r, strip.first, columns);
  for (int64_t base = static_cast<int64_t>(block) * rows_at_once; base < a.R; base += step, r += step, row = next) {
    next.template load<Cache::kStream>(a, r + step, strip.first, columns);
    Sums<A, 2> mean{};
    if (a.dx && a.projections) {
      const A* of_row = a.projections + (a.R * a.strips + r) * 2;
      mean = {__ldg(of_row), __ldg(of_row + 1)};
    } else if (a.dx) {
      mean = group.sum(row.project(weight));
      mean = {mean.at[0] * inverse_count, mean.at[1] * inverse_count};
    }
    T* dx = a.dx + (a.dx && r < a.R ? a.rows.offset(0, a.rows.place(r)) + strip.first : 0);
    const Columns<Width> written{a.dx && r < a.R ? strip.count : 0, a.lanes, group.rank};
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A value[kLanes<T>];
      weight(k, value);
      row.gradient(a, k, mean, sums, value, [](int, A gradient) { return gradient; });
      Vector<T> out;
      narrow(value, out);
      written.template store<T, Cache::kStream>(out.at, k, dx);
    }
  }
  if (!a.sums) return;
  if constexpr (!kSumsInShared) join_groups(sums, a.lanes);
  write_parameter_gradients<kParts, T>(a, sums, columns, strip.first, blockIdx.x / a.row_blocks, block);
}

// mean(g) and mean(g x^) of a row from those of its strips, of which a block holds one; the last of a row joins them.
template <class T, int Width, class Row>
__device__ __forceinline__ void project_strip(const Backward<T>& a, const Row& row, const Strip<T>& strip,
                                              const Columns<Width>& columns, Group& group) {
  using A = Acc<T>;
  Sums<A, 2> sum = group.sum(
      row.project([&](int k, A(&w)[kLanes<T>]) { load_parameter<T>(a.weight, strip.first, columns, k, A(1), w); }));
  auto* of_row = reinterpret_cast<Sums<A, 2>*>(a.projections) + strip.r * a.strips;
  if (threadIdx.x == 0) of_row[strip.s] = sum;
  if (!arrives_last(a.counters + strip.r, static_cast<unsigned>(a.strips))) return;
  sum = {};
  for (int64_t s = threadIdx.x; s < a.strips; s += blockDim.x) {
    alignas(kVectorBytes) Sums<A, 2> part;
    load<2, Cache::kShared>(of_row[s].at, part.at);
    sum = sum + part;
  }
  sum = group.sum(sum);
  const A inverse_count = A(1) / static_cast<A>(a.C);
  auto* mean = a.projections + (a.R * a.strips + strip.r) * 2;
  if (threadIdx.x < 2) mean[threadIdx.x] = (threadIdx.x ? sum.at[1] : sum.at[0]) * inverse_count;
}

// First launch of two for wide rows.
template <bool Center, class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) project_strips(const Backward<T> a) {
  Group group(blockDim.x);
  const Strip<T> strip(blockIdx.x, a.strips, a.C, kBackwardVectors);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  RowPair<Center, T, kBackwardVectors> row;
  row.template load<Cache::kKeep>(a, strip.r, strip.first, columns);
  project_strip(a, row, strip, columns, group);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// Scratch memory of a call whose lanes and strips are known: it and the blocks that share a strip are entered in `a`.
//
// The counters are set to zero by a memset of their own. Counters that lived longer could meet a second stream, or the
// replay of a graph that recorded them.
template <int Parts, class T, class A = Acc<T>>
struct Scratch {
  Tensor counters, sums, projections;

  Scratch(const Device& device, Backward<T>& a, int block, bool project, const Tensor& like) {
    // As many blocks as are resident when each thread has 128 registers.
    const int64_t resident = device.processors() * std::max(512 / block, 1);
    const int64_t most = std::max<int64_t>(resident / a.strips, 1);
    a.row_blocks = static_cast<int>(std::min(ceil_div(a.R, block / a.lanes), most));
    a.counters_per_strip = fan_counters(a.row_blocks);
    const bool parameters = a.dweight || a.dbias;
    counters = empty({(project ? a.R : 0) + a.strips * a.counters_per_strip}, ScalarType::Int, like);
    a.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
    if (parameters || project) device.zero(a.counters, counters.numel() * sizeof(unsigned));
    if (parameters) {
      sums = empty({a.row_blocks, Parts, a.C}, scalar_type<A>, like);
      a.sums = static_cast<A*>(sums.mutable_data_ptr());
    }
    if (project) {
      projections = empty({a.R * (a.strips + 1), 2}, scalar_type<A>, like);
      a.projections = static_cast<A*>(projections.mutable_data_ptr());
    }
  }
};

template <bool Center, class T, int Width, class A = Acc<T>>
void launch_backward(const Device& device, Backward<T> a, const Tensor& x) {
  constexpr int kParts = Center ? 2 : 1, kVectors = kBackwardVectors, kVectorsInShared = kBackwardVectorsInShared;
  const int threads = std::min(device.threads_per_block(), kBackwardThreads<T, Width>);
  const int64_t lanes = lanes_for<T>(a.C, kVectors), lanes_in_shared = lanes_for<T>(a.C, kVectorsInShared);
  const int64_t sums_in_shared = lanes_in_shared * kVectorsInShared * kLanes<T> * kParts * int64_t{sizeof(A)};
  const bool in_registers = lanes <= threads;
  const bool in_shared = !in_registers && kSumsFitInShared<T, Width> &&
                         lanes_in_shared <= std::min(threads, kBackwardThreadsInShared) &&
                         sums_in_shared <= device.shared_per_block() - kStaticShared;
  const bool whole = in_registers || in_shared;

  a.lanes = static_cast<int>(in_registers ? lanes : in_shared ? lanes_in_shared : std::min(threads, kStripThreads));
  a.strips = whole ? 1 : ceil_div(a.C, int64_t{a.lanes} * kVectors * kLanes<T>);
  const int block = in_shared ? a.lanes : block_for(a.lanes, std::min(threads, 256));
  const Scratch<kParts, T> scratch(device, a, block, !whole && a.dx, x);
  if (a.projections) {
    device.launch(project_strips<Center, T, Width>, a.R * a.strips, a.lanes, 0, a);
    a.counters += a.R;
  }
  const int64_t blocks = a.row_blocks * a.strips;
  if constexpr (kSumsFitInShared<T, Width>) {
    if (in_shared) {
      return device.launch(backward_rows<Center, T, Width, kVectorsInShared, true>, blocks, block, sums_in_shared, a);
    }
  }
  const int64_t joined = a.lanes < block ? a.lanes * kVectors * kLanes<T> * kParts * int64_t{sizeof(A)} : 0;
  device.launch(backward_rows<Center, T, Width, kVectors, false>, blocks, block, joined, a);
}

template <bool Center>
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, const Tensor& grad, const Tensor& input,
                                            const MaybeTensor& weight, const Tensor& stats, int64_t dims, bool need_dx,
                                            bool need_dweight, bool need_dbias) {
  const auto shape = check_rows(op, input, weight, std::nullopt, dims);
  check_gradient(op, grad, input, stats, (Center ? 3 : 1) * shape.rows);
  const Device device(input);
  const auto parameter_dtype = weight ? weight->scalar_type() : stats.scalar_type();
  auto parameter = [&](bool need) {
    const auto sizes = input.sizes();
    return need ? empty(Sizes(sizes.data() + input.dim() - dims, dims), parameter_dtype, input)
                : empty({0}, parameter_dtype, input);
  };
  auto dx = need_dx ? fusedtricks::empty_like(input) : empty({0}, input.scalar_type(), input);
  auto dweight = parameter(need_dweight), dbias = parameter(need_dbias);
  if (shape.rows == 0 || shape.columns == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  if (!need_dx && !need_dweight && !need_dbias) return {dx, dweight, dbias};

  auto run = [&](const Tensor& dy, const Tensor& x, const Tensor& out) {
    const auto leading = row_major(input, dims);
    const auto rows = map_rows(collapse_rows<4>(x.dim() - dims, x.sizes().data(),
                                                {need_dx ? out.strides().data() : x.strides().data(),
                                                 x.strides().data(), dy.strides().data(), leading.data()}));
    if (!rows) return false;
    dispatch(op, x.scalar_type(), [&]<class T>() {
      const KernelParameter<T> w(need_dx ? weight : MaybeTensor());
      Backward<T> a{};
      a.dy = static_cast<const T*>(dy.const_data_ptr());
      a.x = static_cast<const T*>(x.const_data_ptr());
      a.dx = need_dx ? static_cast<T*>(out.mutable_data_ptr()) : nullptr;
      a.stats = static_cast<const Acc<T>*>(stats.const_data_ptr());
      a.weight = w;
      a.rows = *rows;
      a.R = shape.rows;
      a.C = shape.columns;
      a.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
      a.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
      a.parameter_dtype = parameter_dtype;
      with_width<T>(access_width<T>(a.C, a.rows, {a.dx, a.x, a.dy}),
                    [&]<int Width>() { launch_backward<Center, T, Width>(device, a, x); });
    });
    return true;
  };
  const auto dy = with_unit_columns(grad, dims);
  if (unit_columns(input, dims) && (!need_dx || unit_columns(dx, dims)) && run(dy, input, dx)) {
    return {dx, dweight, dbias};
  }
  const auto x = torch::stable::contiguous(input);
  const auto out = need_dx ? fusedtricks::empty_like(x) : dx;
  if (!run(dy, x, out)) run(torch::stable::contiguous(grad), x, out);
  if (need_dx) torch::stable::copy_(dx, out);
  return {dx, dweight, dbias};
}

}  // namespace fusedtricks::cuda
