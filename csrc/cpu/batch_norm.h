// Batch normalization on the CPU: how a tensor (N, C, *) lies in memory, how the work is cut, and the elementwise
// loops.
//
// Every dense tensor is (outer, channels, inner) for some order of its dimensions: NCHW has inner = HW, channels_last
// has inner = 1. Long runs of one channel are `planes`; where they are short, memory is read as `rows`, whose columns
// belong to channels in turn. Work is cut into chunks by the shape alone, and what chunks find is merged in their
// order, so results are the same for any number of threads.
#pragma once

#include <cstring>
#include <numeric>

#include "math/batch_norm.h"
#include "parallel.h"
#include "parameter.h"
#include "torch_api.h"
#include "vec.h"
#include "vec_bits.h"
#include "vec_math.h"

namespace fusedtricks::FT_ISA {

// ---- layout ---------------------------------------------------------------------------------------------------------

struct Channels {
  static constexpr int64_t kShortRun = 16;
  int64_t outer = 1, channels = 1, inner = 1;
  std::array<int64_t, 64> order;  // dimensions of more than one element but the channels', outermost first
  int64_t outer_dims = 0, dims = 0;

  // `y` is dense. A single channel has nothing outside.
  explicit Channels(const Tensor& y) : channels(y.size(1)) {
    for (int64_t d = 0; d < y.dim(); ++d) {
      if (d == 1 || y.size(d) == 1) continue;
      int64_t i = dims++;
      for (; i > 0 && y.stride(order[i - 1]) < y.stride(d); --i) order[i] = order[i - 1];
      order[i] = d;
      const bool outside = channels > 1 && y.stride(d) > y.stride(1);
      (outside ? outer : inner) *= y.size(d);
      outer_dims += outside;
    }
  }

  int64_t samples() const { return outer * inner; }
  int64_t numel() const { return outer * channels * inner; }
  // Also the rule for the mask, see _batch_norm.mask_rows: it lies in memory order, planes start at whole bytes.
  bool rows() const { return inner < kShortRun; }
  int64_t mask_bytes() const { return rows() ? (numel() + 7) / 8 : outer * channels * ((inner + 7) / 8); }
};

// A tensor that a kernel can walk: element (o, c, i) at o outer + c channel + i, or one constant.
struct Operand {
  Tensor tensor;
  int64_t outer = 0, channel = 0;
  bool constant = false;

  bool dense(const Channels& s) const {
    return constant || ((s.outer == 1 || outer == s.channels * s.inner) && (s.channels == 1 || channel == s.inner));
  }
};

// `t` as it is where it can be walked, else as a copy with the strides of `y`.
inline Operand operand(const Tensor& t, const Tensor& y, const Channels& s, bool dense) {
  Operand found{t};
  found.constant = s.numel() > 1;
  for (int64_t d = 0; d < t.dim(); ++d) found.constant = found.constant && (t.size(d) == 1 || t.stride(d) == 0);
  if (found.constant) return found;
  int64_t expected = 1;
  bool fits = true;
  for (int64_t i = s.dims; i-- > s.outer_dims; expected *= t.size(s.order[i])) {
    fits = fits && t.stride(s.order[i]) == expected;
  }
  for (int64_t i = s.outer_dims; i-- > 0; expected *= t.size(s.order[i])) {
    if (i == s.outer_dims - 1) expected = found.outer = t.stride(s.order[i]);
    fits = fits && t.stride(s.order[i]) == expected;
  }
  found.channel = s.channels > 1 ? t.stride(1) : 0;
  // Rows of several pixels, and bits that do not end with a row, are found by their position in dense memory.
  if (s.rows()) fits = fits && (s.channels == 1 || found.channel == s.inner);
  fits = fits && (!dense || found.dense(s));
  if (fits) return found;
  found = {fusedtricks::empty_like(y), s.channels * s.inner, s.inner};
  torch::stable::copy_(found.tensor, t);
  return found;
}

// ---- chunks of planes -----------------------------------------------------------------------------------------------

// A chunk is a group of whole runs of one channel, or a part of one run. Where nothing is summed it is one run at most,
// so that channel after channel all is walked in the order of memory.
struct Planes {
  static constexpr int64_t kElements = 16384;
  int64_t runs, parts, length, chunks;  // runs per chunk; parts per run and their length; chunks per channel

