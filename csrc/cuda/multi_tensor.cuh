// One optimizer step over all parameters of a device: a rule of csrc/math applied to every element that the table
// lists, in one launch for each combination of dtypes (usually one), after one that measures the norm if gradients are
// clipped.
#pragma once

#include "math/optimizer.h"
#include "math/philox.h"
#include "vector.cuh"

namespace fusedtricks::cuda {

struct Math {
  static __device__ __forceinline__ float root(float v) { return sqrtf(v); }
  static __device__ __forceinline__ double root(double v) { return sqrt(v); }
};

constexpr int kThreads = 128, kBlocksPerProcessor = 8;
// Rows are dealt out in tiles of so many elements, and `kStart` counts whole tiles: see fusedtricks/ops/_shard.py.
constexpr int64_t kTile = 8192;

// What a launch needs, as the operator got it.
struct Step {
  const int64_t* rows;  // of the segment
  int64_t count, tiles;
  int64_t* progress;
  unsigned long long* arrived;  // blocks that are done; left at zero
  const double* hyper;
  float* outcome;
  const float *grad_scale, *found_inf, *norm;
  double* squares;  // sum of the squares of all gradients, then one sum for each block
  double max_norm;  // negative: no clipping
  bool first_segment;
};

template <class T>
__device__ __forceinline__ T* pointer(const int64_t* row, int column) {
  return reinterpret_cast<T*>(row[column]);
}

// The row that tile `tile` belongs to: the last that starts at or before it.
__device__ __forceinline__ int64_t row_of(const Step& a, int64_t tile) {
  int64_t low = 0, high = a.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.rows[middle * kColumns + kStart] <= tile * kTile ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ double read_scalar(const int64_t* row, int column) {
  return row[kFlags] & kStepFloat64 ? *pointer<double>(row, column) : *pointer<float>(row, column);
}
__device__ __forceinline__ void write_scalar(const int64_t* row, int column, double value) {
  if (row[kFlags] & kStepFloat64) {
    *pointer<double>(row, column) = value;
  } else {
    *pointer<float>(row, column) = static_cast<float>(value);
  }
}

// Steps taken, exact where float32 is not: the count, unless somebody changed what it was written to.
__device__ __forceinline__ double steps_before(const int64_t* row, int64_t progress) {
  const double counted = static_cast<double>(progress);
  if (!row[kStep]) return counted;
  const double stored = read_scalar(row, kStep);
  const bool same = row[kFlags] & kStepFloat64 ? counted == stored : static_cast<float>(counted) == stored;
  return same ? counted : stored;
}

// True in every thread of the last block to arrive; the others' stores are then visible to it.
__device__ __forceinline__ bool arrive_last(unsigned long long* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1ull) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- norm -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double sum_over_block(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  const double sum = sums[0];
  __syncthreads();
  return sum;
}

// Sum of squares of the gradients of a segment, in a fixed order.
template <class T, int Width>
__global__ __launch_bounds__(kThreads) void sum_squares(Step a) {
  double sum = 0;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t* row = a.rows + row_of(a, tile) * kColumns;
    const int64_t begin = tile * kTile - row[kStart], end = min(begin + kTile, row[kNumel]);
    const T* grad = pointer<const T>(row, kGrad);
    const bool aligned = row[kGrad] % kVectorBytes == 0;
    const int64_t whole = aligned ? begin + max(end - begin, int64_t{0}) / Width * Width : begin;
    for (int64_t j = begin + threadIdx.x * Width; j < whole; j += kThreads * Width) {
      T g[Width];
      load<Width, Cache::kShared>(grad + j, g);
#pragma unroll
      for (int i = 0; i < Width; ++i) sum += static_cast<double>(widen(g[i])) * static_cast<double>(widen(g[i]));
    }
    for (int64_t j = whole + threadIdx.x; j < end; j += kThreads) {
      const double g = widen(grad[j]);
      sum += g * g;
    }
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) a.squares[1 + blockIdx.x] = sum;
  if (!arrive_last(a.arrived)) return;
  double total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) total += a.squares[1 + i];
  total = sum_over_block(total);
  if (threadIdx.x == 0) {
    a.squares[0] = a.first_segment ? total : a.squares[0] + total;
    *a.arrived = 0;
  }
}

// ---- update ---------------------------------------------------------------------------------------------------------

