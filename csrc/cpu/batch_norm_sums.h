// The sums of batch normalization on the CPU: statistics of x in the forward, sums of g and g x^ in the backward.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "batch_norm.h"
#include "math/norm.h"

namespace fusedtricks::FT_ISA {

// Chunks are merged in a type of about twice the digits, with exponents for the squares of anything.
template <class A>
using Wide = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// ---- statistics of a plane chunk ------------------------------------------------------------------------------------

// A shift near the mean of the elements from x on: the mean of the first of them.
template <class T, class A = Acc<T>>
inline A first_shift(const T* x, int64_t length) {
  const int lanes = static_cast<int>(std::min<int64_t>(length, kLanes<A>));
  const auto near = load(x, Tail{lanes});
  const A shift = sum_lanes<A>(near) / static_cast<A>(lanes);
  const auto off = keep<A>(near - shift, Tail{lanes});
  return coarse(shift, sum_lanes<A>(off < Vec<A>{} ? -off : off), kDigits<A>);
}

// The sums of one channel anew.
template <class T, class A = Acc<T>>
__attribute__((noinline)) void moments_again(const T* x, int64_t outer, int64_t runs, int64_t length, A scale,
                                             ShiftedSums<A>& s) {
  A sums[1][2];
  s.unscale = 1 / scale;
  reduce_runs<A, 2>(1, runs, length, sums, [&](int64_t) {
    return [&](int64_t run, int64_t j, auto lanes, Vec<A>* to) __attribute__((always_inline)) {
      const auto d = keep<A>(load(x + run * outer + j, lanes) - s.shift, lanes) * scale;
      to[0] += d;
      to[1] += d * d;
    };
  });
  s.d = sums[0][0], s.d2 = sums[0][1];
}

// What of(c) gives for the c-th of `channels` channels, which lie `channel` elements apart: one pass, shifted by the
// mean of the first elements; again for a channel where that was a poor shift, or where squares overflow.
template <class T, class Of, class A = Acc<T>>
__attribute__((noinline)) void measure(const T* x, int64_t channel, int64_t channels, int64_t outer, int64_t runs,
                                       int64_t length, bool as_columns, const Of& of) {
  const A count = static_cast<A>(runs * length);
  A shift[Groups::kMost], sums[Groups::kMost][2];
  for (int64_t c = 0; c < channels; ++c) shift[c] = first_shift(x + c * channel, length);
  auto add = [](Vec<A> d, Vec<A>* to) __attribute__((always_inline)) {
    to[0] += d;
    to[1] += d * d;
  };
  if (as_columns) {
    Columns<1, A> near;
    near.fill(std::array<const A*, 1>{shift}, 0, channels, length);
    reduce_short_runs<2, 1, false>(channels, runs, length, near, sums, [&](int64_t run) __attribute__((always_inline)) {
      return [&, from = x + run * outer](int64_t j, auto lanes, const auto& k, Vec<A>* to)
                 __attribute__((always_inline)) { add(load(from + j, lanes) - k[0], to); };
    });
  } else {
    reduce_runs<A, 2>(channels, runs, length, sums, [&](int64_t c) __attribute__((always_inline)) {
      return
          [&, from = x + c * channel, near = shift[c]](int64_t run, int64_t j, auto lanes, Vec<A>* to)
              __attribute__((always_inline)) { add(keep<A>(load(from + run * outer + j, lanes) - near, lanes), to); };
    });
  }
  for (int64_t c = 0; c < channels; ++c) {
    ShiftedSums<A>& s = of(c) = {shift[c], sums[c][0], sums[c][1], 1};
    if (!(s.d2 <= std::numeric_limits<A>::max())) {
      moments_again(x + c * channel, outer, runs, length, kOverflowScale<A>, s);
    }
    if (poorly_shifted(s.d, s.d2, count)) {
      s.shift += s.d / count * s.unscale;
      moments_again(x + c * channel, outer, runs, length, 1 / s.unscale, s);
    }
  }
}

// ---- statistics of a row chunk --------------------------------------------------------------------------------------

// Per column of one chunk, each `width` long: shift, d, d2, unscale.
template <class A>
struct ColumnSums {
  A *shift, *d, *d2, *unscale;

