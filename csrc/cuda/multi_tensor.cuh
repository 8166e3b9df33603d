// One optimizer step over all parameters on a GPU: a rule of csrc/math applied to every element that the table lists,
// in one launch for each kind of parameter. Bytes that must move for AdamW in fp32: 28 a parameter.
//
// The tensors of a kind are laid end to end and cut into equal tiles, a block a tile, so one tensor of a billion
// elements and a thousand of one element are the same work. The first warp of a block prepares what a row needs, all
// rows of the tile at once; then the block moves elements, 16 bytes an access where every tensor of the row allows it.
// Everything that may change between steps is read from the device, so captured graphs obey later changes.
//
// Clipping takes a launch before it, which leaves sums of squares that every block adds in the same order.
#pragma once

#include "math/optimizer.h"
#include "math/philox.h"
#include "reduce.cuh"

namespace fusedtricks::cuda {

inline constexpr int kTile = 8192;  // elements
inline constexpr int kTileThreads = 256;
inline constexpr int kNormThreads = 1024, kNormBlocks = 256;  // on any device, so that the norm has the same bits
inline constexpr int kSlots = kWarp;                          // rows that a block prepares at once

struct Math {
  static __device__ __forceinline__ float root(float v) { return sqrtf(v); }
  static __device__ __forceinline__ double root(double v) { return sqrt(v); }
};

// ---- weights of more bits than the parameter ------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bits_of(float v) {
  union {
    float value;
    uint32_t bits;
  } u{v};
  return u.bits;
}

__device__ __forceinline__ float from_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } u{bits};
  return u.value;
}

inline constexpr uint32_t kNaN = 0x7fc00000u;

// Master weights are rounded to bfloat16 with ties away from zero, so that the sign of the 16 bits that are left over
// tells which way it went. The result is the bfloat16 number as fp32, to be narrowed without loss.
__device__ __forceinline__ float shown(float v) {
  return from_bits(((v == v ? bits_of(v) : kNaN) + 0x8000u) & 0xffff0000u);
}

__device__ __forceinline__ float with_remainder(float upper, uint16_t lower) {
  return from_bits((bits_of(upper) - (static_cast<uint32_t>(lower >> 15) << 16)) | lower);
}

// Up with the probability of the part that is cut off; neither infinity nor NaN is touched.
__device__ __forceinline__ float round_stochastically(float v, uint32_t random) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return v;
  return from_bits((bits + random) & 0xffff0000u);
}

// The random bits of elements j .. j + 7, which share one block or, where j is no multiple of 8, two.
__device__ __forceinline__ RandomBlock random_from(uint64_t seed, int64_t j, uint32_t stream) {
  RandomBlock first(seed, static_cast<uint64_t>(j) / 8, stream);
  const int shift = static_cast<int>(j % 8);
  if (shift == 0) return first;
  const RandomBlock second(seed, static_cast<uint64_t>(j) / 8 + 1, stream);
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = first.word[i], w[4 + i] = second.word[i];
  // In steps of fixed length, as an index that is not known at compile time would send the words to memory.
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 4 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 2 ? w[i + 1] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) first.word[i] = shift & 1 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  return first;
}

// Of one element, where neighbours do not come together.
__device__ __forceinline__ uint32_t random_at(uint64_t seed, int64_t j, uint32_t stream) {
  const RandomBlock block(seed, static_cast<uint64_t>(j) / 8, stream);
  const uint32_t low = j & 2 ? block.word[1] : block.word[0], high = j & 2 ? block.word[3] : block.word[2];
  const uint32_t word = j & 4 ? high : low;
  return j & 1 ? word >> 16 : word & 0xffffu;
}

// ---- the table ------------------------------------------------------------------------------------------------------

// The rows of one kind.
struct Table {
  const int64_t* cells;
  int64_t rows, elements;

  __device__ __forceinline__ const int64_t* row(int64_t i) const { return cells + i * kColumns; }
  __device__ __forceinline__ int64_t start(int64_t i) const { return __ldg(row(i) + kStart) - __ldg(row(0) + kStart); }
  FT_HD int64_t tiles() const { return elements > kTile ? (elements + kTile - 1) / kTile : 1; }

