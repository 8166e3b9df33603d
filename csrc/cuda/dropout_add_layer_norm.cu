// dropout_add_layer_norm on CUDA devices: the rows of row_norm.cuh, made from dropout(x) + residual just before they
// are measured; and their gradients, dropped as they are stored. Layer and RMS normalization share the kernels:
// `center`.
//
// R rows of C columns, s bytes an element; all tensors but dy are plain.
//
//   forward    <= 32 KB   registers                                                                    4 R C s bytes
//              wider      strips: the sum and its statistics, then normalization; the sum again, from
//                         L2 while it fits                                                             4 or 5 R C s
//   backward   <= 16 KB   registers; sums over rows in registers                                       5 R C s
//              wider      strips: projections, then gradients; dy and the sum again, from L2 while
//                         they fit                                                                     5 or 7 R C s
//
// Of rows that are not aligned to 16 bytes the elements of one random block are spread over threads, which draw the
// blocks of a row together and leave one another a bit of each element in shared memory. Such rows take more registers,
// hence fewer threads: 16 to 32 KB and 8 KB in registers.
#include "math/dropout.h"
#include "math/philox.h"
#include "row_norm_backward.cuh"
#include "row_norm_forward.cuh"

namespace fusedtricks::cuda {

// ---- dropout --------------------------------------------------------------------------------------------------------

inline constexpr int kOfBlock = 8;  // elements that share a random block

template <class A>
struct Dropping {
  const int64_t* seed;  // null: everything is kept
  uint32_t keep;
  A scale;

  // Of elements number `first` on, which share a random block.
  template <int Count>
  __device__ __forceinline__ void operator()(int64_t first, A (&value)[Count]) const {
    if (!seed) return;
    const RandomBlock random(static_cast<uint64_t>(__ldg(seed)), static_cast<uint64_t>(first / kOfBlock));
    const int skip = Count == kOfBlock ? 0 : static_cast<int>(first % kOfBlock);
#pragma unroll
    for (int i = 0; i < Count; ++i) value[i] = dropped(value[i], random.half(skip + i), keep, scale);
  }
};

// The same for the part of a row that a group of threads holds, N vectors each, from element number `first` on. All
// threads of the block, `Threads` at most, make it together.
template <class T, int Width, int N, int Threads, class A = Acc<T>>
struct RowDropping {
  const Dropping<A>& drop;
  const int64_t first;
  const unsigned char* bits = nullptr;  // a byte a random block; bit i is 1 where element i of it is dropped

  __device__ __forceinline__ RowDropping(const Dropping<A>& drop, int64_t first, int count, const Group& group)
      : drop(drop), first(first) {
    if constexpr (Width < kLanes<T>) {
      if (!drop.seed) return;
      constexpr int kElements = N * kLanes<T>;  // of a thread; those of a group touch up to two more blocks
      __shared__ unsigned char shared[Threads * kElements / kOfBlock + Threads * 2];
      unsigned char* own = shared + threadIdx.x / group.size * (group.size * kElements / kOfBlock + 2);
      group.meet();  // the bits of the row before have been read
      for (int block = group.rank; block * kOfBlock < first % kOfBlock + count; block += group.size) {
        const RandomBlock random(static_cast<uint64_t>(__ldg(drop.seed)),
                                 static_cast<uint64_t>(first / kOfBlock + block));
        unsigned byte = 0;
#pragma unroll
        for (int i = 0; i < kOfBlock; ++i) byte |= unsigned{random.half(i) >= drop.keep} << i;
        own[block] = static_cast<unsigned char>(byte);
      }
      group.meet();
      bits = own;
    }
  }