  ColumnSums(A* at, int64_t width) : shift(at), d(at + width), d2(at + 2 * width), unscale(at + 3 * width) {}
  ShiftedSums<A> operator[](int64_t j) const { return {shift[j], d[j], d2[j], unscale[j]}; }
};

// Scaled: by 1 / unscale, which otherwise is 1.
template <bool Scaled, class T, class A = Acc<T>>
inline void column_moments(const RowCut& cut, int64_t chunk, const T* x, int64_t stride, const ColumnSums<A>& s) {
  std::fill_n(s.d, cut.width, A(0));
  std::fill_n(s.d2, cut.width, A(0));
  const std::array<const A*, 2> values{s.shift, s.unscale};
  over_rows<false>(
      cut, cut.begin(chunk), cut.end(chunk), [&](int64_t row, int64_t step, int64_t rows, int64_t columns) {
        add_columns<2, Scaled ? 2 : 1, false>(
            rows, columns, values, {s.d, s.d2}, [&](int64_t r) __attribute__((always_inline)) {
              return [from = x + (row + r * step) * stride](int64_t j, auto lanes, const auto& k, Vec<A>* to)
                         __attribute__((always_inline)) {
                           auto d = load(from + j, lanes) - k[0];
                           if constexpr (Scaled) d /= k[1];
                           to[0] += d;
                           to[1] += d * d;
                         };
            });
      });
}

inline constexpr int64_t kShifting = 8;  // rows whose mean is the shift

template <class T, class A = Acc<T>>
inline void measure_columns(const RowCut& cut, int64_t chunk, const T* x, int64_t stride, const ColumnSums<A>& s) {
  const int64_t first = cut.begin(chunk), rows = std::min<int64_t>(kShifting, cut.end(chunk) - first);
  // The shift is the mean of the first rows; columns that only the short last row has, or no row, do with any.
  const int64_t full = rows - (cut.shorter(chunk) && first + rows == cut.count);
  sweep<A, 1>(0, cut.width, [&](int64_t j, auto lanes, int) {
    Vec<A> sum{};
    for (int64_t i = 0; i < full; ++i) sum += load(x + (first + i) * stride + j, lanes);
    const auto center = full ? sum / static_cast<A>(full) : sum;
    Vec<A> spread{};
    for (int64_t i = 0; i < full; ++i) {
      const auto off = load(x + (first + i) * stride + j, lanes) - center;
      spread += off < Vec<A>{} ? -off : off;
    }
    store(s.shift + j, coarse(center, spread, kDigits<A>), lanes);
    store(s.unscale + j, broadcast(A(1)), lanes);
  });
  column_moments<false>(cut, chunk, x, stride, s);
  // Registers of columns are looked at first, so that what is rare costs little.
  auto any = [&](auto&& wrong) {
    bool found = false;
    for (int64_t j = 0; j < cut.width; j += kLanes<A>) {
      const Tail lanes{static_cast<int>(std::min<int64_t>(kLanes<A>, cut.width - j))};
      found = found || to_bits<A>(wrong(load(s.d + j, lanes), load(s.d2 + j, lanes)));
    }
    return found;
  };
  if (any([](Vec<A>, Vec<A> d2) { return ~(d2 <= std::numeric_limits<A>::max()); })) {
    for (int64_t j = 0; j < cut.width; ++j) {
      if (!(s.d2[j] <= std::numeric_limits<A>::max())) s.unscale[j] = 1 / kOverflowScale<A>;
    }
    column_moments<true>(cut, chunk, x, stride, s);
  }
  const A most = static_cast<A>(cut.end(chunk) - first);
  if (any([&](Vec<A> d, Vec<A> d2) { return d * d > (A(0.8) * std::max<A>(most - 1, 1)) * d2; })) {
    for (int64_t j = 0; j < cut.width; ++j) {
      const A count = static_cast<A>(cut.samples(chunk, j));
      if (count > 0) s.shift[j] += s.d[j] / count * s.unscale[j];
    }
    column_moments<true>(cut, chunk, x, stride, s);
  }
}

// ---- merging --------------------------------------------------------------------------------------------------------

// Where the statistics of a channel go: stats (4, C) and the running statistics.
template <class A>
struct Statistics {
  A* stats;
  int64_t channels, samples;
  double eps;