  // The last row that starts before this element, or the first row. All lanes of a warp look together.
  __device__ __forceinline__ int64_t find(int64_t element) const {
    Group warp(kWarp);
    int64_t low = 0;
    for (int64_t size = rows; size > 1;) {
      const int64_t step = (size + kWarp - 1) / kWarp, offset = warp.rank * step;
      const int before = warp.rank > 0 && offset < size && start(low + offset) < element;
      const int64_t skip = warp.reduce(before, [](int a, int b) { return a + b; }) * step;
      low += skip;
      size = min(step, size - skip);
    }
    return low;
  }
};

// A row's part of a tile. Every row is in some tile, those without elements too.
struct Part {
  int64_t row, begin;
  int count;
  int64_t tiles;  // that the row is in
};

template <class T>
__device__ __forceinline__ T* pointer(const int64_t* row, int column) {
  return reinterpret_cast<T*>(__ldg(row + column));
}

// fill(part, slot) for every row in the tile, by a thread of the first warp each; then use(slot, thread) by all
// threads, row after row. `thread` is another numbering of the threads for every row, so that short rows keep
// different warps busy. Slot has `count`, which is set here.
template <class Slot, class Fill, class Use>
__device__ __forceinline__ void visit(const Table& table, int64_t tile, Slot* slots, const Fill& fill, const Use& use) {
  const int threads = static_cast<int>(blockDim.x);
  int busy = 0;
  for (int64_t next = table.find(tile * kTile); next < table.rows; next += kSlots) {
    __syncthreads();  // everybody is done with the slots
    if (threadIdx.x < kSlots) {
      Slot& slot = slots[threadIdx.x];
      const int64_t i = next + threadIdx.x;
      slot.count = -1;
      if (i < table.rows) {
        const int64_t start = table.start(i), n = __ldg(table.row(i) + kNumel);
        const int64_t first = min(start / kTile, table.tiles() - 1), last = n ? (start + n - 1) / kTile : first;
        const int64_t begin = max(tile * kTile - start, int64_t{0});
        if (first <= tile) slot.count = tile <= last ? static_cast<int>(min((tile + 1) * kTile - start, n) - begin) : 0;
        if (first <= tile && tile <= last) fill(Part{i, begin, slot.count, last - first + 1}, slot);
      }
    }
    __syncthreads();
    for (int k = 0; k < kSlots; ++k) {
      if (slots[k].count < 0) return;  // that row starts behind the tile, and so do all others
      if (slots[k].count == 0) continue;
      const int thread = static_cast<int>(threadIdx.x) - busy;
      const int used = use(slots[k], thread < 0 ? thread + threads : thread);
      busy = (busy + (used + kWarp - 1) / kWarp * kWarp) % threads;
    }
  }
}

// Elements before the first that lies at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int unaligned(const T* p) {
  return static_cast<int>(-reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(T));
}

template <class T>
__device__ __forceinline__ bool aligned_at(const T* p, int element) {
  return reinterpret_cast<uintptr_t>(p + element) % kVectorBytes == 0 || !p;
}

// A few elements that a thread holds at once: a 16-byte vector of T ...
template <class T>
struct Wide {
  static constexpr int kCount = kLanes<T>;
  int at;

  __device__ __forceinline__ int index(int i) const { return at + i; }
  __device__ __forceinline__ bool has(int) const { return true; }

  template <class V>
  __device__ __forceinline__ void load(const V* from, V (&to)[kCount]) const {
    cuda::load<kCount, Cache::kStream>(from + at, to);
  }
  template <Cache cache = Cache::kStream, class V>
  __device__ __forceinline__ void store(const V (&from)[kCount], V* to) const {
    cuda::store<kCount, cache>(from, to + at);
  }
};

// ... or single ones, `stride` apart, of the `single` that are left: those before the vectors and those behind them.
template <class T>
struct Few {
  static constexpr int kCount = kLanes<T> < 4 ? kLanes<T> : 4;
  int at, stride, single, head, vectors;