  // Vector k of the thread.
  __device__ __forceinline__ void operator()(const Columns<Width>& columns, int k, A (&value)[kLanes<T>]) const {
    if constexpr (Width < kLanes<T>) {
      if (!drop.seed) return;
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        const int at = static_cast<int>(first % kOfBlock) + columns.template column<T>(k, i);
        value[i] = dropped(value[i], bits[at / kOfBlock] >> at % kOfBlock & 1u, 1u, drop.scale);
      }
    } else {
      drop(first + columns.template column<T>(k, 0), value);
    }
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct SumForward : Forward<T> {  // y, x and stats are plain; of stats there are three numbers a row, or one
  const T* residual;
  T* z;
  Dropping<Acc<T>> drop;
  bool center;
};

template <class T, int Width>
inline constexpr int kSumThreads = Width == kLanes<T> || sizeof(T) > 2 ? 512 : 256;

// z = dropout(x) + residual, rounded, from element number `first` on.
template <int Threads, class T, int Width, int N>
__device__ __forceinline__ void add_residual(const SumForward<T>& a, int64_t first, const Columns<Width>& columns,
                                             const Group& group, InRegisters<T, N>& tile) {
  using A = Acc<T>;
  InRegisters<T, N> residual;
  tile.template load<Cache::kStream>(a.x + first, columns);
  residual.template load<Cache::kStream>(a.residual + first, columns);
  const RowDropping<T, Width, N, Threads> drop(a.drop, first, columns.count, group);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    A value[kLanes<T>];
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) value[i] = widen(tile.v[k].at[i]);
    drop(columns, k, value);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) value[i] += widen(residual.v[k].at[i]);
    narrow(value, tile.v[k]);
    columns.template store<T, Cache::kStream>(tile.v[k].at, k, a.z + first);
  }
}

template <class T, int Width, int N, class A = Acc<T>>
__device__ __forceinline__ Moments<A> measure_sum(const SumForward<T>& a, const InRegisters<T, N>& tile,
                                                  const Columns<Width>& columns, int64_t count, Group& group) {
  const A inverse_count = A(1) / static_cast<A>(count);
  if (a.center) return measure<true, T>(tile, columns, inverse_count, group);
  return measure<false, T>(tile, columns, inverse_count, group);
}

template <class T, class A = Acc<T>>
__device__ __forceinline__ void store_sum_stats(const SumForward<T>& a, int64_t r, const Normalize<A>& n) {
  a.center ? store_stats<true>(a.stats, a.R, r, n) : store_stats<false>(a.stats, a.R, r, n);
}

template <class Sum>
__device__ __forceinline__ auto load_sum_stats(const Sum& a, int64_t r) {
  return a.center ? load_stats<true>(a.stats, a.R, r) : load_stats<false>(a.stats, a.R, r);
}

template <class T, int Width>
__global__ void __launch_bounds__(kSumThreads<T, Width>, 1) normalize_sums(const SumForward<T> a) {
  Group group(a.lanes);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / a.lanes) + threadIdx.x / a.lanes;
  const int64_t first = r < a.R ? r * a.C : 0;
  const Columns<Width> columns{r < a.R ? static_cast<int>(a.C) : 0, a.lanes, group.rank};
  InRegisters<T, kForwardVectors> tile;
  add_residual<kSumThreads<T, Width>>(a, first, columns, group, tile);
  const auto n = measure_sum(a, tile, columns, a.C, group).normalize(a.eps);
  if (r < a.R && group.rank == 0) store_sum_stats(a, r, n);
  write_normalized<true, T>(a, tile, columns, n, a.y + first, 0);
}

// First launch of two for wide rows: the sum and its statistics.
template <class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) add_strips(const SumForward<T> a) {
  using A = Acc<T>;
  constexpr int N = kForwardVectors;
  Group group(blockDim.x);
  const Strip<T> strip(blockIdx.x, a.strips, a.C, N);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  InRegisters<T, N> tile;
  add_residual<kStripThreads>(a, strip.r * a.C + strip.first, columns, group, tile);
  auto* of_row = reinterpret_cast<Moments<A>*>(a.moments) + strip.r * a.strips;
  const auto moments = measure_sum(a, tile, columns, strip.count, group);
  if (threadIdx.x == 0) of_row[strip.s] = moments;
  if (!arrives_last(a.counters + strip.r, static_cast<unsigned>(a.strips))) return;
  const int64_t length = static_cast<int64_t>(blockDim.x) * N * kLanes<T>;
  const auto n = join_moments<true, T>(a, of_row, length, group).normalize(a.eps);
  if (threadIdx.x == 0) store_sum_stats(a, strip.r, n);
}

