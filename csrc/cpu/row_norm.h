// Layer and RMS normalization over rows, on the CPU: everything of layer_norm.cpp and rms_norm.cpp but the signatures.
// Center is true for layer normalization.
//
// A row is read from memory once: the second pass over it finds it in the caches, and meanwhile the rows that are next
// travel there. Bytes that must move, for n elements of s bytes: forward 2ns, backward 3ns.
#pragma once

#include <cmath>
#include <limits>

#include "math/norm.h"
#include "parallel.h"
#include "parameter.h"
#include "torch_api.h"
#include "vec.h"

namespace fusedtricks::FT_ISA {

// ---- one row --------------------------------------------------------------------------------------------------------

// Sums over d = scale (x - shift): d and d^2. Without Center, shift is 0.
template <bool Center, class T, class A = Acc<T>>
inline std::pair<A, A> moments(const T* x, int64_t columns, A shift, A scale) {
  A sums[2];
  reduce<A, 4>(columns, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
    auto d = load(x + j, lanes);
    if constexpr (Center) d = keep<A>(d - shift, lanes);
    d *= scale;
    if constexpr (Center) s[0] += d;
    s[1] += d * d;
  });
  return {sums[0], sums[1]};
}

// Mean and rstd from one pass over the row, shifted by the mean of its first elements. Where that is not within one
// standard deviation of the mean, cancellation could cost digits, and the row is measured again from the mean found.
template <bool Center, class T, class A = Acc<T>>
inline Normalize<A> measure(const T* x, int64_t columns, A eps) {
  const A inverse = A(1) / static_cast<A>(columns);
  A shift = 0, scale = 1, unscale = 1;
  if constexpr (Center) {
    shift = columns < kLanes<A> ? sum_lanes<A>(load(x, Tail{static_cast<int>(columns)})) * inverse
                                : sum_lanes<A>(load(x, Full{})) * (A(1) / kLanes<A>);
  }
  auto [d, d2] = moments<Center>(x, columns, shift, scale);
  if (!(d2 <= std::numeric_limits<A>::max())) {
    scale = kOverflowScale<A>;
    unscale = 1 / scale;
    std::tie(d, d2) = moments<Center>(x, columns, shift, scale);
  }
  if (Center && d * d * inverse > A(0.5) * d2) {
    shift += d * inverse * unscale;
    std::tie(d, d2) = moments<Center>(x, columns, shift, scale);
  }
  A rest = d * inverse;
  const A rstd = rstd_of(variance(d2, rest, inverse), eps, scale);
  rest *= unscale;
  const A mean = shift + rest;
  return {mean, (shift - mean) + rest, rstd};
}

// Rows of so few bytes are measured many at a time.
template <class T>
inline bool measured_together(int64_t columns) {
  return columns * int64_t{sizeof(T)} < 512;
}

// As many narrow rows as a register has lanes, or fewer: the arithmetic on their statistics is done once for all of
// them. They stay in the first-level cache, so two passes over them cost little.
template <bool Center, class T, class A = Acc<T>>
inline void measure_narrow(const T* const* x, int count, int64_t columns, A eps, Normalize<A>* n) {
  const A inverse = A(1) / static_cast<A>(columns);
  A mean[kLanes<A>] = {}, rest[kLanes<A>] = {}, d2[kLanes<A>] = {}, rstd[kLanes<A>];
  for (int i = 0; Center && i < count; ++i) {
    Vec<A> sum{};
    sweep<A, 1>(0, columns,
                [&](int64_t j, auto lanes, int) __attribute__((always_inline)) { sum += load(x[i] + j, lanes); });
    mean[i] = sum_lanes<A>(sum) * inverse;
  }
  for (int i = 0; i < count; ++i) {
    Vec<A> sums[2] = {};
    sweep<A, 1>(0, columns, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
      auto d = load(x[i] + j, lanes);
      if constexpr (Center) d = keep<A>(d - mean[i], lanes), sums[0] += d;
      sums[1] += d * d;
    });
    if constexpr (Center) rest[i] = sum_lanes<A>(sums[0]) * inverse;
    d2[i] = sum_lanes<A>(sums[1]);
  }
  for (int i = 0; i < kLanes<A>; ++i) rstd[i] = rstd_of(variance(d2[i], rest[i], inverse), eps, A(1));
  for (int i = 0; i < count; ++i) {
    const A near = mean[i] + rest[i];
    n[i] = {near, (mean[i] - near) + rest[i], rstd[i]};
    if (!(d2[i] <= std::numeric_limits<A>::max())) n[i] = measure<Center>(x[i], columns, eps);  // squares overflowed
  }
}