  __device__ __forceinline__ int index(int i) const {
    const int k = at + i * stride;
    return k < head ? k : k + vectors * kLanes<T>;
  }
  __device__ __forceinline__ bool has(int i) const { return at + i * stride < single; }

  template <class V>
  __device__ __forceinline__ void load(const V* from, V (&to)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (has(i)) cuda::load<1, Cache::kStream>(from + index(i), to + i);
    }
  }
  template <Cache cache = Cache::kStream, class V>
  __device__ __forceinline__ void store(const V (&from)[kCount], V* to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (has(i)) cuda::store<1, cache>(from + i, to + index(i));
    }
  }
};

// f(batch) for `count` elements of which `head` come before the first vector, if vectors there are. Returns how many
// threads have something to do.
template <class T, class F>
__device__ __forceinline__ int sweep(int count, int head, int thread, const F& f) {
  const int threads = static_cast<int>(blockDim.x), vectors = (count - head) / kLanes<T>;
  for (int v = thread; v < vectors; v += threads) f(Wide<T>{head + v * kLanes<T>});
  // By other warps than those that have a vector more.
  const int single = count - vectors * kLanes<T>, busy = (vectors + kWarp - 1) / kWarp * kWarp % threads;
  for (int k = thread < busy ? thread - busy + threads : thread - busy; k < single; k += threads * Few<T>::kCount) {
    f(Few<T>{k, threads, single, head, vectors});
  }
  return busy + single;
}

// ---- clipping -------------------------------------------------------------------------------------------------------

struct Gradient {
  const void* data;
  int count, head;
};

// Block b leaves the sum of squares of tiles b, b + gridDim.x, ...
template <class P, int Width>
__global__ void __launch_bounds__(kNormThreads) square_gradients(Table table, double* sums) {
  __shared__ Gradient slots[kSlots];
  Sums<double, 1> total{};
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    visit(
        table, tile, slots,
        [&](const Part& part, Gradient& slot) {
          const P* const grad = pointer<const P>(table.row(part.row), kGrad) + part.begin;
          slot.data = grad;
          slot.head = min(unaligned(grad), part.count);
        },
        [&](const Gradient& slot, int thread) {
          return sweep<P>(slot.count, slot.head, thread, [&]<class Batch>(const Batch& batch) {
            alignas(kVectorBytes) P g[Batch::kCount] = {};
            batch.load(static_cast<const P*>(slot.data), g);
#pragma unroll
            for (int i = 0; i < Batch::kCount; ++i) {
              const double v = widen(g[i]);
              total.at[0] += batch.has(i) ? v * v : 0;
            }
          });
        });
  }
  total = Group(static_cast<int>(blockDim.x)).sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total.at[0];
}

// ---- the step -------------------------------------------------------------------------------------------------------

// One number on the device.
struct Number {
  const void* at;
  bool wide;

  __device__ __forceinline__ double read(double otherwise) const {
    if (!at) return otherwise;
    return wide ? __ldg(static_cast<const double*>(at)) : __ldg(static_cast<const float*>(at));
  }
};

struct Arguments {
  Table table;
  int64_t* progress;
  const double* hyper;
  float* outcome;  // null in all launches of a step but one
  Number grad_scale, found_inf, norm;
  const double* sums;  // of squares of the gradients as they are stored
  int parts;
  bool clip;
  double max_norm;
};

// What holds for all rows.
struct Scaling {
  double unscale, factor, norm;  // `factor` clips too
  bool skip;

  // All threads of the block together.
  __device__ __forceinline__ explicit Scaling(const Arguments& a)
      : unscale(1 / a.grad_scale.read(1)), norm(0), skip(a.found_inf.read(0) != 0) {
    factor = unscale;
    if (!a.clip) return;
    if (a.norm.at) {
      norm = a.norm.read(0);
    } else {
      Group warp(kWarp);
      Sums<double, 1> total{};
      for (int i = warp.rank; i < a.parts; i += kWarp) total.at[0] += __ldg(a.sums + i);
      norm = sqrt(warp.sum(total).at[0]) * (unscale < 0 ? -unscale : unscale);
    }
    const double clip = a.max_norm / (norm + 1e-6);  // as torch.nn.utils.clip_grad_norm_
    if (clip < 1 || clip != clip) factor *= clip;
  }
};