  Planes(const Channels& s, bool in_order) {
    parts = (s.inner + kElements - 1) / kElements;
    length = parts == 1 ? s.inner : ((s.inner + parts - 1) / parts + 63) / 64 * 64;
    parts = (s.inner + length - 1) / length;
    runs = parts > 1 || in_order ? 1 : std::max<int64_t>(kElements / s.inner, 1);
    chunks = parts > 1 ? s.outer * parts : (s.outer + runs - 1) / runs;
  }

  struct Chunk {
    int64_t run, runs, begin, length;
    int64_t samples() const { return runs * length; }
  };
  Chunk chunk(const Channels& s, int64_t c) const {
    const int64_t begin = c % parts * length, run = c / parts * runs;
    return {run, std::min(runs, s.outer - run), begin, std::min(length, s.inner - begin)};
  }
};

// A running total in fp64.
template <class A>
struct Total {
  Vec<double> part[sizeof(double) / sizeof(A)] = {};

  void operator+=(Vec<A> v) {
    if constexpr (std::is_same_v<A, double>) {
      part[0] += v;
    } else {
      Vec<float, kVecBytes / 2> half[2];
      std::memcpy(half, &v, sizeof v);
      part[0] += __builtin_convertvector(half[0], Vec<double>);
      part[1] += __builtin_convertvector(half[1], Vec<double>);
    }
  }
  A sum() const {
    if constexpr (std::is_same_v<A, double>) return sum_lanes<double>(part[0]);
    return static_cast<A>(sum_lanes<double>(part[0] + part[sizeof(double) / sizeof(A) - 1]));
  }
};

// Channels that are neighbours in memory and are worked on together: their sums first, then what is written, for which
// they come from the caches. Memory is read in long runs that way, two runs at a time, and serves them faster than one
// short run after another. A channel's results do not depend on its group.
//
// Where planes are short, the end of a run and what belongs to its channel would cost more than its elements: all runs
// of a group are then one, whose columns belong to channels in turn.
struct Groups {
  static constexpr int64_t kMost = 32;
  static constexpr int64_t kBytes = 2 << 20;  // a thread's share of the caches, for all that a group reads
  static constexpr int64_t kShort = 64, kColumns = 1024;
  static constexpr int64_t kAcross = 2048;               // shorter runs are worth registers across their ends,
  static constexpr int64_t kTogether = kMost * kAcross;  // of so many elements at most
  int64_t channels, unit, count;
  bool occupy_threads, as_columns;