// Rows are dealt with in blocks of four, which share each visit to weight, bias and the sums of dweight and dbias, and
// whose chains of dependent instructions run side by side. Where these vectors stay in the first-level cache anyway,
// one row at a time is faster: its stores follow one another. Very narrow rows are in blocks again, for their chains'
// sake.
inline constexpr int kMostRows = 4;
inline constexpr int64_t kFetched = 256;
inline int forward_together(int64_t columns) { return columns > 1024 || columns < 128 ? kMostRows : 1; }
inline int backward_together(int64_t columns) { return columns >= kFetched || columns < 128 ? kMostRows : 1; }

// run.operator()<Stream, Fetch, Count>() for a block of `count` rows, four or one. The rows that come after it are
// fetched meanwhile where they have kFetched columns: shorter ones the hardware sees coming.
template <class F>
inline __attribute__((always_inline)) void with_block(bool stream, int64_t columns, int count, const F& run) {
  auto fetching = [&]<bool Stream, bool Fetch>() {
    count == kMostRows ? run.template operator()<Stream, Fetch, kMostRows>()
                       : run.template operator()<Stream, Fetch, 1>();
  };
  auto streaming = [&]<bool Stream>() {
    columns < kFetched ? fetching.template operator()<Stream, false>() : fetching.template operator()<Stream, true>();
  };
  stream ? streaming.template operator()<true>() : streaming.template operator()<false>();
}

// How tensor 0 of `rows`, which begins at `p`, is stored: past the caches or not, and how many rows a block has:
// `at_best`, but rows that are not aligned to what one store writes have heads of different lengths, and are streamed
// one by one.
struct Storing {
  bool stream;
  int together;

  template <class T, int K>
  Storing(const Rows<K>& rows, const T* p, int64_t columns, int64_t tensors, int at_best)
      : stream(worth_streaming(tensors * rows.count * columns * int64_t{sizeof(T)})), together(at_best) {
    auto places = reinterpret_cast<uintptr_t>(p);
    for (int level = 0; level < rows.levels; ++level) places |= rows.stride[0][level] * sizeof(T);
    if (!stream || places % (kLanes<Acc<T>> * sizeof(T)) == 0) return;
    stream = columns >= kFewestStreamed;
    if (stream) together = 1;
  }
};

// sweep over the columns of a block of `Count` rows whose results begin at `p`; if there are several, all are aligned.
template <bool Stream, int Count, class T, class F>
inline __attribute__((always_inline)) void sweep_block(const T* p, int64_t columns, F&& f) {
  sweep_stored<Stream && Count == 1, Count == 1 ? 4 : 1, false>(p, columns, std::forward<F>(f));
}
template <bool Stream, class T, class L, class E>
inline __attribute__((always_inline)) void store_block(T* p, Vec<Acc<T>> v, L lanes, [[maybe_unused]] E ends) {
  if constexpr (Stream && std::is_same_v<L, Tail>) {
    ends->store(p, v, lanes);
  } else {
    store_or_stream<Stream>(p, v, lanes);
  }
}
// Only what is streamed has ends to collect: a pointer to none would still be passed to every row.
struct NoEnds {};
template <bool Stream>
inline auto ends_of(LineEnds& ends) {
  if constexpr (Stream) {
    return &ends;
  } else {
    return NoEnds{};
  }
}

// The rows of tensor k, which begins at `p`, from where the walk stands: those that come after a block.
template <class T>
struct NextRows {
  const T* first;
  int64_t pitch;

  template <int K>
  NextRows(const Rows<K>& rows, const typename Rows<K>::Walk& at, int k, const T* p)
      : first(p + at.offset[k]), pitch(rows.levels > 0 ? rows.stride[k][rows.levels - 1] : 0) {}

  template <bool Fetch, int Count>
  inline __attribute__((always_inline)) void fetch(int64_t j) const {
    if constexpr (!Fetch) return;
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) __builtin_prefetch(first + i * pitch + j, 0, 2);
  }
};