// Second launch, in the opposite order, because the end of z is what L2 still holds.
template <class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) normalize_sum_strips(const SumForward<T> a) {
  const Strip<T> strip(gridDim.x - 1 - blockIdx.x, a.strips, a.C, kForwardVectors);
  const Columns<Width> columns{strip.count, a.lanes, static_cast<int>(threadIdx.x)};
  const int64_t first = strip.r * a.C + strip.first;
  InRegisters<T, kForwardVectors> tile;
  tile.template load<Cache::kStream>(a.z + first, columns);
  write_normalized<true, T>(a, tile, columns, load_sum_stats(a, strip.r), a.y + first, strip.first);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// x of the base is the sum z, and dx its gradient, that of the residual.
template <class T>
struct SumBackward : Backward<T> {
  const T* dz;  // null where nothing but the norm reads z
  T* dropped;   // gradient of x, null where it is not wanted
  Dropping<Acc<T>> drop;
  bool center;
};

template <class T, int N>
struct SumRow : RowPair<true, T, N> {
  template <int Width>
  __device__ __forceinline__ void load(const SumBackward<T>& a, int64_t r, int64_t first,
                                       const Columns<Width>& columns) {
    const int64_t row = r < a.R ? r : 0;
    const Columns<Width> live{r < a.R ? columns.count : 0, columns.lanes, columns.lane};
    this->dy.template load<Cache::kStream>(a.dy + a.rows.offset(2, a.rows.place(row)) + first, live);
    this->x.template load<Cache::kStream>(a.x + row * a.C + first, live);
    this->n = load_sum_stats(a, row);
  }
};

// First launch of two for wide rows. Without `center`, mean(g) is left out by whoever reads it.
template <class T, int Width>
__global__ void __launch_bounds__(kStripThreads, 1) project_sum_strips(const SumBackward<T> a) {
  Group group(blockDim.x);
  const Strip<T> strip(blockIdx.x, a.strips, a.C, kBackwardVectors);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  SumRow<T, kBackwardVectors> row;
  row.load(a, strip.r, strip.first, columns);
  project_strip(static_cast<const Backward<T>&>(a), row, strip, columns, group);
}

template <class T, int Width>
inline constexpr int kSplitThreads = Width == kLanes<T> ? 512 : 256;

// backward_rows with the gradient that came to z itself added, and the sum stored twice: the second time dropped.
template <class T, int Width>
__global__ void __launch_bounds__(kSplitThreads<T, Width>, 1) split_gradients(const SumBackward<T> a) {
  using A = Acc<T>;
  constexpr int N = kBackwardVectors;
  Group group(a.lanes);
  const int block = static_cast<int>(blockIdx.x % a.row_blocks);
  const Strip<T> strip(blockIdx.x / a.row_blocks, a.strips, a.C, N);
  const Columns<Width> columns{strip.count, a.lanes, group.rank};
  const A inverse_count = A(1) / static_cast<A>(a.C);
  const bool through = a.dx || a.dropped;
  auto weight = [&](int k, A(&w)[kLanes<T>]) { load_parameter<T>(a.weight, strip.first, columns, k, A(1), w); };
  SumsInRegisters<A, 2, N, kLanes<T>> sums;

  const int rows_at_once = blockDim.x / a.lanes;
  const int64_t step = static_cast<int64_t>(a.row_blocks) * rows_at_once;
  int64_t base = static_cast<int64_t>(block) * rows_at_once, r = base + threadIdx.x / a.lanes;
  SumRow<T, N> row, next;
  row.load(a, r, strip.first, columns);
  for (; base < a.R; base += step, r += step, row = next) {
    next.load(a, r + step, strip.first, columns);
    const int64_t first = r * a.C + strip.first;
    const Columns<Width> written{through && r < a.R ? strip.count : 0, a.lanes, group.rank};
    InRegisters<T, N> dz{};
    if (a.dz) dz.template load<Cache::kStream>(a.dz + first, written);
    const RowDropping<T, Width, N, kSplitThreads<T, Width>> drop(a.drop, first, a.dropped ? written.count : 0, group);
    Sums<A, 2> mean{};
    if (through && a.projections) {
      const A* of_row = a.projections + (a.R * a.strips + r) * 2;
      if (r < a.R) mean = {__ldg(of_row), __ldg(of_row + 1)};
    } else if (through) {
      mean = group.sum(row.project(weight));
      mean = {mean.at[0] * inverse_count, mean.at[1] * inverse_count};
    }
    if (!a.center) mean.at[0] = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A value[kLanes<T>];
      weight(k, value);
      row.gradient(a, k, mean, sums, value, [&](int i, A gradient) { return gradient + widen(dz.v[k].at[i]); });
      Vector<T> out;
      narrow(value, out);
      if (a.dx) written.template store<T, Cache::kStream>(out.at, k, a.dx + first);
      if (!a.dropped) continue;
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) value[i] = widen(out.at[i]);
      drop(columns, k, value);
      narrow(value, out);
      written.template store<T, Cache::kStream>(out.at, k, a.dropped + first);
    }
  }
  if (!a.sums) return;
  join_groups(sums, a.lanes);
  write_parameter_gradients<2, T>(a, sums, columns, strip.first, blockIdx.x / a.row_blocks, block);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// f.operator()<Width>() with a whole vector or one element; doubles, which nobody trains in, have the latter alone.