// Master weights are rounded to bfloat16 with ties away from zero, so that the sign of the 16 bits that are left over
// tells which way it went.
__device__ __forceinline__ unsigned bits_of(float v) { return v == v ? __float_as_uint(v) : 0x7fc00000u; }
__device__ __forceinline__ float with_remainder(unsigned upper, unsigned lower) {
  return __uint_as_float(((upper - (lower >> 15)) << 16) | lower);
}
__device__ __forceinline__ unsigned short as_bits(bf16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ bf16 as_bf16(unsigned bits) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits));
}

// Random bits of N elements from j on: those of a whole block, or of one element.
template <int N>
__device__ __forceinline__ void draw(uint64_t seed, int64_t j, uint32_t stream, unsigned (&drawn)[N]) {
  static_assert(N == 8 || N == 1);
  const RandomBlock block(seed, static_cast<uint64_t>(j / 8), stream);
#pragma unroll
  for (int k = 0; k < 8; ++k) {  // an index that is known when compiled keeps the block in registers
    if (N == 8) drawn[k % N] = block.half(k);
    if (N == 1 && k == j % 8) drawn[0] = block.half(k);
  }
}

// What one row of the table asks for, worked out once for a tile.
template <class Rule, class T, class S>
struct Tile {
  using A = Acc<T>;
  T *param, *grad;
  S* state[Rule::kStates];
  float* master;
  unsigned short* remainder;
  A* ema;
  bool maximize, write_grad, stochastic;
  A factor, unscale, ema_weight, ema_rest;
  uint64_t seed;
  uint32_t stream;
  typename Rule::template Scalars<A> scalars;
};

// N consecutive elements from j on, which are aligned if there are several.
template <int N, class Rule, class T, class S>
__device__ __forceinline__ void update_elements(const Tile<Rule, T, S>& tile, int64_t j) {
  using A = Acc<T>;
  T g[N], p[N];
  S s[Rule::kStates][N];
  float master[N];
  unsigned lower[N] = {};
  A ema[N];
  load<N, Cache::kShared>(tile.grad + j, g);
  constexpr bool wide = sizeof(T) == 2;
  if (wide && tile.master) {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = narrow<T>(A(0));
  } else {
    load<N, Cache::kShared>(tile.param + j, p);
  }
  if (wide && tile.master) load<N, Cache::kShared>(tile.master + j, master);
  if constexpr (std::is_same_v<T, bf16>) {
    if (tile.remainder) {
      bf16 raw[N];
      load<N, Cache::kShared>(reinterpret_cast<const bf16*>(tile.remainder + j), raw);
#pragma unroll
      for (int i = 0; i < N; ++i) lower[i] = as_bits(raw[i]);
    }
  }
  if (tile.ema) load<N, Cache::kShared>(tile.ema + j, ema);
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) {
    if (tile.state[k]) load<N, Cache::kShared>(tile.state[k] + j, s[k]);
  }
  [[maybe_unused]] unsigned drawn[N] = {};
  if constexpr (std::is_same_v<T, bf16>) {
    if (tile.stochastic) draw(tile.seed, j, tile.stream, drawn);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    A gradient = widen(g[i]), weight;
    g[i] = narrow<T>(gradient * tile.unscale);
    gradient = gradient * tile.factor;
    if (tile.maximize) gradient = -gradient;
    if (wide && tile.master) {
      weight = master[i];
    } else {
      weight = widen(p[i]);
      if constexpr (std::is_same_v<T, bf16>) {
        if (tile.remainder) weight = with_remainder(as_bits(p[i]), lower[i]);
      }
    }
    A moments[Rule::kStates];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) moments[k] = tile.state[k] ? A(widen(s[k][i])) : A(0);
    weight = weight - Rule::template update<Math>(weight, gradient, moments, tile.scalars);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) s[k][i] = narrow<S>(moments[k]);
    if (tile.ema) ema[i] = lerp(ema[i], weight, tile.ema_weight, tile.ema_rest);
    if constexpr (std::is_same_v<T, bf16>) {
      if (tile.master || tile.remainder) {
        const unsigned bits = bits_of(weight);
        p[i] = as_bf16((bits + 0x8000u) >> 16);
        lower[i] = bits & 0xffffu;
      } else if (tile.stochastic) {
        // Up with the probability of the part that is cut off; neither infinity nor NaN is touched.
        const unsigned bits = bits_of(weight), random = drawn[i];
        p[i] = as_bf16((bits & 0x7f800000u) == 0x7f800000u ? bits >> 16 : (bits + random) >> 16);
      } else {
        p[i] = narrow<T>(weight);
      }
    } else {
      p[i] = narrow<T>(weight);
    }
    if (wide) master[i] = static_cast<float>(weight);
  }
  store<N, Cache::kStream>(p, tile.param + j);
  if (wide && tile.master) store<N, Cache::kStream>(master, tile.master + j);
  if constexpr (std::is_same_v<T, bf16>) {
    if (tile.remainder) {
      bf16 raw[N];
#pragma unroll
      for (int i = 0; i < N; ++i) raw[i] = as_bf16(lower[i]);
      store<N, Cache::kStream>(raw, reinterpret_cast<bf16*>(tile.remainder + j));
    }
  }
  if (tile.ema) store<N, Cache::kStream>(ema, tile.ema + j);
  if (tile.write_grad) store<N, Cache::kStream>(g, tile.grad + j);
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) {
    if (tile.state[k]) store<N, Cache::kStream>(s[k], tile.state[k] + j);
  }
}