template <bool Center, class A>
inline __attribute__((always_inline)) Vec<A> normalized(const Normalize<Vec<A>>& n, Vec<A> x) {
  if constexpr (Center) return n(x);
  return x * n.rstd;
}

template <class A>
inline Normalize<Vec<A>> spread(const Normalize<A>& n) {
  return {broadcast(n.mean), broadcast(n.rest), broadcast(n.rstd)};
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <bool Center, bool Affine, bool Stream, bool Fetch, int Count, class T, class E, class A = Acc<T>>
inline void normalize_rows(const T* const* from, T* const* to, const Normalize<A>* by, const A* weight, const A* bias,
                           int64_t columns, const NextRows<T>& next_x, E ends) {
  const T* x[Count];
  T* y[Count];
  Normalize<Vec<A>> n[Count];
  for (int i = 0; i < Count; ++i) x[i] = from[i], y[i] = to[i], n[i] = spread(by[i]);
  sweep_block<Stream, Count>(y[0], columns, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    next_x.template fetch<Fetch, Count>(j);
    Vec<A> w, b;
    if constexpr (Affine) w = load(weight + j, lanes);
    if constexpr (Affine && Center) b = load(bias + j, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      auto v = normalized<Center, A>(n[i], load(x[i] + j, lanes));
      if constexpr (Affine) v *= w;
      if constexpr (Affine && Center) v += b;
      store_block<Stream>(y[i] + j, v, lanes, ends);
    }
  });
}

// What `forward` does to a row of x before it is measured: nothing. An operation that makes the rows which it then
// normalises passes a type of its own, make<T>() returning prepare(r) for row r in logical order.
struct RowsAsTheyAre {
  template <class T>
  auto make() const {
    return [](int64_t) {};
  }
};

// stats: (3, R) mean, rest, rstd with Center, else (R,) rstd.
template <bool Center, bool Affine, class T, class Prepare, class A = Acc<T>>
void forward_rows(const Rows<3>& rows, const T* x, T* y, A* stats, const A* weight, const A* bias, int64_t columns,
                  A eps, const Prepare& prepare) {
  const Storing storing(rows, y, columns, 2, forward_together(columns));
  parallel(rows.count, columns, [&](int64_t begin, int64_t end) {
    typename Rows<3>::Walk at(rows, begin);
    LineEnds ends;
    for (int64_t left = end - begin; left > 0;) {
      constexpr int kMost = std::max(kMostRows, kLanes<A>);
      const int count =
          static_cast<int>(std::min<int64_t>(left, measured_together<T>(columns) ? kLanes<A> : storing.together));
      const T* from[kMost];
      T* to[kMost];
      A* s[kMost];
      Normalize<A> n[kMost];
      for (int i = 0; i < count; ++i) {
        from[i] = x + at.offset[1], to[i] = y + at.offset[0], s[i] = stats + at.offset[2];
        prepare(at.offset[2]);
        if (--left > 0) at.next();
      }
      if (measured_together<T>(columns)) {
        measure_narrow<Center>(from, count, columns, eps, n);
      } else {
        for (int i = 0; i < count; ++i) n[i] = measure<Center>(from[i], columns, eps);
      }
      for (int i = 0; i < count; ++i) {
        if constexpr (Center) {
          s[i][0] = n[i].mean;
          s[i][rows.count] = n[i].rest;
          s[i][2 * rows.count] = n[i].rstd;
        } else {
          s[i][0] = n[i].rstd;
        }
      }
      const NextRows<T> next_x(rows, at, 1, x);
      for (int i = 0, together; i < count; i += together) {
        together = count - i >= storing.together ? storing.together : 1;
        with_block(storing.stream, columns, together, [&]<bool Stream, bool Fetch, int Count>() {
          normalize_rows<Center, Affine, Stream, Fetch, Count>(from + i, to + i, n + i, weight, bias, columns, next_x,
                                                               ends_of<Stream>(ends));
        });
      }
    }
    ends.flush();
    if (storing.stream) streamed();
  });
}