template <class T, int K, class F>
void with_row_width(int64_t C, const RowMap<K>& rows, std::initializer_list<const void*> strided,
                    std::initializer_list<const void*> plain, const F& f) {
  bool aligned = access_width<T>(C, rows, strided) == kLanes<T>;
  for (const void* tensor : plain) aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0;
  if constexpr (sizeof(T) < 8) {
    if (aligned) return f.template operator()<kLanes<T>>();
  }
  f.template operator()<1>();
}

template <class T>
Dropping<Acc<T>> dropping(const MaybeTensor& seed, int64_t keep) {
  return {seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, static_cast<uint32_t>(keep),
          dropout_scale<Acc<T>>(keep)};
}

template <class T, int Width>
void launch_forward(const Device& device, SumForward<T> a, const Tensor& x) {
  const int threads = std::min(device.threads_per_block(), kSumThreads<T, Width>);
  const int64_t lanes = lanes_for<T>(a.C, kForwardVectors);
  if (lanes <= threads) {
    a.lanes = static_cast<int>(lanes);
    const int block = block_for(a.lanes, std::min(threads, 128));
    return device.launch(normalize_sums<T, Width>, ceil_div(a.R, block / a.lanes), block, 0, a);
  }
  launch_strips<T>(device, add_strips<T, Width>, normalize_sum_strips<T, Width>, threads, a, x);
}

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              const MaybeTensor& seed, int64_t keep, double eps,
                                                              int64_t dims, bool center) {
  const char* op = "dropout_add_layer_norm_fwd";
  const auto shape = check_rows(op, x, weight, bias, dims);
  check_plain(op, "x", x, x);
  check_plain(op, "residual", residual, x);
  check_dropping(op, x, seed, keep);
  const Device device(x);
  auto y = fusedtricks::empty_like(x), z = fusedtricks::empty_like(x);
  const auto dtype = accumulate_dtype(x.scalar_type());
  auto stats = center ? empty({3, shape.rows}, dtype, x) : empty({shape.rows}, dtype, x);
  if (shape.rows == 0 || shape.columns == 0) return {y, z, stats};
  dispatch(op, x.scalar_type(), [&]<class T>() {
    const KernelParameter<T> w(weight), b(center ? bias : MaybeTensor());
    SumForward<T> a{};
    a.x = static_cast<const T*>(x.const_data_ptr());
    a.residual = static_cast<const T*>(residual.const_data_ptr());
    a.y = static_cast<T*>(y.mutable_data_ptr());
    a.z = static_cast<T*>(z.mutable_data_ptr());
    a.stats = static_cast<Acc<T>*>(stats.mutable_data_ptr());
    a.weight = w;
    a.bias = b;
    a.R = shape.rows;
    a.C = shape.columns;
    a.rows = {std::numeric_limits<int64_t>::max(), {}, {a.C, a.C, 1}};
    a.eps = static_cast<Acc<T>>(eps);
    a.drop = dropping<T>(seed, keep);
    a.center = center;
    with_row_width<T>(a.C, a.rows, {a.y, a.x}, {a.residual, a.z},
                      [&]<int Width>() { launch_forward<T, Width>(device, a, x); });
  });
  return {y, z, stats};
}