  void finish(int64_t c, Wide<A> mean, Wide<A> square) const {
    const auto var = square > 0 || square != square ? square / static_cast<Wide<A>>(samples) : Wide<A>(0);
    const auto center = coarse(static_cast<A>(mean), static_cast<A>(std::sqrt(var)), kDigits<A>);
    stats[c] = std::abs(center) <= std::numeric_limits<A>::max() ? center : static_cast<A>(mean);
    stats[channels + c] = static_cast<A>(mean - stats[c]);
    stats[2 * channels + c] = static_cast<A>(1 / std::sqrt(var + static_cast<Wide<A>>(eps)));
    stats[3 * channels + c] = static_cast<A>(var);
  }
};

template <class A>
inline void merge_planes(const Planes& cut, const Channels& s, const ShiftedSums<A>* parts, int64_t c,
                         const Statistics<A>& out) {
  Wide<A> sum = 0, square = 0;
  auto count = [&](int64_t i) { return static_cast<Wide<A>>(cut.chunk(s, i).samples()); };
  for (int64_t i = 0; i < cut.chunks; ++i) sum += part_sum(parts[i], count(i));
  const auto mean = sum / static_cast<Wide<A>>(out.samples);
  for (int64_t i = 0; i < cut.chunks; ++i) square += part_square(parts[i], count(i), mean);
  out.finish(c, mean, square);
}

inline constexpr int64_t kMergedColumns = 16;  // merged together

// to[j] = the sum over all chunks, in their order, of f(chunk)(j, samples of column j in it).
template <class W, class F>
inline void merge_chunks(const RowCut& cut, W* to, const F& f) {
  const int64_t groups = (cut.width + kMergedColumns - 1) / kMergedColumns;
  parallel(groups, cut.chunks * kMergedColumns, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kMergedColumns, last = std::min(cut.width, end * kMergedColumns);
    std::fill(to + first, to + last, W(0));
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const auto part = f(chunk);
      const int64_t samples = cut.end(chunk) - cut.begin(chunk);
      const int64_t fewer = cut.shorter(chunk) ? std::clamp(cut.last, first, last) : last;
      const auto most = static_cast<W>(samples), rest = static_cast<W>(samples - 1);
      for (int64_t j = first; j < fewer; ++j) to[j] += part(j, most);
      for (int64_t j = fewer; j < last; ++j) to[j] += part(j, rest);
    }
  });
}

// What the columns of a channel hold, added up and moved to values[c].
template <class W>
inline void sum_columns(const RowCut& cut, const Channels& s, W* values) {
  for (int64_t c = 0; c < s.channels; ++c) {
    W sum = 0;
    for (int64_t j = c * s.inner; j < cut.width; j += s.channels * s.inner) {
      for (int64_t i = 0; i < s.inner; ++i) sum += values[j + i];
    }
    values[c] = sum;  // of its own channel, or of one before
  }
}

// Repeat values per channel over the columns of a row.
template <class W>
inline void spread(const RowCut& cut, const Channels& s, W* values) {
  const int64_t period = s.channels * s.inner;
  for (int64_t c = s.channels; s.inner > 1 && c-- > 0;) std::fill_n(values + c * s.inner, s.inner, values[c]);
  for (int64_t j = period; j < cut.width; ++j) values[j] = values[j - period];
}