// A 0-dim state that torch keeps in float32, or in float64 where that is the default dtype.
__device__ __forceinline__ double read_scalar(const int64_t* row, int64_t flags, int column) {
  if (flags & kStepFloat64) return __ldcg(pointer<double>(row, column));
  return __ldcg(pointer<float>(row, column));
}
__device__ __forceinline__ void write_scalar(const int64_t* row, int64_t flags, int column, double value) {
  if (flags & kStepFloat64) {
    *pointer<double>(row, column) = value;
  } else {
    *pointer<float>(row, column) = static_cast<float>(value);
  }
}

// While a launch runs, the upper bits of a row's progress count the blocks that have read its step; the last one to
// read advances it. Between launches they are zero.
using Progress = unsigned long long;
inline constexpr int kStepBits = 40;

struct History {
  double counted, t;  // steps taken, and the number of this step
  bool last;

  // Steps taken are what `progress` counts, exact where float32 is not, unless somebody changed what it was written to.
  __device__ __forceinline__ History(const int64_t* row, int64_t flags, Progress* progress, int64_t tiles,
                                     double& factor) {
    const bool has_step = __ldg(row + kStep) != 0;
    const double stored = has_step ? read_scalar(row, flags, kStep) : 0;
    factor = __ldg(row + kFactor) ? read_scalar(row, flags, kFactor) : 1;
    __threadfence();  // the reads come before the count
    const Progress before = atomicAdd(progress, Progress{1} << kStepBits);
    last = before >> kStepBits == static_cast<Progress>(tiles - 1);
    counted = static_cast<double>(before & ((Progress{1} << kStepBits) - 1));
    const bool same = flags & kStepFloat64 ? counted == stored : static_cast<float>(counted) == stored;
    t = (!has_step || same ? counted : stored) + 1;
  }

  __device__ __forceinline__ void advance(const int64_t* row, int64_t flags, Progress* progress, double factor) const {
    if (!last) return;
    __threadfence();
    *progress = t >= 0 ? static_cast<Progress>(t) & ((Progress{1} << kStepBits) - 1) : 0;
    if (__ldg(row + kStep)) write_scalar(row, flags, kStep, t);
    if (__ldg(row + kFactor)) write_scalar(row, flags, kFactor, factor);
  }
};

struct Power {
  __device__ __forceinline__ double operator()(int, double base, double exponent) const { return pow(base, exponent); }
};

// A row's part of a tile, ready to be updated.
template <class Rule, class P, class S>
struct Piece {
  using A = Acc<P>;
  P *param, *grad;
  S* state[Rule::kStates];
  float* master;
  uint16_t* rest;  // 16 bits that a bfloat16 parameter lacks
  A* ema;
  int64_t begin;
  uint64_t seed;
  uint32_t stream;
  int count, head;
  A unscale, factor, ema_weight, ema_rest;
  bool write, maximize, stochastic;
  typename Rule::template Scalars<A> scalars;

