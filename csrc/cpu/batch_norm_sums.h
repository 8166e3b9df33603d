// The sums of batch normalization on the CPU: statistics of x in the forward, sums of g and g x^ in the backward.
#pragma once

#include <cmath>
#include <limits>

#include "batch_norm.h"
#include "math/norm.h"

namespace fusedtricks::FT_ISA {

// Chunks are merged in a type of about twice the digits, with exponents for the squares of anything.
template <class A>
using Wide = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// ---- statistics of a plane chunk ------------------------------------------------------------------------------------

template <class T, class A = Acc<T>>
inline std::pair<A, A> moments(const T* x, int64_t outer, int64_t runs, int64_t length, A shift, A scale) {
  A sums[2];
  reduce_runs<A>(runs, length, sums, [&](int64_t run, int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
    const auto d = keep<A>(load(x + run * outer + j, lanes) - shift, lanes) * scale;
    s[0] += d;
    s[1] += d * d;
  });
  return {sums[0], sums[1]};
}

// One pass, shifted by the mean of the first elements; again where that was a poor shift, or where squares overflow.
template <class T, class A = Acc<T>>
inline ShiftedSums<A> measure(const T* x, int64_t outer, int64_t runs, int64_t length) {
  const A count = static_cast<A>(runs * length);
  ShiftedSums<A> s{0, 0, 0, 1};
  const int lanes = static_cast<int>(std::min<int64_t>(length, kLanes<A>));
  const auto near = load(x, Tail{lanes});
  s.shift = sum_lanes<A>(near) / static_cast<A>(lanes);
  const auto off = keep<A>(near - s.shift, Tail{lanes});
  s.shift = coarse(s.shift, sum_lanes<A>(off < Vec<A>{} ? -off : off), kDigits<A>);
  std::tie(s.d, s.d2) = moments(x, outer, runs, length, s.shift, A(1));
  if (!(s.d2 <= std::numeric_limits<A>::max())) {
    s.unscale = 1 / kOverflowScale<A>;
    std::tie(s.d, s.d2) = moments(x, outer, runs, length, s.shift, kOverflowScale<A>);
  }
  if (poorly_shifted(s.d, s.d2, count)) {
    s.shift += s.d / count * s.unscale;
    std::tie(s.d, s.d2) = moments(x, outer, runs, length, s.shift, 1 / s.unscale);
  }
  return s;
}

// ---- statistics of a row chunk --------------------------------------------------------------------------------------

// Per column of one chunk, each `width` long: shift, d, d2, unscale.
template <class A>
struct ColumnSums {
  A *shift, *d, *d2, *unscale;

  ColumnSums(A* at, int64_t width) : shift(at), d(at + width), d2(at + 2 * width), unscale(at + 3 * width) {}
  ShiftedSums<A> operator[](int64_t j) const { return {shift[j], d[j], d2[j], unscale[j]}; }
};

template <class T, class A = Acc<T>>
inline void column_moments(const RowCut& cut, int64_t chunk, const T* x, int64_t stride, const ColumnSums<A>& s) {
  std::fill_n(s.d, cut.width, A(0));
  std::fill_n(s.d2, cut.width, A(0));
  over_rows(cut, chunk, [&]<int Count>(int64_t row, int64_t columns) __attribute__((always_inline)) {
    const T* from = x + row * stride;
    sweep<A, 1>(0, columns, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
      const auto shift = load(s.shift + j, lanes), scale = 1 / load(s.unscale + j, Full{});
      Vec<A> sum{}, square{};
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        const auto d = (load(from + i * stride + j, lanes) - shift) * scale;
        sum += d;
        square += d * d;
      }
      store(s.d + j, load(s.d + j, lanes) + sum, lanes);
      store(s.d2 + j, load(s.d2 + j, lanes) + square, lanes);
    });
  });
}