template <class A>
inline void merge_columns(const RowCut& cut, const Channels& s, A* parts, const Statistics<A>& out) {
  using W = Wide<A>;
  std::vector<W> mean(cut.width), square(cut.width);
  auto of_chunk = [&](int64_t chunk) { return ColumnSums<A>(parts + chunk * 4 * cut.width, cut.width); };
  merge_chunks(cut, mean.data(), [&](int64_t chunk) {
    return [sums = of_chunk(chunk)](int64_t j, W samples) { return part_sum(sums[j], samples); };
  });
  sum_columns(cut, s, mean.data());
  for (int64_t c = 0; c < s.channels; ++c) mean[c] /= static_cast<W>(out.samples);
  spread(cut, s, mean.data());
  merge_chunks(cut, square.data(), [&](int64_t chunk) {
    return [sums = of_chunk(chunk), center = mean.data()](int64_t j, W samples) {
      return part_square(sums[j], samples, center[j]);
    };
  });
  sum_columns(cut, s, square.data());
  parallel(s.channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) out.finish(c, mean[c * s.inner], square[c]);
  });
}

// ---- sums of the backward -------------------------------------------------------------------------------------------

// sums[c] of a chunk of channel first + c, for each of `channels` channels: its runs lie `outer` apart, the first of
// them is run_at(first + c), and values[i][first + c] belong to it.
template <Mode M, class T, class At, class V, class A = Acc<T>>
inline __attribute__((always_inline)) void gradient_sums(const At& run_at, const std::array<int64_t, 4>& outer,
                                                         int64_t first, int64_t channels, int64_t runs, int64_t length,
                                                         bool as_columns, const V& values, const Shape<A>& shape,
                                                         A (*sums)[2]) {
  constexpr int kConstants = kDrift + 1;
  auto at = [&](Run<T> run, int64_t r) __attribute__((always_inline)) {
    run.x += r * outer[0], run.dy += r * outer[1];
    if (run.residual) run.residual += r * outer[2];
    if (M == kMasked) run.bits.row += r * outer[3];
    return run;
  };
  if (M != kMasked && as_columns) {
    Columns<kConstants, A> of;
    of.fill(values, first, channels, length);
    return reduce_short_runs<2, kConstants, much(M)>(
        channels, runs, length, of, sums, [&, begin = run_at(first)](int64_t r) __attribute__((always_inline)) {
          return [&, run = at(begin, r)](int64_t j, auto lanes, const auto& k, Vec<A>* to)
                     __attribute__((always_inline)) { sum_step<M>(run, j, lanes, k, shape, to); };
        });
  }
  reduce_runs<A, 2>(channels, runs, length, sums, [&](int64_t c) __attribute__((always_inline)) {
    return [&, begin = run_at(first + c), k = of_channel<kConstants, A>(values, first + c)](int64_t r, int64_t j,
                                                                                            auto lanes, Vec<A>* to)
               __attribute__((always_inline)) { sum_step<M>(at(begin, r), j, lanes, k, shape, to); };
  });
}

// The same per column of a chunk of rows; run_at(row) is where a row begins.
template <Mode M, class T, class V, class At, class A = Acc<T>>
inline void column_gradient_sums(const RowCut& cut, int64_t chunk, const At& run_at, const V& values,
                                 const Shape<A>& shape, A* sum_g, A* sum_gx) {
  std::fill_n(sum_g, cut.width, A(0));
  std::fill_n(sum_gx, cut.width, A(0));
  over_rows<false>(cut, cut.begin(chunk), cut.end(chunk),
                   [&](int64_t row, int64_t step, int64_t rows, int64_t columns) {
                     add_columns<2, kDrift + 1, much(M)>(
                         rows, columns, values, {sum_g, sum_gx}, [&](int64_t r) __attribute__((always_inline)) {
                           return [&, run = run_at(row + r * step)](int64_t j, auto lanes, const auto& k, Vec<A>* to)
                                      __attribute__((always_inline)) { sum_step<M>(run, j, lanes, k, shape, to); };
                         });
                   });
}

}  // namespace fusedtricks::FT_ISA