  __device__ __forceinline__ void fill(const Arguments& a, const Scaling& scaling, const Part& part) {
    const int64_t* const row = a.table.row(part.row);
    const double* const h = a.hyper + __ldg(row + kGroup) * kHyper;
    const int64_t flags = __ldg(row + kFlags);
    auto* const progress = reinterpret_cast<Progress*>(a.progress + part.row);
    double product;
    const History history(row, flags, progress, part.tiles, product);
    scalars = Rule::template prepare<A>(h, history.t, flags & kFirstMomentum && history.counted == 0, product, Power{});
    history.advance(row, flags, progress, product);

    const auto at = [&]<class T>(int column, T*& to) {
      to = pointer<T>(row, column);
      if (to) to += part.begin;
    };
    const bool remainder = flags & kRemainder;
    at(kParam, param);
    at(kGrad, grad);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      state[k] = nullptr;
      if (Rule::uses(h, k)) at(kState + k, state[k]);
    }
    master = nullptr, rest = nullptr;
    if (remainder) at(kMaster, rest);
    if (!remainder) at(kMaster, master);
    at(kEma, ema);
    head = min(unaligned(param), count);
    bool together =
        aligned_at(grad, head) && aligned_at(master, head) && aligned_at(rest, head) && aligned_at(ema, head);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) together = together && aligned_at(state[k], head);
    if (!together) head = count;

    begin = part.begin;
    stream = static_cast<uint32_t>(__ldg(row + kStream));
    seed = static_cast<uint64_t>(h[kSeed]) + static_cast<uint64_t>(history.t);
    stochastic = flags & kStochastic;
    maximize = h[kMaximize] != 0;
    write = a.grad_scale.at;
    unscale = static_cast<A>(scaling.unscale), factor = static_cast<A>(scaling.factor);
    ema_weight = static_cast<A>(1 - h[kEmaDecay]), ema_rest = static_cast<A>(h[kEmaDecay]);
  }

  // Of the elements of a batch, from where a thread has them in registers back to there.
  template <class Batch>
  __device__ __forceinline__ void update(const Batch& batch, const typename Rule::template Scalars<A>& c) const {
    constexpr int kCount = Batch::kCount;
    constexpr bool kBFloat = std::is_same_v<P, bf16>, kHalf = kBFloat || std::is_same_v<P, fp16>;
    alignas(kVectorBytes) P p[kCount] = {}, g[kCount] = {};
    alignas(kVectorBytes) S s[Rule::kStates][kCount] = {};
    alignas(kVectorBytes) A weight[kCount] = {}, average[kCount] = {};
    [[maybe_unused]] alignas(kVectorBytes) uint16_t lower[kCount] = {};
    if (!kHalf || !master) batch.load(param, p);
    batch.load(grad, g);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (state[k]) batch.load(state[k], s[k]);
    }
    if constexpr (kHalf) {
      if (master) batch.load(master, weight);
    }
    if constexpr (kBFloat) {
      if (rest) batch.load(rest, lower);
    }
    if (ema) batch.load(ema, average);

#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A v = widen(g[i]);
      if (write) g[i] = narrow<P>(v * unscale);
      v = v * factor;
      if (maximize) v = -v;
      if (!kHalf || !master) weight[i] = widen(p[i]);
      if constexpr (kBFloat) {
        if (rest) weight[i] = with_remainder(weight[i], lower[i]);
      }
      A of[Rule::kStates];
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) of[k] = widen(s[k][i]);
      weight[i] = weight[i] - Rule::template update<Math>(weight[i], v, of, c);
      average[i] = lerp(average[i], weight[i], ema_weight, ema_rest);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) s[k][i] = narrow<S>(of[k]);
    }

    // The parameter is what the next forward reads; the rest is of no use until the next step.
    if constexpr (kHalf) {
      if (master) batch.store(weight, master);
    }
    if (ema) batch.store(average, ema);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (state[k]) batch.store(s[k], state[k]);
    }
    if (write) batch.store(g, grad);
    if constexpr (kBFloat) {
      if (rest) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          lower[i] = static_cast<uint16_t>(weight[i] == weight[i] ? bits_of(weight[i]) : kNaN);
        batch.store(lower, rest);
      }
      if (rest || master) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) weight[i] = shown(weight[i]);
      } else if (stochastic) {
        round(batch, weight);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = narrow<P>(weight[i]);
    batch.template store<Cache::kKeep>(p, param);
  }

  __device__ __forceinline__ void round(const Wide<P>& batch, float (&weight)[kLanes<P>]) const {
    const RandomBlock random = random_from(seed, begin + batch.at, stream);
#pragma unroll
    for (int i = 0; i < kLanes<P>; ++i) weight[i] = round_stochastically(weight[i], random.half(i));
  }
  __device__ __forceinline__ void round(const Few<P>& batch, float (&weight)[Few<P>::kCount]) const {
#pragma unroll
    for (int i = 0; i < Few<P>::kCount; ++i) {
      weight[i] = round_stochastically(weight[i], random_at(seed, begin + batch.index(i), stream));
    }
  }
};