  // `bytes` are read for one sample. With `in_order`, nothing is summed.
  Groups(const Channels& s, int64_t bytes, bool as_columns, bool in_order)
      : channels(s.channels), as_columns(as_columns) {
    const int64_t threads = torch::stable::get_num_threads();
    occupy_threads = channels >= 2 * threads;
    int64_t size = occupy_threads ? std::max<int64_t>(channels / (4 * threads), 1) : 1;
    size = std::min({size, kMost, std::max<int64_t>(kBytes / (bytes * s.samples()), 1)});
    if (in_order) size = std::clamp<int64_t>(Planes::kElements / s.inner, 1, std::max<int64_t>(channels, 1));
    // So many channels end with a register, streamed or not.
    unit = as_columns ? 16 / std::gcd(s.inner, int64_t{16}) : 1;
    if (as_columns) size = std::min((size + unit - 1) / unit * unit, kColumns / s.inner / unit * unit);
    // As many groups for each thread, of nearly equal sizes.
    count = (channels + size - 1) / size;
    if (occupy_threads && !in_order) count = std::min((count + threads - 1) / threads * threads, units());
  }
  int64_t units() const { return (channels + unit - 1) / unit; }
  int64_t begin(int64_t group) const { return std::min(units() * group / count * unit, channels); }
  int64_t end(int64_t group) const { return begin(group + 1); }
};

// Sums over a chunk of each of `channels` channels: f(c)(run, j, lanes, terms) adds to terms[0..N-1], and what they
// come to goes to sums[c]. Short blocks are summed in A, blocks in fp64.
template <class A, int N, class F>
inline __attribute__((always_inline)) void reduce_runs(int64_t channels, int64_t runs, int64_t length, A (*sums)[N],
                                                       F&& f) {
  constexpr int64_t kHalf = 16 * kLanes<A>;
  constexpr int kUnroll = 2;
  Total<A> total[Groups::kMost][N];
  for (int64_t c = 0; c < channels; ++c) std::fill_n(total[c], N, Total<A>());
  const int64_t together = length < 16 * kLanes<A> ? 4 : 2;
  for (int64_t first = 0; first < runs; first += together) {
    const int64_t end = std::min(runs, first + together);
    for (int64_t c = 0; c < channels; ++c) {
      const auto element = f(c);
      Vec<A> part[2 * kUnroll][N] = {};
      int64_t pending = 0;
      auto add = [&](int64_t elements) __attribute__((always_inline)) {
        pending += elements;
        if (pending < 2 * kHalf) return;
        for (int n = 0; n < N; ++n) {
          for (int k = 1; k < 2 * kUnroll; ++k) part[0][n] += part[k][n];
          total[c][n] += part[0][n];
          for (int k = 0; k < 2 * kUnroll; ++k) part[k][n] = Vec<A>{};
        }
        pending = 0;
      };
      int64_t run = first;
      for (; run + 2 <= end; run += 2) {
        for (int64_t begin = 0; begin < length; begin += kHalf) {
          const int64_t stop = std::min(length, begin + kHalf);
          sweep<A, kUnroll>(begin, stop, [&](int64_t j, auto lanes, int k) __attribute__((always_inline)) {
            element(run, j, lanes, part[k]);
            element(run + 1, j, lanes, part[kUnroll + k]);
          });
          add(2 * (stop - begin));
        }
      }
      if (run < end) {
        for (int64_t begin = 0; begin < length; begin += 2 * kHalf) {
          const int64_t stop = std::min(length, begin + 2 * kHalf);
          sweep<A, 2 * kUnroll>(begin, stop, [&](int64_t j, auto lanes, int k) __attribute__((always_inline)) {
            element(run, j, lanes, part[k]);
          });
          add(stop - begin);
        }
      }
      if (pending > 0) add(2 * kHalf);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int n = 0; n < N; ++n) sums[c][n] = total[c][n].sum();
  }
}

// ---- chunks of rows -------------------------------------------------------------------------------------------------

// Rows of `width` columns, a whole number of periods of channels x inner elements; the last row may be shorter.
struct RowCut {
  static constexpr int64_t kMostRows = 128, kFewestChunks = 16, kWidest = 4096, kColumns = 64;
  static constexpr int64_t kTogether = 16;      // rows whose terms are summed before they join the sums of a chunk
  static constexpr int64_t kVisited = 1 << 14;  // elements walked by columns, which should stay in the caches
  static constexpr int64_t kNarrow = 64;        // wider rows are best walked nearly in the order of memory,
  static constexpr int64_t kStreams = 4;        // or in so many streams
  int64_t width, count, last, rows, chunks;     // rows per chunk