// Scalars in double, by one thread for its block.
template <class Rule, class T, class S>
__device__ void open_tile(const Step& a, int64_t index, double unscale, double factor, Tile<Rule, T, S>& tile) {
  using A = Acc<T>;
  const int64_t* row = a.rows + index * kColumns;
  const double* h = a.hyper + row[kGroup] * kHyper;
  const double t = steps_before(row, a.progress[index]) + 1;
  double running = row[kFactor] ? read_scalar(row, kFactor) : 1;
  tile.param = pointer<T>(row, kParam);
  tile.grad = pointer<T>(row, kGrad);
  for (int k = 0; k < Rule::kStates; ++k) {
    tile.state[k] = Rule::uses(h, k) ? pointer<S>(row, kState + k) : nullptr;
  }
  const bool remainder = row[kFlags] & kRemainder;
  tile.master = remainder ? nullptr : pointer<float>(row, kMaster);
  tile.remainder = remainder ? pointer<unsigned short>(row, kMaster) : nullptr;
  tile.ema = pointer<A>(row, kEma);
  tile.maximize = h[kMaximize] != 0;
  tile.write_grad = a.grad_scale != nullptr;
  tile.stochastic = row[kFlags] & kStochastic;
  tile.factor = static_cast<A>(factor);
  tile.unscale = static_cast<A>(unscale);
  tile.ema_weight = static_cast<A>(1 - h[kEmaDecay]);
  tile.ema_rest = static_cast<A>(h[kEmaDecay]);
  tile.seed = static_cast<uint64_t>(h[kSeed]) + static_cast<uint64_t>(t);
  tile.stream = static_cast<uint32_t>(row[kStream]);
  const bool first = (row[kFlags] & kFirstMomentum) && a.progress[index] == 0;
  tile.scalars = Rule::template prepare<A>(h, t, first, running);
}

template <class Rule, class T, int Width, class S>
__global__ __launch_bounds__(kThreads, 1) void update_tiles(Step a) {
  __shared__ Tile<Rule, T, S> tile;
  const bool skip = a.found_inf && *a.found_inf != 0;
  const double unscale = a.grad_scale ? 1 / static_cast<double>(*a.grad_scale) : 1;
  double factor = unscale;
  if (a.max_norm >= 0) {
    const double norm = a.norm ? static_cast<double>(*a.norm) : sqrt(a.squares[0]) * fabs(unscale);
    const double clip = a.max_norm / (norm + 1e-6);  // as torch.nn.utils.clip_grad_norm_
    if (clip < 1 || clip != clip) factor *= clip;
    if (blockIdx.x == 0 && threadIdx.x == 0) a.outcome[0] = static_cast<float>(norm);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.outcome[1] = skip;
  if (skip) return;
  int64_t open = -1;
  for (int64_t t = blockIdx.x; t < a.tiles; t += gridDim.x) {
    const int64_t index = row_of(a, t);
    const int64_t* row = a.rows + index * kColumns;
    if (index != open) {
      __syncthreads();  // nobody still reads the tile before
      if (threadIdx.x == 0) open_tile(a, index, unscale, factor, tile);
      __syncthreads();
      open = index;
    }
    const int64_t begin = t * kTile - row[kStart], end = min(begin + kTile, row[kNumel]);
    int64_t addresses = 0;
    for (int c = kParam; c <= kEma; ++c) addresses |= row[c];
    const bool aligned = addresses % kVectorBytes == 0;
    const int64_t whole = aligned ? begin + max(end - begin, int64_t{0}) / Width * Width : begin;
    for (int64_t j = begin + threadIdx.x * Width; j < whole; j += kThreads * Width) update_elements<Width>(tile, j);
    for (int64_t j = whole + threadIdx.x; j < end; j += kThreads) update_elements<1>(tile, j);
  }
  // Only now: every block has read them.
  if (!arrive_last(a.arrived)) return;
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) {
    const int64_t* row = a.rows + i * kColumns;
    const double* h = a.hyper + row[kGroup] * kHyper;
    const double t = steps_before(row, a.progress[i]) + 1;
    if (row[kFactor]) {
      double running = read_scalar(row, kFactor);
      Rule::template prepare<float>(h, t, false, running);
      write_scalar(row, kFactor, running);
    }
    a.progress[i] = static_cast<int64_t>(t);
    if (row[kStep]) write_scalar(row, kStep, t);
  }
  if (threadIdx.x == 0) *a.arrived = 0;
}