template <class T, class A = Acc<T>>
inline void measure_columns(const RowCut& cut, int64_t chunk, const T* x, int64_t stride, const ColumnSums<A>& s) {
  const int64_t first = cut.begin(chunk), rows = std::min<int64_t>(RowCut::kTogether, cut.end(chunk) - first);
  const bool shorter = cut.end(chunk) == cut.count && cut.last < cut.width;
  // The shift is the mean of the first rows; columns that only the short last row has, or no row, do with any.
  const int64_t full = rows - (shorter && first + rows == cut.count);
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
  column_moments(cut, chunk, x, stride, s);
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
    column_moments(cut, chunk, x, stride, s);
  }
  const A most = static_cast<A>(cut.end(chunk) - first);
  if (any([&](Vec<A> d, Vec<A> d2) { return d * d > (A(0.5) * std::max<A>(most - 1, 1)) * d2; })) {
    for (int64_t j = 0; j < cut.width; ++j) {
      const A count = static_cast<A>(cut.samples(chunk, j));
      if (count > 0) s.shift[j] += s.d[j] / count * s.unscale[j];
    }
    column_moments(cut, chunk, x, stride, s);
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

// f(c, j, chunk, samples) over all chunks of all columns that belong to channels first .. last - 1, in memory's order.
template <class F>
inline __attribute__((always_inline)) void over_columns(const RowCut& cut, const Channels& s, int64_t first,
                                                        int64_t last, F&& f) {
  for (int64_t start = 0; start < cut.width; start += s.channels * s.inner) {
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const int64_t samples = cut.end(chunk) - cut.begin(chunk);
      const bool shorter = cut.end(chunk) == cut.count && cut.last < cut.width;
      for (int64_t c = first; c < last; ++c) {
        for (int64_t i = 0; i < s.inner; ++i) {
          const int64_t j = start + c * s.inner + i;
          f(c, j, chunk, samples - (shorter && j >= cut.last));
        }
      }
    }
  }
}

inline constexpr int64_t kMergedChannels = 16;  // merged together

template <class A>
inline void merge_columns(const RowCut& cut, const Channels& s, A* parts, int64_t first, int64_t last,
                          const Statistics<A>& out) {
  Wide<A> sum[kMergedChannels] = {}, square[kMergedChannels] = {};
  auto part = [&](int64_t j, int64_t chunk) { return ColumnSums<A>(parts + chunk * 4 * cut.width, cut.width)[j]; };
  over_columns(cut, s, first, last, [&](int64_t c, int64_t j, int64_t chunk, int64_t samples) {
    sum[c - first] += part_sum(part(j, chunk), static_cast<Wide<A>>(samples));
  });
  for (int64_t c = 0; c < last - first; ++c) sum[c] /= static_cast<Wide<A>>(out.samples);
  over_columns(cut, s, first, last, [&](int64_t c, int64_t j, int64_t chunk, int64_t samples) {
    square[c - first] += part_square(part(j, chunk), static_cast<Wide<A>>(samples), sum[c - first]);
  });
  for (int64_t c = first; c < last; ++c) out.finish(c, sum[c - first], square[c - first]);
}

// ---- sums of the backward -------------------------------------------------------------------------------------------

// What x^ = (x - mean) rstd - rest rstd needs.
template <class P>
struct Normalizing {
  P mean, rstd, shift;  // shift = -rest rstd
};

template <Mode M, bool Add, class P, class T, class A = Acc<T>>
inline std::array<A, 2> gradient_sums(const Run<T>& first, int64_t outer[4], int64_t bits_stride, int64_t runs,
                                      int64_t length, const Parameters<P>& p, const Normalizing<P>& n,
                                      const Slope<A>& slope) {
  A sums[2];
  reduce_runs<A>(runs, length, sums, [&](int64_t r, int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
    Run<T> run = first;
    run.x += r * outer[0], run.dy += r * outer[1];
    if (Add) run.residual += r * outer[2];
    if (M == kMasked) run.bits += r * bits_stride;
    const auto x = load(run.x + j, lanes);
    const auto g = gradient<M, Add>(run, j, lanes, x, p, slope);
    s[0] += g;
    s[1] += g * ((x - n.mean.at(j, lanes)) * n.rstd.at(j, lanes) + n.shift.at(j, lanes));
  });
  return {sums[0], sums[1]};
}

// The same per column of a chunk of rows, added to sum_g and sum_gx.
template <int Count, Mode M, bool Add, class P, class T, class A = Acc<T>>
inline void add_gradient_sums(const Run<T>& first, const int64_t strides[3], int64_t bits_stride, int64_t columns,
                              const Parameters<P>& p, const Normalizing<P>& n, const Slope<A>& slope, A* sum_g,
                              A* sum_gx) {
  sweep<A, 1>(0, columns, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    const auto mean = n.mean.at(j, lanes), rstd = n.rstd.at(j, lanes), shift = n.shift.at(j, lanes);
    Vec<A> sum{}, product{};
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      Run<T> run = first;
      run.x += i * strides[0], run.dy += i * strides[1];
      if (Add) run.residual += i * strides[2];
      if (M == kMasked) run.bits += i * bits_stride;
      const auto x = load(run.x + j, lanes);
      const auto g = gradient<M, Add>(run, j, lanes, x, p, slope);
      sum += g;
      product += g * ((x - mean) * rstd + shift);
    }
    store(sum_g + j, load(sum_g + j, lanes) + sum, lanes);
    store(sum_gx + j, load(sum_gx + j, lanes) + product, lanes);
  });
}

}  // namespace fusedtricks::FT_ISA