  RowCut(const Channels& s, bool dense, bool mask) {
    const int64_t period = s.channels * s.inner;
    const int64_t vectors = kColumns / std::gcd(period, kColumns), bytes = 8 / std::gcd(period, int64_t{8});
    width = period;
    // Whole registers, unless merging so many columns would cost more than it gains.
    const int64_t longest = std::min(kWidest, s.numel() / (kFewestChunks * kTogether));
    if (dense) width *= period * vectors <= longest ? vectors : (mask ? bytes : 1);
    count = (s.numel() + width - 1) / width;
    last = s.numel() - (count - 1) * width;
    rows = std::clamp<int64_t>(count / kFewestChunks / kTogether, 1, kMostRows / kTogether) * kTogether;
    chunks = (count + rows - 1) / rows;
  }

  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t end(int64_t chunk) const { return std::min(count, (chunk + 1) * rows); }
  // Is the last row of a chunk the short one?
  bool shorter(int64_t chunk) const { return end(chunk) == count && last < width; }
  // Samples of a column in a chunk.
  int64_t samples(int64_t chunk, int64_t column) const {
    return end(chunk) - begin(chunk) - (shorter(chunk) && column >= last);
  }
};

// f(row, step, rows, columns) over rows first .. end - 1, some at a time, `step` apart; the short last row comes alone.
// Rows of several streams are read together, which memory serves faster than one stream.
template <bool Written, class F>
inline __attribute__((always_inline)) void over_rows(const RowCut& cut, int64_t first, int64_t end, F&& f) {
  const int64_t full = end == cut.count && cut.last < cut.width ? end - 1 : end;
  const bool wide = cut.width > RowCut::kNarrow;
  int64_t row = first;
  if (!Written && wide) {
    const int64_t step = (full - first) / RowCut::kStreams;
    for (; row < first + step; ++row) f(row, step, RowCut::kStreams, cut.width);
    row = first + step * RowCut::kStreams;
  }
  const int64_t block = std::max<int64_t>(RowCut::kVisited / cut.width / RowCut::kTogether, 1) * RowCut::kTogether;
  const int64_t some = wide ? 1 : block;
  for (; row < full; row += some) f(row, int64_t{1}, std::min(some, full - row), cut.width);
  if (full < end) f(full, int64_t{1}, int64_t{1}, cut.last);
}

// f.operator()<K>(j, lanes): K registers of neighbouring columns from j on. What belongs to the columns stays in
// registers while a loop inside f goes over the rows. One register at a time is enough where much is done with it.
template <class A, bool Much, class F>
inline __attribute__((always_inline)) void over_strips(int64_t columns, F&& f) {
  constexpr int L = kLanes<A>, K = Much ? 1 : kVecBytes == 64 ? 4 : 2;
  int64_t j = 0;
  if constexpr (K > 1) {
    for (; j + K * L <= columns; j += K * L) f.template operator()<K>(j, Full{});
  }
  for (; j + L <= columns; j += L) f.template operator()<1>(j, Full{});
  if (j < columns) f.template operator()<1>(j, Tail{static_cast<int>(columns - j)});
}

// ---- what belongs to a channel --------------------------------------------------------------------------------------

// See ChannelForward and ChannelBackward; kDrift = -rest rstd, for x^ = (x - mean) rstd + drift.
enum Value { kMean, kScale, kShift, kOffset, kSlope, kRstd, kDrift };

// The first N of them in registers,
template <int N, class A>
struct Constants {
  Vec<A> value[N];
  Vec<A> operator[](int i) const { return value[i]; }
};

// of one channel,
template <int N, class A, class V>
inline __attribute__((always_inline)) Constants<N, A> of_channel(const V& values, int64_t c) {
  Constants<N, A> k;
  for (int i = 0; i < N; ++i) k.value[i] = broadcast(values[i][c]);
  return k;
}
// or of one column of rows per lane.
template <int N, class A, class V, class L>
inline __attribute__((always_inline)) Constants<N, A> of_columns(const V& values, int64_t j, L lanes) {
  Constants<N, A> k;
  for (int i = 0; i < N; ++i) k.value[i] = load(values[i] + j, lanes);
  return k;
}

// f(j, lanes, constants) over a run of each of `channels` channels, which follow one another in memory: first `head`
// elements, then whole registers, of which some hold elements of two runs. j counts from the first; the constants of
// run c are values[i][first + c]. Runs are no shorter than a register.
template <int N, int Unroll, class A, class V, class F>
inline __attribute__((always_inline)) void over_neighbours(int64_t channels, int64_t length, int64_t head,
                                                           const V& values, int64_t first, const F& f) {
  constexpr int L = kLanes<A>;
  auto k = of_channel<N, A>(values, first);
  int64_t j = head;
  if (head > 0) f(int64_t{0}, Tail{static_cast<int>(head)}, k);
  for (int64_t c = 1; c <= channels; ++c) {
    const int64_t end = c * length, whole = j + (end - j) / L * L;
    sweep<A, Unroll>(j, whole, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) { f(i, lanes, k); });
    const Tail rest{static_cast<int>(end - whole)};
    j = whole;
    if (c == channels) {
      if (rest.n > 0) f(j, rest, k);
      return;
    }
    const auto next = of_channel<N, A>(values, first + c);
    if (rest.n > 0) {
      Constants<N, A> shared;
      for (int i = 0; i < N; ++i) shared.value[i] = select<A>(rest, k[i], next[i]);
      f(j, Full{}, shared);
      j += L;
    }
    k = next;
  }
}