// f.operator()<T, S>() with the storage types of a segment.
template <class F>
void dispatch_kind(int64_t kind, const F& f) {
  switch (kind) {
    case kFloat32 + 4 * kFloat32:
      return f.template operator()<float, float>();
    case kFloat64 + 4 * kFloat64:
      return f.template operator()<double, double>();
    case kBFloat16 + 4 * kBFloat16:
      return f.template operator()<bf16, bf16>();
    case kBFloat16 + 4 * kFloat32:
      return f.template operator()<bf16, float>();
    case kFloat16 + 4 * kFloat16:
      return f.template operator()<fp16, fp16>();
    case kFloat16 + 4 * kFloat32:
      return f.template operator()<fp16, float>();
    default:
      STD_TORCH_CHECK(false, "fusedtricks: unknown kind of parameter, ", kind);
  }
}

inline const float* one_float(const char* op, const char* name, const MaybeTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be one float32 element");
  return static_cast<const float*>(t->const_data_ptr());
}

// See fusedtricks/ops/_table.py for the arguments. `progress` has one element more than the table has rows: blocks that
// are done.
template <class Rule>
void step(const char* op, const Tensor& table, const Tensor& segments, const Tensor& progress, const Tensor& hyper,
          const Tensor& outcome, const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& norm,
          std::optional<double> max_norm) {
  STD_TORCH_CHECK(progress.numel() == table.size(0) + 1, op, ": progress must have one element more than table rows");
  if (segments.size(0) == 0) return;
  const Device device(table);
  const auto* const segment = static_cast<const int64_t*>(segments.const_data_ptr());
  auto* const counts = static_cast<int64_t*>(progress.mutable_data_ptr());
  const int64_t most = static_cast<int64_t>(device.processors()) * kBlocksPerProcessor;
  const bool measure = max_norm && !norm;
  const Tensor squares = empty({measure ? 1 + most : 1}, ScalarType::Double, table);
  Step a{};
  a.arrived = reinterpret_cast<unsigned long long*>(counts + table.size(0));
  a.hyper = static_cast<const double*>(hyper.const_data_ptr());
  a.outcome = static_cast<float*>(outcome.mutable_data_ptr());
  a.grad_scale = one_float(op, "grad_scale", grad_scale);
  a.found_inf = one_float(op, "found_inf", found_inf);
  a.norm = one_float(op, "norm", norm);
  a.squares = static_cast<double*>(squares.mutable_data_ptr());
  a.max_norm = max_norm ? *max_norm : -1;
  for (const bool update : {false, true}) {
    if (!update && !measure) continue;
    for (int64_t i = 0; i < segments.size(0); ++i) {
      const int64_t kind = segment[4 * i], first = segment[4 * i + 1];
      a.rows = static_cast<const int64_t*>(table.const_data_ptr()) + first * kColumns;
      a.count = segment[4 * i + 2];
      a.tiles = segment[4 * i + 3] / kTile;
      a.progress = counts + first;
      a.first_segment = i == 0;
      const int64_t blocks = std::max<int64_t>(std::min(a.tiles, most), 1);
      dispatch_kind(kind, [&]<class T, class S>() {
        if (update) {
          device.launch(update_tiles<Rule, T, kLanes<T>, S>, blocks, kThreads, 0, a);
        } else {
          device.launch(sum_squares<T, kLanes<T>>, blocks, kThreads, 0, a);
        }
      });
    }
  }
}

}  // namespace fusedtricks::cuda