template <bool Center, class Prepare = RowsAsTheyAre>
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& input, const MaybeTensor& weight,
                                   const MaybeTensor& bias, double eps, int64_t dims, const Prepare& prepare = {}) {
  const auto shape = check_rows(op, input, weight, bias, dims);
  const auto x = unit_columns(input, dims) ? input : torch::stable::contiguous(input);
  auto y = result_like(input);
  auto stats = Center ? empty({3, shape.rows}, accumulate_dtype(x.scalar_type()), x)
                      : empty({shape.rows}, accumulate_dtype(x.scalar_type()), x);
  if (shape.rows == 0 || shape.columns == 0) return {y, stats};
  // A layout whose columns are strided is computed in a plain tensor and copied.
  auto out = unit_columns(y, dims) ? y : result_like(x);
  const auto leading = row_major(input, dims);
  const auto rows =
      collapse_rows<3>(x.dim() - dims, x.sizes().data(), {out.strides().data(), x.strides().data(), leading.data()});
  dispatch(op, x.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    auto run = [&]<bool Affine>(const A* w, const A* b) {
      forward_rows<Center, Affine>(rows, static_cast<const T*>(x.const_data_ptr()),
                                   static_cast<T*>(out.mutable_data_ptr()), static_cast<A*>(stats.mutable_data_ptr()),
                                   w, b, shape.columns, static_cast<A>(eps), prepare.template make<T>());
    };
    if (weight || bias) {
      const Parameter<A> w(op, weight, shape.columns, A(1), x);
      if constexpr (Center) {
        const Parameter<A> b(op, bias, shape.columns, A(0), x);
        run.template operator()<true>(w.data, b.data);
      } else {
        run.template operator()<true>(w.data, nullptr);
      }
    } else {
      run.template operator()<false>(nullptr, nullptr);
    }
  });
  if (out.get() != y.get()) torch::stable::copy_(y, out);
  return {y, stats};
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardRow {
  const T* dy;
  const T* x;
  T* dx;
  Normalize<Acc<T>> n;
  Acc<T> mean_g, mean_gx;
};

// mean(g) and mean(g x^) of each row, with g = dy * weight.
template <bool Center, int Count, class T, class A = Acc<T>>
inline void project_rows(BackwardRow<T>* row, const A* weight, int64_t columns) {
  const T *dy[Count], *x[Count];
  Normalize<Vec<A>> n[Count];
  for (int i = 0; i < Count; ++i) dy[i] = row[i].dy, x[i] = row[i].x, n[i] = spread(row[i].n);
  A sums[2 * Count];
  reduce<A, Count == 1 ? 4 : 1>(columns, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
    const Vec<A> w = weight ? load(weight + j, lanes) : broadcast(A(1));
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      // Beyond the tail g is 0, whatever x^ is there.
      const auto g = load(dy[i] + j, lanes) * w;
      if constexpr (Center) s[2 * i] += g;
      s[2 * i + 1] += g * normalized<Center, A>(n[i], load(x[i] + j, lanes));
    }
  });
  const A inverse = A(1) / static_cast<A>(columns);
  for (int i = 0; i < Count; ++i) {
    row[i].mean_g = sums[2 * i] * inverse;
    row[i].mean_gx = sums[2 * i + 1] * inverse;
  }
}

// What becomes of the gradient of a row: it is stored. An operation that goes on from there passes a type of its own,
// made per thread by make<T>(): begin(i, r) announces row r as the i-th of a block, change(i, j, v, lanes) may alter
// its gradient, done(i, dx) comes when it is stored; kReadsStored tells that it is then read, and belongs in the
// caches.
struct GradientAsItIs {
  struct Of {
    static constexpr bool kReadsStored = false;
    void begin(int, int64_t) {}
    auto change(int, int64_t, auto v, auto) const { return v; }
    void done(int, auto*) const {}
  };
  template <class T>
  Of make() const {
    return {};
  }
};

// dx of the rows, and their part of dweight and dbias in one visit to the sums.
template <bool Center, bool Dx, bool Parameters, bool Stream, bool Fetch, int Count, class T, class E, class Finish,
          class A = Acc<T>>