// Adds to sums[n][j], for each of `columns` columns, what f(r)(j, lanes, constants, terms) adds to terms[n] over `rows`
// rows r; values[i][j] are the constants. A few rows at a time are summed before they join the sums.
template <int N, int Values, bool Much, class A, class V, class F>
inline __attribute__((always_inline)) void add_columns(int64_t rows, int64_t columns, const V& values,
                                                       A* const (&sums)[N], const F& f) {
  over_strips<A, Much>(columns, [&]<int K>(int64_t j, auto lanes) __attribute__((always_inline)) {
    constexpr int L = kLanes<A>;
    Constants<Values, A> c[K];
    Vec<A> sum[K][N];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      c[k] = of_columns<Values, A>(values, j + k * L, lanes);
      for (int n = 0; n < N; ++n) sum[k][n] = load(sums[n] + j + k * L, lanes);
    }
    for (int64_t r = 0; r < rows;) {
      Vec<A> part[K][N] = {};
      for (const int64_t end = std::min(rows, r + RowCut::kTogether); r < end; ++r) {
        const auto element = f(r);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) element(j + k * L, lanes, c[k], part[k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < N; ++n) sum[k][n] += part[k][n];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < N; ++n) store(sums[n] + j + k * L, sum[k][n], lanes);
    }
  });
}

// What belongs to the columns of a group of short planes, N values of each.
template <int N, class A>
struct Columns {
  alignas(64) A value[N][Groups::kColumns];

  A* operator[](int i) { return value[i]; }
  const A* operator[](int i) const { return value[i]; }
  // values[i][c] for each column of channel c, of `channels` channels from `first` on.
  template <class V>
  void fill(const V& values, int64_t first, int64_t channels, int64_t length) {
    for (int i = 0; i < N; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const auto v = broadcast<A>(values[i][first + c]);
        sweep<A, 1>(0, length, [&](int64_t j, auto lanes, int) { store(value[i] + c * length + j, v, lanes); });
      }
    }
  }
};