// Blocks that a multiprocessor must have registers for: left to itself, ptxas spills a few to fit one more.
template <class P>
inline constexpr int kResident = sizeof(P) == 4 ? 3 : 2;

template <class Rule, class P, int Width, class S>
__global__ void __launch_bounds__(kTileThreads, kResident<P>) update_tensors(Arguments a) {
  __shared__ Piece<Rule, P, S> slots[kSlots];
  const Scaling scaling(a);
  if (a.outcome && blockIdx.x == 0 && threadIdx.x == 0) {
    if (a.clip) a.outcome[0] = static_cast<float>(scaling.norm);
    a.outcome[1] = scaling.skip;
  }
  if (scaling.skip) return;
  visit(
      a.table, blockIdx.x, slots, [&](const Part& part, auto& piece) { piece.fill(a, scaling, part); },
      [&](const auto& piece, int thread) {
        const auto c = piece.scalars;
        return sweep<P>(piece.count, piece.head, thread, [&](const auto& batch) { piece.update(batch, c); });
      });
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// f.operator()<P, S>() with the dtypes of a kind.
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

inline Number number(const MaybeTensor& t, const char* name) {
  if (!t) return {};
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(t->numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), "fusedtricks: ", name,
                  " must be one float32 or float64 number, got ", t->numel(), " of ",
                  torch::headeronly::toString(dtype));
  return {t->const_data_ptr(), dtype == ScalarType::Double};
}

// See fusedtricks/ops/_table.py for the arguments.
template <class Rule>
void step(const Tensor& table, const Tensor& segments, const Tensor& progress, const Tensor& hyper,
          const Tensor& outcome, const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& norm,
          std::optional<double> max_norm) {
  STD_TORCH_CHECK(!segments.is_cuda(), "fusedtricks: the segments must be on the CPU");
  const Device device(table);
  const int threads = device.threads_per_block();
  const auto* const cells = static_cast<const int64_t*>(table.const_data_ptr());
  Arguments a{};
  a.hyper = static_cast<const double*>(hyper.const_data_ptr());
  a.grad_scale = number(grad_scale, "grad_scale"), a.found_inf = number(found_inf, "found_inf");
  a.norm = number(norm, "norm");
  a.clip = max_norm.has_value(), a.max_norm = max_norm.value_or(0);

  // f(kind, rows, number of the first) for every kind; a table without rows still has an outcome.
  const auto each = [&](const auto& f) {
    const auto* const segment = static_cast<const int64_t*>(segments.const_data_ptr());
    for (int64_t i = 0; i < segments.size(0); ++i) {
      const int64_t kind = segment[4 * i], first = segment[4 * i + 1];
      f(kind, Table{cells + first * kColumns, segment[4 * i + 2], segment[4 * i + 3]}, first);
    }
    if (segments.size(0) == 0) f(0, Table{cells, 0, 0}, 0);
  };

  Tensor sums;
  if (a.clip && !norm) {
    each([&](int64_t, const Table& rows, int64_t) { a.parts += std::min<int64_t>(rows.tiles(), kNormBlocks); });
    sums = empty({a.parts}, ScalarType::Double, table);
    auto* to = static_cast<double*>(sums.mutable_data_ptr());
    a.sums = to;
    each([&](int64_t kind, const Table& rows, int64_t) {
      dispatch_kind(kind, [&]<class P, class S>() {
        const int64_t blocks = std::min<int64_t>(rows.tiles(), kNormBlocks);
        device.launch(square_gradients<P, kLanes<P>>, blocks, std::min(threads, kNormThreads), 0, rows, to);
        to += blocks;
      });
    });
  }
  a.outcome = static_cast<float*>(outcome.mutable_data_ptr());
  each([&](int64_t kind, const Table& rows, int64_t first) {
    a.table = rows;
    a.progress = static_cast<int64_t*>(progress.mutable_data_ptr()) + first;
    dispatch_kind(kind, [&]<class P, class S>() {
      device.launch(update_tensors<Rule, P, kLanes<P>, S>, rows.tiles(), std::min(threads, kTileThreads), 0, a);
    });
    a.outcome = nullptr;
  });
}

}  // namespace fusedtricks::cuda