template <class T, int Width, class A = Acc<T>>
void launch_backward(const Device& device, SumBackward<T> a, const Tensor& z) {
  constexpr int N = kBackwardVectors;
  const int threads = std::min(device.threads_per_block(), kSplitThreads<T, Width>);
  const int64_t lanes = lanes_for<T>(a.C, N);
  const bool whole = lanes <= threads, through = a.dx || a.dropped;
  a.lanes = static_cast<int>(whole ? lanes : std::min(threads, kStripThreads));
  a.strips = whole ? 1 : ceil_div(a.C, int64_t{a.lanes} * N * kLanes<T>);
  const int block = block_for(a.lanes, std::min(threads, 256));
  const Scratch<2, T> scratch(device, a, block, !whole && through, z);
  if (a.projections) {
    device.launch(project_sum_strips<T, Width>, a.R * a.strips, a.lanes, 0, a);
    a.counters += a.R;
  }
  const int64_t joined = a.lanes < block ? a.lanes * N * kLanes<T> * 2 * int64_t{sizeof(A)} : 0;
  device.launch(split_gradients<T, Width>, a.row_blocks * a.strips, block, joined, a);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(const Tensor& grad, const MaybeTensor& dz,
                                                                      const Tensor& z, const MaybeTensor& weight,
                                                                      const Tensor& stats, const MaybeTensor& seed,
                                                                      int64_t keep, int64_t dims, bool center,
                                                                      bool need_dx, bool need_dresidual,
                                                                      bool need_dweight, bool need_dbias) {
  const char* op = "dropout_add_layer_norm_bwd";
  const auto shape = check_rows(op, z, weight, std::nullopt, dims);
  check_plain(op, "z", z, z);
  if (dz) check_plain(op, "dz", *dz, z);
  check_dropping(op, z, seed, keep);
  check_gradient(op, grad, z, stats, (center ? 3 : 1) * shape.rows);
  const Device device(z);
  const auto parameter_dtype = weight ? weight->scalar_type() : stats.scalar_type();
  const auto like_z = [&](bool need) { return need ? fusedtricks::empty_like(z) : empty({0}, z.scalar_type(), z); };
  const auto parameter = [&](bool need) {
    return need ? empty(Sizes(z.sizes().data() + z.dim() - dims, dims), parameter_dtype, z)
                : empty({0}, parameter_dtype, z);
  };
  auto dx = like_z(need_dx), dresidual = like_z(need_dresidual);
  auto dweight = parameter(need_dweight), dbias = parameter(need_dbias);
  if (shape.rows == 0 || shape.columns == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dresidual, dweight, dbias};
  }
  if (!need_dx && !need_dresidual && !need_dweight && !need_dbias) return {dx, dresidual, dweight, dbias};

  const auto run = [&](const Tensor& dy) {
    const auto leading = row_major(z, dims);
    const int64_t* plain = z.strides().data();
    const auto rows = map_rows(
        collapse_rows<4>(z.dim() - dims, z.sizes().data(), {plain, plain, dy.strides().data(), leading.data()}));
    if (!rows) return false;
    dispatch(op, z.scalar_type(), [&]<class T>() {
      const KernelParameter<T> w(weight);
      SumBackward<T> a{};
      a.dy = static_cast<const T*>(dy.const_data_ptr());
      a.x = static_cast<const T*>(z.const_data_ptr());
      a.dz = dz ? static_cast<const T*>(dz->const_data_ptr()) : nullptr;
      a.dx = need_dresidual ? static_cast<T*>(dresidual.mutable_data_ptr()) : nullptr;
      a.dropped = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
      a.stats = static_cast<const Acc<T>*>(stats.const_data_ptr());
      a.weight = w;
      a.rows = *rows;
      a.R = shape.rows;
      a.C = shape.columns;
      a.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
      a.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
      a.parameter_dtype = parameter_dtype;
      a.drop = dropping<T>(seed, keep);
      a.center = center;
      with_row_width<T>(a.C, a.rows, {a.dx, a.x, a.dy}, {a.dz, a.dropped},
                        [&]<int Width>() { launch_backward<T, Width>(device, a, z); });
    });
    return true;
  };
  // A gradient of rows on three levels goes through a plain copy.
  if (!run(with_unit_columns(grad, dims))) run(torch::stable::contiguous(grad));
  return {dx, dresidual, dweight, dbias};
}

FT_KERNEL(dropout_add_layer_norm_fwd, "cuda", dropout_add_layer_norm_fwd);
FT_KERNEL(dropout_add_layer_norm_bwd, "cuda", dropout_add_layer_norm_bwd);

}  // namespace fusedtricks::cuda