// reduce_runs for short planes, whose columns are those of a row: f(run)(j, lanes, constants, terms).
template <int N, int Values, bool Much, class A, class F>
inline __attribute__((always_inline)) void reduce_short_runs(int64_t channels, int64_t runs, int64_t length,
                                                             const Columns<Values, A>& values, A (*sums)[N],
                                                             const F& f) {
  Columns<N, A> columns;
  A* at[N];
  for (int n = 0; n < N; ++n) at[n] = columns[n], std::fill_n(at[n], channels * length, A(0));
  for (int64_t run = 0; run < runs; run += RowCut::kStreams) {
    add_columns<N, Values, Much>(std::min(RowCut::kStreams, runs - run), channels * length, values, at,
                                 [&](int64_t r) __attribute__((always_inline)) { return f(run + r); });
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int n = 0; n < N; ++n) {
      Total<A> total;
      sweep<A, 1>(c * length, (c + 1) * length, [&](int64_t j, auto lanes, int) { total += load(at[n] + j, lanes); });
      sums[c][n] = total.sum();
    }
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

// What follows normalization; the mask stands for the sign of z in a backward. Kernels are compiled for each of these;
// what else differs, the flags below, is looked up for every register where that costs little.
enum Mode { kPlain, kRectified, kMasked, kWithSilu, kWithGelu };

// Is a register of elements work for many instructions?
inline constexpr bool much(Mode m) { return m == kWithSilu || m == kWithGelu; }

inline Mode mode_of(int64_t activation, bool masked) {
  if (masked) return kMasked;
  if (activation == kIdentity) return kPlain;
  return activation == kSilu ? kWithSilu : activation == kGelu ? kWithGelu : kRectified;
}

template <class A>
struct Shape {
  Vec<A> slope;
  Lanes<A> keep;  // relu: what is below becomes 0, whatever it was

  Shape(int64_t activation, double slope)
      : slope(broadcast(static_cast<A>(activation == kLeakyRelu ? slope : 0.0))),
        keep(Lanes<A>{} - (activation == kLeakyRelu)) {}
  Vec<A> low(Vec<A> v) const { return (Vec<A>)((Lanes<A>)(v * slope) & keep); }
};

template <Mode M, class A>
inline Vec<A> activate(Vec<A> z, const Shape<A>& shape) {
  if constexpr (M == kRectified || M == kMasked) return rectified(z, shape.low(z));
  if constexpr (M == kWithSilu) return silu<VecMath>(z);
  if constexpr (M == kWithGelu) return gelu<VecMath>(z);
  return z;
}

template <Mode M, class A>
inline Vec<A> activate_backward(Vec<A> g, Vec<A> z, const Shape<A>& shape) {
  if constexpr (M == kRectified) return rectified_gradient(g, z, shape.low(g));
  if constexpr (M == kWithSilu) return silu_gradient<VecMath>(g, z);
  if constexpr (M == kWithGelu) return gelu_gradient<VecMath>(g, z);
  return g;
}

// ---- one register of elements ---------------------------------------------------------------------------------------

// Where a run begins in each tensor; what is absent is null.
template <class T>
struct Run {
  const T *x, *residual, *dy;
  T *y, *dx, *dresidual;
  RunBits bits;
};

// f(j, lanes) over a run that is stored from `p` on.
template <int Unroll, class T, class F>
inline __attribute__((always_inline)) void sweep_run(int64_t length, const T* p, bool past_caches, F&& f) {
  const auto element = [&](int64_t j, auto lanes, int) __attribute__((always_inline)) { f(j, lanes); };
  past_caches ? sweep_stored<true, Unroll>(p, length, element) : sweep_stored<false, Unroll>(p, length, element);
}

// What a call reads and writes, looked up for every register,
struct Flags {
  bool streaming, residual, training = false, dx = false, dresidual = false;
};
// or known when a loop is compiled.
template <Flags F>
struct Fixed {
  static constexpr bool streaming = F.streaming, residual = F.residual;
  static constexpr bool training = F.training, dx = F.dx, dresidual = F.dresidual;
};

// How far on, in each tensor, the same elements of what is worked on next lie. They are fetched during a pass over what
// the caches hold, when memory would be idle: of tensors that no cache holds as a whole. A cache line is fetched once,
// by the first register in it.
struct Ahead {
  int64_t x, dy, residual;

  template <class T, class F>
  inline __attribute__((always_inline)) void fetch(const Run<T>& run, int64_t j, const F& flags) const {
    if (!flags.streaming) return;
    constexpr size_t kBytes = kLanes<Acc<T>> * sizeof(T);
    if (kBytes < 64 && reinterpret_cast<uintptr_t>(run.x + j) % 64 >= kBytes) return;
    __builtin_prefetch(run.x + j + x, 0, 2);
    if (run.dy) __builtin_prefetch(run.dy + j + dy, 0, 2);
    if (flags.residual) __builtin_prefetch(run.residual + j + residual, 0, 2);
  }
};

// run(flags), which are fixed where looking them up takes as long as the arithmetic, for what calls usually ask for.
template <Mode M, class F>
void with_forward_flags(const Flags& flags, const F& run) {
  if constexpr (much(M)) {
    run(flags);
  } else if (flags.residual) {
    flags.streaming ? run(Fixed<Flags{true, true}>{}) : run(Fixed<Flags{false, true}>{});
  } else {
    flags.streaming ? run(Fixed<Flags{true, false}>{}) : run(Fixed<Flags{false, false}>{});
  }
}
template <Mode M, class F>
void with_backward_flags(const Flags& flags, const F& run) {
  constexpr bool kDresidual = M == kMasked;
  if constexpr (!much(M)) {
    if (flags.training && flags.dx && !flags.residual && flags.dresidual == kDresidual) {
      return flags.streaming ? run(Fixed<Flags{true, false, true, true, kDresidual}>{})
                             : run(Fixed<Flags{false, false, true, true, kDresidual}>{});
    }
  }
  run(flags);
}

template <class T, class L>
inline __attribute__((always_inline)) void put(T* p, Vec<Acc<T>> v, L lanes, bool past_caches) {
  past_caches ? stream(p, v, lanes) : store(p, v, lanes);
}

template <Mode M, class T, class L, class C, class F, class A = Acc<T>>
inline __attribute__((always_inline)) void forward_step(const Run<T>& run, int64_t j, L lanes, const C& c,
                                                        const Shape<A>& shape, const F& flags) {
  const ChannelForward<Vec<A>> normalize{c[kMean], c[kScale], c[kShift]};
  auto z = normalize(load(run.x + j, lanes));
  if (flags.residual) z += load(run.residual + j, lanes);
  if constexpr (M == kMasked) run.bits.template store<A>(j, to_bits<A>(~(z <= Vec<A>{})), lanes);
  put(run.y + j, activate<M, A>(z, shape), lanes, flags.streaming);
}

// g = dy activation'(z); lanes beyond the tail are 0 in every mode, for dy is.
template <Mode M, class T, class L, class C, class A = Acc<T>>
inline __attribute__((always_inline)) Vec<A> gradient(const Run<T>& run, int64_t j, L lanes, Vec<A> x, const C& c,
                                                      const Shape<A>& shape, bool residual) {
  const auto g = load(run.dy + j, lanes);
  if constexpr (M == kPlain) return g;
  if constexpr (M == kMasked) return from_bits<A>(run.bits.template load<A>(j, lanes)) ? g : shape.low(g);
  const ChannelForward<Vec<A>> normalize{c[kMean], c[kScale], c[kShift]};
  auto z = normalize(x);
  if (residual) z += load(run.residual + j, lanes);
  return keep<A>(activate_backward<M, A>(g, z, shape), lanes);
}

// Adds g and g x^ to sums.
template <Mode M, class T, class L, class C, class A = Acc<T>>
inline __attribute__((always_inline)) void sum_step(const Run<T>& run, int64_t j, L lanes, const C& c,
                                                    const Shape<A>& shape, Vec<A>* sums) {
  const auto x = load(run.x + j, lanes);
  const auto g = gradient<M>(run, j, lanes, x, c, shape, run.residual);
  sums[0] += g;
  sums[1] += g * ((x - c[kMean]) * c[kRstd] + c[kDrift]);
}

template <Mode M, class T, class L, class C, class F, class A = Acc<T>>
inline __attribute__((always_inline)) void backward_step(const Run<T>& run, int64_t j, L lanes, const C& c,
                                                         const Shape<A>& shape, const F& flags) {
  const bool read = M == kRectified || much(M) || (flags.training && flags.dx);
  const auto x = read ? load(run.x + j, lanes) : Vec<A>{};
  const auto g = gradient<M>(run, j, lanes, x, c, shape, flags.residual);
  if (flags.dresidual) put(run.dresidual + j, g, lanes, flags.streaming);
  if (!flags.dx) return;
  if (flags.training) {
    const ChannelBackward<Vec<A>> dx{c[kMean], c[kScale], c[kOffset], c[kSlope]};
    put(run.dx + j, dx(g, x), lanes, flags.streaming);
  } else {
    put(run.dx + j, c[kScale] * g, lanes, flags.streaming);
  }
}

// run.operator()<M>() for what a call asks for.
template <class F>
void with_mode(Mode mode, const F& run) {
  switch (mode) {
    case kPlain:
      return run.template operator()<kPlain>();
    case kRectified:
      return run.template operator()<kRectified>();
    case kMasked:
      return run.template operator()<kMasked>();
    case kWithSilu:
      return run.template operator()<kWithSilu>();
    case kWithGelu:
      return run.template operator()<kWithGelu>();
  }
}

}  // namespace fusedtricks::FT_ISA