inline void backward_rows(const BackwardRow<T>* row, const A* weight, A* dweight, A* dbias, int64_t columns,
                          const NextRows<T>& next_dy, const NextRows<T>& next_x, E ends, const Finish& finish) {
  const T *dy[Count], *x[Count];
  T* dx[Count];
  Normalize<Vec<A>> n[Count];
  Vec<A> mean_g[Count], mean_gx[Count];
  for (int i = 0; i < Count; ++i) {
    dy[i] = row[i].dy, x[i] = row[i].x, dx[i] = row[i].dx, n[i] = spread(row[i].n);
    mean_g[i] = broadcast(row[i].mean_g), mean_gx[i] = broadcast(row[i].mean_gx);
  }
  sweep_block<Stream, Count>(dx[0], columns, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    next_dy.template fetch<Fetch, Count>(j);
    next_x.template fetch<Fetch, Count>(j);
    Vec<A> dw{}, db{};
    const Vec<A> w = Dx && weight ? load(weight + j, lanes) : broadcast(A(1));
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      const auto grad = load(dy[i] + j, lanes);
      const auto xhat = normalized<Center, A>(n[i], load(x[i] + j, lanes));
      if constexpr (Parameters) {
        dw += grad * xhat;
        if constexpr (Center) db += grad;
      }
      if constexpr (Dx) {
        const auto v = norm_backward<Vec<A>>(grad * w, xhat, n[i].rstd, mean_g[i], mean_gx[i]);
        store_block<Stream>(dx[i] + j, finish.change(i, j, v, lanes), lanes, ends);
      }
    }
    if constexpr (Parameters) {
      store(dweight + j, load(dweight + j, lanes) + dw, lanes);
      if constexpr (Center) store(dbias + j, load(dbias + j, lanes) + db, lanes);
    }
  });
  if constexpr (Dx) {
    for (int i = 0; i < Count; ++i) finish.done(i, dx[i]);
  }
}

// Rows are dealt with in chunks whose number depends on the shape alone, each with its own partial dweight and dbias;
// the partials are added in order. The result is therefore the same for any number of threads.
struct Chunks {
  static constexpr int64_t kMost = 128, kFewestRows = 16;
  int64_t rows_each, count;

  explicit Chunks(int64_t rows)
      : rows_each(std::max((rows + kMost - 1) / kMost, std::min(rows, kFewestRows))),
        count((rows + rows_each - 1) / rows_each) {}
};

template <bool Center, bool Dx, bool Parameters, class T, class Make, class A = Acc<T>>
void backward_chunks(const Rows<4>& rows, const T* dy, const T* x, T* dx, const A* stats, const A* weight, A* partials,
                     int64_t columns, const Make& make) {
  const Chunks chunks(rows.count);
  const int64_t width = Center ? 2 * columns : columns;
  // What is read again, or never stored, counts as nothing to stream.
  constexpr bool kReadsStored = decltype(make.template make<T>())::kReadsStored;
  const Storing storing(rows, dx, columns, Dx && !kReadsStored ? 3 : 0, backward_together(columns));
  // Last chunk first: of x and dy the end was written or read most recently, and may still be in a cache.
  auto run = [&](int64_t begin, int64_t end) {
    auto finish = make.template make<T>();
    LineEnds ends;
    for (int64_t c = end; c-- > begin;) {
      A* dweight = Parameters ? partials + c * width : nullptr;
      A* dbias = Parameters && Center ? dweight + columns : nullptr;
      if (Parameters) std::memset(dweight, 0, static_cast<size_t>(width) * sizeof(A));
      const int64_t first = c * chunks.rows_each;
      typename Rows<4>::Walk at(rows, first);
      for (int64_t left = std::min(rows.count - first, chunks.rows_each); left > 0;) {
        const int count = left >= storing.together ? storing.together : 1;
        BackwardRow<T> block[kMostRows];
        for (int i = 0; i < count; ++i) {
          const A* s = stats + at.offset[3];
          const auto n = Center ? Normalize<A>{s[0], s[rows.count], s[2 * rows.count]} : Normalize<A>{0, 0, s[0]};
          block[i] = {dy + at.offset[2], x + at.offset[1], Dx ? dx + at.offset[0] : nullptr, n, 0, 0};
          finish.begin(i, at.offset[3]);
          if (--left > 0) at.next();
        }
        const NextRows<T> next_dy(rows, at, 2, dy), next_x(rows, at, 1, x);
        with_block(storing.stream, columns, count, [&]<bool Stream, bool Fetch, int Count>() {
          constexpr bool kStream = Dx && Stream;
          if constexpr (Dx) project_rows<Center, Count>(block, weight, columns);
          backward_rows<Center, Dx, Parameters, kStream, Fetch, Count>(block, weight, dweight, dbias, columns, next_dy,
                                                                       next_x, ends_of<kStream>(ends), finish);
        });
      }
    }
    ends.flush();
    if (storing.stream) streamed();
  };
  parallel(chunks.count, chunks.rows_each * columns, run, true);
}

// Column sums of the partials (chunks, width), from column `first`, into `out` of P.
template <class P, class A>
void add_partials(const A* partials, int64_t chunks, int64_t width, int64_t first, int64_t columns, P* out) {
  // Blocks of columns, so that the partials of one block stay near.
  constexpr int64_t kBlock = 1024;
  parallel((columns + kBlock - 1) / kBlock, chunks * kBlock, [&](int64_t begin, int64_t end) {
    sweep<A>(begin * kBlock, std::min(columns, end * kBlock), [&](int64_t j, auto lanes, int) {
      Vec<A> sum{};
      for (int64_t c = 0; c < chunks; ++c) sum += load(partials + c * width + first + j, lanes);
      if constexpr (std::is_same_v<Acc<P>, A>) {
        store(out + j, sum, lanes);
      } else {
        for (int64_t i = j; i < std::min<int64_t>(j + kLanes<A>, columns); ++i) out[i] = rounded_to<P>(sum[i - j]);
      }
    });
  });
}

template <bool Center, class Finish = GradientAsItIs>
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, const Tensor& grad, const Tensor& input,
                                            const MaybeTensor& weight, const Tensor& stats, int64_t dims, bool need_dx,
                                            bool need_dweight, bool need_dbias, const Finish& finish = {}) {
  const auto shape = check_rows(op, input, weight, std::nullopt, dims);
  check_gradient(op, grad, input, stats, (Center ? 3 : 1) * shape.rows);
  const auto x = unit_columns(input, dims) ? input : torch::stable::contiguous(input);
  const auto dy = with_unit_columns(grad, dims);
  const auto parameter_dtype = weight ? weight->scalar_type() : stats.scalar_type();
  auto parameter = [&](bool need) {
    const auto sizes = x.sizes();
    return need ? empty(Sizes(sizes.data() + x.dim() - dims, dims), parameter_dtype, x)
                : empty({0}, parameter_dtype, x);
  };
  auto dx = need_dx ? result_like(input) : empty({0}, x.scalar_type(), x);
  auto dweight = parameter(need_dweight), dbias = parameter(need_dbias);
  if (shape.rows == 0 || shape.columns == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  auto out = !need_dx || unit_columns(dx, dims) ? dx : result_like(x);
  const auto leading = row_major(input, dims);
  const auto* out_strides = need_dx ? out.strides().data() : x.strides().data();
  const auto rows = collapse_rows<4>(x.dim() - dims, x.sizes().data(),
                                     {out_strides, x.strides().data(), dy.strides().data(), leading.data()});
  dispatch(op, x.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    std::optional<Parameter<A>> w;
    if (weight && need_dx) w.emplace(op, weight, shape.columns, A(1), x);
    Tensor partials;
    const int64_t chunks = Chunks(shape.rows).count, width = Center ? 2 * shape.columns : shape.columns;
    const bool parameters = need_dweight || need_dbias;
    if (parameters) partials = empty({chunks, width}, stats.scalar_type(), x);
    auto* sums = parameters ? static_cast<A*>(partials.mutable_data_ptr()) : nullptr;
    auto run = [&]<bool Dx, bool Parameters>() {
      backward_chunks<Center, Dx, Parameters>(
          rows, static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
          static_cast<T*>(out.mutable_data_ptr()), static_cast<const A*>(stats.const_data_ptr()), w ? w->data : nullptr,
          sums, shape.columns, finish);
    };
    if (need_dx && parameters) run.template operator()<true, true>();
    if (need_dx && !parameters) run.template operator()<true, false>();
    if (!need_dx && parameters) run.template operator()<false, true>();
    if (!parameters) return;
    dispatch(op, parameter_dtype, [&]<class P>() {
      auto finish = [&](bool need, Tensor& to, int64_t first) {
        if (need) add_partials(sums, chunks, width, first, shape.columns, static_cast<P*>(to.mutable_data_ptr()));
      };
      finish(need_dweight, dweight, 0);
      finish(need_dbias, dbias, shape.columns);
    });
  });
  if (need_dx && out.get() != dx.get()) torch::stable::copy_(dx, out);
  return {dx, dweight, dbias};
}

}  // namespace fusedtricks::FT_ISA
