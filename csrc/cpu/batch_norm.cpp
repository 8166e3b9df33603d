// batch_norm_fwd, batch_norm_apply and batch_norm_bwd on the CPU. Bytes that must move, for n elements of s bytes: 3ns
// in the forward and 5ns in the backward, less where a channel (planes) or the whole tensor (rows) stays in the caches.
#include <vector>

#include "batch_norm_sums.h"

namespace fusedtricks::FT_ISA {
namespace {

// ---- arguments ------------------------------------------------------------------------------------------------------

void check_input(const char* op, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                 const MaybeTensor& bias, int64_t activation) {
  check_floating(op, "input", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 2, op, ": expected input (N, C, *), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGelu, op, ": no activation has the code ", activation);
  auto like_x = [&](const MaybeTensor& t, const char* name) {
    if (!t) return;
    bool same = t->dim() == x.dim() && t->scalar_type() == x.scalar_type() && t->is_cuda() == x.is_cuda();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = t->size(d) == x.size(d);
    STD_TORCH_CHECK(same, op, ": ", name, " must have the shape, dtype and device of the input");
  };
  like_x(residual, "residual");
  auto check = [&](const MaybeTensor& p, const char* name) {
    if (!p) return;
    check_floating(op, name, p->scalar_type());
    STD_TORCH_CHECK(p->dim() == 1 && p->size(0) == x.size(1) && p->is_cuda() == x.is_cuda(), op, ": ", name,
                    " must have one element per channel (", x.size(1), ") on the input's device");
  };
  check(weight, "weight");
  check(bias, "bias");
}

// Element i of a vector of any floating dtype and stride, read and written as double.
template <class F>
void each(const char* op, const Tensor& t, const F& f) {
  const int64_t stride = t.dim() ? t.stride(0) : 0;
  dispatch(op, t.scalar_type(), [&]<class P>() {
    auto* data = static_cast<P*>(t.mutable_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) {
      P& at = data[i * stride];
      const double before = load(&at, Tail{1})[0], after = f(i, before);
      if constexpr (std::is_same_v<P, double>) {
        at = after;
      } else {
        at = rounded_to<P>(static_cast<float>(after));
      }
    }
  });
}

// running = (1 - f) running + f new, f = momentum, or 1 / count for the average over all batches.
template <class A>
void track(const char* op, const A* stats, int64_t channels, int64_t samples, const MaybeTensor& mean,
           const MaybeTensor& var, const MaybeTensor& counter, std::optional<double> momentum) {
  int64_t batches = 0;
  if (counter) batches = ++*static_cast<int64_t*>(counter->mutable_data_ptr());
  if (samples == 0 || !mean || !var) return;
  const double factor = momentum ? *momentum : counter ? 1.0 / static_cast<double>(batches) : 0.0;
  const double unbiased = static_cast<double>(samples) / static_cast<double>(samples - 1);
  each(op, *mean, [&](int64_t c, double old) {
    return (1 - factor) * old + factor * (static_cast<double>(stats[c]) + static_cast<double>(stats[channels + c]));
  });
  each(op, *var, [&](int64_t c, double old) {
    return (1 - factor) * old + factor * unbiased * static_cast<double>(stats[3 * channels + c]);
  });
}

// Small arrays of A, each as long as asked, in one allocation, or in none where they are short.
template <class A>
class Arrays {
 public:
  Arrays(int64_t count, int64_t length, const Tensor& where) : length_((length + 15) / 16 * 16) {
    if (count * length_ <= kShort) return;
    owner_ = empty({count * length_}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float, where);
    data_ = static_cast<A*>(owner_->mutable_data_ptr());
  }
  Arrays(const Arrays&) = delete;
  A* operator[](int64_t i) const { return data_ + i * length_; }

 private:
  static constexpr int64_t kShort = 1024;
  alignas(64) A short_[kShort];
  A* data_ = short_;
  int64_t length_;
  MaybeTensor owner_;
};

// Past the caches? Only whole registers on a boundary can be. Where runs begin off it, their `edges` must be allowed,
// which are not streamed, and runs must be long. As much as is written is what is read meanwhile.
template <class T>
bool past_caches(const Channels& s, int64_t length, bool edges, std::initializer_list<T*> written) {
  constexpr int64_t kRegister = kLanes<Acc<T>> * sizeof(T);
  uintptr_t off = 0;
  int64_t tensors = 0;
  for (const T* p : written) off |= reinterpret_cast<uintptr_t>(p) % kRegister, tensors += p != nullptr;
  if (off != 0) return false;
  const bool aligned = length * int64_t{sizeof(T)} % kRegister == 0;
  const bool enough = aligned || (edges && length * int64_t{sizeof(T)} >= 8 * kRegister);
  return enough && worth_streaming(2 * tensors * s.numel() * int64_t{sizeof(T)});
}

// ---- operands -------------------------------------------------------------------------------------------------------

template <class T>
struct Pointer {
  T* data = nullptr;
  int64_t outer = 0, channel = 0;
};

// Do runs of neighbouring channels follow one another in memory, in all that is read?
template <class T>
bool neighbours(const Channels& s, std::initializer_list<Pointer<T>> read) {
  return std::all_of(read.begin(), read.end(), [&](auto& p) { return !p.data || p.channel == s.inner; });
}

// Every tensor of a call, walkable. In rows `outer` is the distance of two rows.
struct Operands {
  const Channels s;
  const bool mask;
  bool dense = true;
  std::vector<Operand> list;

  Operands(const Tensor& y, bool mask) : s(y), mask(mask) {}

  int add(const Tensor& t, const Tensor& y) {
    const bool needs_dense = s.rows() && (s.inner > 1 || (mask && s.channels % 8 != 0));
    list.push_back(operand(t, y, s, needs_dense));
    dense = dense && list.back().dense(s);
    return static_cast<int>(list.size()) - 1;
  }

  template <class T>
  Pointer<T> pointer(int i, int64_t run, bool rows) {
    auto& o = list[i];
    if (o.constant) {
      auto filled = empty({run}, o.tensor.scalar_type(), o.tensor);
      using Value = std::remove_const_t<T>;
      std::fill_n(static_cast<Value*>(filled.mutable_data_ptr()), run,
                  *static_cast<const Value*>(o.tensor.const_data_ptr()));
      o = {filled, 0, 0, true};
    } else if (rows && dense) {
      o.outer = run;
    }
    return {static_cast<T*>(o.tensor.mutable_data_ptr()), o.outer, o.channel};
  }
};

// f(row)(j, lanes, constants) for `columns` columns of `rows` rows from `first` on.
template <int N, bool Much, class A, class V, class F>
inline __attribute__((always_inline)) void walk_columns(int64_t first, int64_t rows, int64_t columns, const V& values,
                                                        const F& f) {
  over_strips<A, Much>(columns, [&]<int K>(int64_t j, auto lanes) __attribute__((always_inline)) {
    constexpr int L = kLanes<A>;
    Constants<N, A> k[K];
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) k[n] = of_columns<N, A>(values, j + n * L, lanes);
    for (int64_t r = first; r < first + rows; ++r) {
      const auto element = f(r);
#pragma GCC unroll 4
      for (int n = 0; n < K; ++n) element(j + n * L, lanes, k[n]);
    }
  });
}

// The same for a chunk of short planes, channels first .. end - 1.
template <int N, bool Much, class A, class V, class F>
inline __attribute__((always_inline)) void walk_short_runs(const Planes::Chunk& at, const Channels& s, const V& values,
                                                           int64_t first, int64_t end, const F& f) {
  Columns<N, A> of;
  of.fill(values, first, end - first, s.inner);
  for (int64_t r = at.run; r < at.run + at.runs; r += RowCut::kStreams) {
    walk_columns<N, Much, A>(r, std::min(RowCut::kStreams, at.run + at.runs - r), (end - first) * s.inner, of, f);
  }
}

// f(row)(j, lanes, constants) for all elements of all rows. What was read last is written first, for it is still in the
// caches; a piece is walked forwards, as prefetchers expect.
template <class A, int N, bool Much, class F>
void walk_back(const RowCut& cut, const Arrays<A>& values, bool streaming, const F& f) {
  auto run = [&](int64_t begin, int64_t end) {
    over_rows<true>(cut, cut.begin(begin), cut.end(end - 1), [&](int64_t row, int64_t, int64_t rows, int64_t columns) {
      walk_columns<N, Much, A>(row, rows, columns, values, f);
    });
    if (streaming) streamed();
  };
  parallel(cut.chunks, cut.rows * cut.width, run, true);
}

// The order of work on planes: of a group of channels sum(group, chunk) for each chunk, finish(group), and write(group,
// chunk, ahead), the last chunk first, for what was read last is still in the caches; the group that is next lies
// `ahead` channels further on. Where channels are too few to occupy the threads, they share the chunks instead. A
// backward begins with the last group: of x, the forward read it last.
template <bool Backward, class Sum, class Finish, class Write>
void over_planes(const Planes& cut, const Groups& groups, const Channels& s, bool summed, bool written, bool streaming,
                 const Sum& sum, const Finish& finish, const Write& write) {
  const int64_t samples = s.samples();
  if (summed && groups.occupy_threads) {
    auto run = [&](Pieces& pieces) {
      pieces.each([&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t group = Backward ? begin + end - 1 - k : k;
          for (int64_t i = 0; i < cut.chunks; ++i) sum(group, i);
          finish(group);
          const int64_t next = k + 1 == end ? pieces.next() : Backward ? group - 1 : group + 1;
          const int64_t ahead = next < 0 ? 0 : groups.begin(next) - groups.begin(group);
          for (int64_t i = cut.chunks; written && i-- > 0;) write(group, i, ahead);
        }
      });
      if (streaming) streamed();
    };
    return parallel_pieces(groups.count, s.channels * samples / groups.count, run, Backward);
  }
  const int64_t count = cut.chunks * groups.count, cost = s.channels * samples / count;
  if (summed) {
    parallel(count, cost, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) sum(k % groups.count, k / groups.count);
    });
  }
  for (int64_t group = 0; group < groups.count; ++group) finish(group);
  if (!written) return;
  auto run = [&](int64_t begin, int64_t end) {
    // What was summed last is written first; without sums, memory is walked in its order.
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = summed ? begin + end - 1 - i : i;
      write(k % groups.count, k / groups.count, 0);
    }
    if (streaming) streamed();
  };
  parallel(count, cost, run, summed);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, class A = Acc<T>>
struct Forward {
  const char* op;
  const Channels& s;
  Pointer<const T> x, residual;
  T* y;
  uint8_t* bits;
  const A *weight, *bias;
  Statistics<A> out;
  Mode mode;
  Shape<A> shape;
  bool measured, written;

  // scale and shift of a channel; its mean is in the statistics.
  void derive(int64_t c, A* mean, A* scale, A* shift) const {
    const A rest = out.stats[s.channels + c], rstd = out.stats[2 * s.channels + c];
    mean[c] = out.stats[c];
    scale[c] = weight ? rstd * weight[c] : rstd;
    shift[c] = (bias ? bias[c] : A(0)) - rest * scale[c];
  }

  void planes(const Tensor& where) {
    const bool linear = neighbours(s, {x, residual});
    const bool columns = linear && s.inner < Groups::kShort && mode != kMasked;
    const bool in_order = !measured && !columns;
    const Planes cut(s, in_order);
    const bool across = linear && !columns && s.inner < Groups::kAcross && s.inner % kLanes<A> != 0;
    const Groups groups(s, sizeof(T) * (residual.data ? 2 : 1), columns, in_order);
    const Arrays<A> values(3, s.channels, where);
    const Arrays<A> parts(4, s.channels * cut.chunks, where);
    auto* sums = reinterpret_cast<ShiftedSums<A>*>(parts[0]);
    const int64_t run = columns || across ? s.channels * s.inner : s.inner;
    const bool streaming = past_caches<T>(s, run, across || (mode != kMasked && !columns), {y});
    const Flags flags{streaming, residual.data != nullptr};
    auto measure_chunk = [&](int64_t group, int64_t i) {
      const auto at = cut.chunk(s, i);
      const int64_t first = groups.begin(group);
      measure(x.data + at.run * x.outer + first * x.channel + at.begin, x.channel, groups.end(group) - first, x.outer,
              at.runs, at.length, groups.as_columns,
              [&](int64_t c) -> ShiftedSums<A>& { return sums[(first + c) * cut.chunks + i]; });
    };
    auto finish = [&](int64_t group) {
      for (int64_t c = groups.begin(group); c < groups.end(group); ++c) {
        if (measured) merge_planes(cut, s, sums + c * cut.chunks, c, out);
        derive(c, values[0], values[1], values[2]);
      }
    };
    const int64_t row_bytes = (s.inner + 7) / 8;
    auto run_at = [&](int64_t r, int64_t c, int64_t begin) {
      Run<T> run{};
      run.x = x.data + r * x.outer + c * x.channel + begin;
      run.y = y + (r * s.channels + c) * s.inner + begin;
      if (residual.data) run.residual = residual.data + r * residual.outer + c * residual.channel + begin;
      if (bits) run.bits.row = bits + (r * s.channels + c) * row_bytes + begin / 8;
      return run;
    };
    auto write_chunk = [&]<Mode M>(int64_t group, int64_t i, int64_t ahead) {
      const auto at = cut.chunk(s, i);
      const Ahead next{ahead * x.channel, 0, ahead * residual.channel};
      const int64_t first = groups.begin(group), end = groups.end(group);
      with_forward_flags<M>(flags, [&](const auto& flags) {
        if (M != kMasked && groups.as_columns) {
          return walk_short_runs<kShift + 1, much(M), A>(at, s, values, first, end, [&](int64_t r) {
            return [&, run = run_at(r, first, 0)](int64_t j, auto lanes, const auto& k)
                       __attribute__((always_inline)) { forward_step<M>(run, j, lanes, k, shape, flags); };
          });
        }
        for (int64_t r = at.run; r < at.run + at.runs; ++r) {
          if (across) {
            auto run = run_at(r, first, 0);
            const int64_t head = unaligned_head(run.y);
            NeighbourBits<A, Groups::kTogether> bits(run.bits.row, row_bytes, end - first, s.inner, head);
            run.bits = bits.together();
            const auto step = [&](int64_t j, auto lanes, const auto& k) __attribute__((always_inline)) {
              next.fetch(run, j, flags);
              forward_step<M>(run, j, lanes, k, shape, flags);
            };
            over_neighbours<kShift + 1, much(M) ? 1 : 4, A>(end - first, s.inner, head, values, first, step);
            if (M == kMasked) bits.scatter();
            continue;
          }
          for (int64_t c = first; c < end; ++c) {
            const auto run = run_at(r, c, at.begin);
            const auto k = of_channel<kShift + 1, A>(values, c);
            sweep_run<much(M) ? 1 : 4>(at.length, run.y, flags.streaming,
                                       [&](int64_t j, auto lanes) __attribute__((always_inline)) {
                                         next.fetch(run, j, flags);
                                         forward_step<M>(run, j, lanes, k, shape, flags);
                                       });
          }
        }
      });
    };
    with_mode(mode, [&]<Mode M>() {
      over_planes<false>(
          cut, groups, s, measured, written, streaming, measure_chunk, finish,
          [&](int64_t group, int64_t i, int64_t ahead) { write_chunk.template operator()<M>(group, i, ahead); });
    });
  }

  void rows(const RowCut& cut, const Tensor& where) {
    const Arrays<A> values(3, cut.width, where);
    if (measured) {
      const Arrays<A> parts(4 * cut.chunks, cut.width, where);
      auto* sums = parts[0];
      parallel(cut.chunks, cut.rows * cut.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          measure_columns(cut, i, x.data, x.outer, ColumnSums<A>(sums + i * 4 * cut.width, cut.width));
        }
      });
      merge_columns(cut, s, sums, out);
    }
    for (int64_t c = 0; c < s.channels; ++c) derive(c, values[0], values[1], values[2]);
    for (int i = 0; i < 3; ++i) spread(cut, s, values[i]);
    if (!written) return;
    const bool streaming = past_caches<T>(s, cut.width, false, {y});
    const Flags flags{streaming, residual.data != nullptr};
    auto run_at = [&](int64_t row) {
      Run<T> run{};
      run.x = x.data + row * x.outer;
      run.y = y + row * cut.width;
      if (residual.data) run.residual = residual.data + row * residual.outer;
      if (bits) run.bits.row = bits + row * cut.width / 8;
      return run;
    };
    with_mode(mode, [&]<Mode M>() {
      walk_back<A, kShift + 1, much(M)>(cut, values, streaming, [&](int64_t row) {
        return [&, run = run_at(row)](int64_t j, auto lanes, const auto& k)
                   __attribute__((always_inline)) { forward_step<M>(run, j, lanes, k, shape, flags); };
      });
    });
  }
};

ScalarType parameter_dtype(const MaybeTensor& weight, const Tensor& stats) {
  return weight ? weight->scalar_type() : stats.scalar_type();
}

using Triple = std::tuple<Tensor, Tensor, Tensor>;

// `fill` is given the empty statistics of an eval forward; without it they are measured.
template <class Fill>
Triple forward(const char* op, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
               const MaybeTensor& bias, double eps, int64_t activation, double slope, bool need_y, bool need_mask,
               bool measured, const Fill& fill) {
  check_input(op, x, residual, weight, bias, activation);
  const auto kind = accumulate_dtype(x.scalar_type());
  const int64_t channels = x.size(1);
  auto y = result_like(x);
  auto stats = empty({4, channels}, kind, x);
  need_mask = need_mask && need_y;
  const Channels s(y);
  const int64_t bytes = s.mask_bytes(), mask_rows = s.rows() ? 1 : s.outer * channels;
  auto mask = need_mask ? empty({s.numel() ? mask_rows : 0, s.numel() ? bytes / mask_rows : 0}, ScalarType::Byte, x)
                        : empty({0}, ScalarType::Byte, x);
  auto result = [&] { return Triple{need_y ? y : empty({0}, x.scalar_type(), x), stats, mask}; };
  if (s.numel() == 0) {
    torch::stable::zero_(stats);
    if (!measured) fill(stats);
    return result();
  }
  Operands operands(y, need_mask);
  const int at_x = operands.add(x, y), at_residual = residual && need_y ? operands.add(*residual, y) : -1;
  const RowCut cut(s, operands.dense, need_mask);
  const int64_t run = s.rows() ? cut.width : s.inner;
  if (!measured) fill(stats);
  dispatch(op, x.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    std::optional<Parameter<A>> w, b;
    if (weight) w.emplace(op, weight, channels, A(1), x);
    if (bias) b.emplace(op, bias, channels, A(0), x);
    Forward<T> f{op,
                 s,
                 operands.pointer<const T>(at_x, run, s.rows()),
                 {},
                 static_cast<T*>(y.mutable_data_ptr()),
                 static_cast<uint8_t*>(mask.mutable_data_ptr()),
                 w ? w->data : nullptr,
                 b ? b->data : nullptr,
                 {static_cast<A*>(stats.mutable_data_ptr()), channels, s.samples(), eps},
                 mode_of(activation, need_mask),
                 Shape<A>(activation, slope),
                 measured,
                 need_y};
    if (at_residual >= 0) f.residual = operands.pointer<const T>(at_residual, run, s.rows());
    s.rows() ? f.rows(cut, stats) : f.planes(stats);
  });
  return result();
}

Triple batch_norm_fwd(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                      const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& counter,
                      std::optional<double> momentum, double eps, int64_t activation, double slope, bool need_y,
                      bool need_mask) {
  const char* op = "batch_norm_fwd";
  check_input(op, x, std::nullopt, running_mean, running_var, activation);
  STD_TORCH_CHECK(!counter || (counter->scalar_type() == ScalarType::Long && counter->numel() == 1), op,
                  ": num_batches_tracked must be one int64");
  auto result = forward(op, x, residual, weight, bias, eps, activation, slope, need_y, need_mask, true, [](Tensor&) {});
  const auto& stats = std::get<1>(result);
  const int64_t samples = x.size(1) ? x.numel() / x.size(1) : 0;
  stats.scalar_type() == ScalarType::Double ? track(op, static_cast<const double*>(stats.const_data_ptr()), x.size(1),
                                                    samples, running_mean, running_var, counter, momentum)
                                            : track(op, static_cast<const float*>(stats.const_data_ptr()), x.size(1),
                                                    samples, running_mean, running_var, counter, momentum);
  return result;
}

Triple batch_norm_apply(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                        const MaybeTensor& bias, const Tensor& mean, const MaybeTensor& rest, const Tensor& var,
                        double eps, int64_t activation, double slope, bool need_mask) {
  const char* op = "batch_norm_apply";
  check_input(op, x, std::nullopt, mean, var, activation);
  check_input(op, x, std::nullopt, rest, std::nullopt, activation);
  return forward(op, x, residual, weight, bias, eps, activation, slope, true, need_mask, false, [&](Tensor& stats) {
    const int64_t channels = x.size(1);
    auto into = [&]<class A>(A* to) {
      const Parameter<A> m(op, mean, channels, A(0), x), r(op, rest, channels, A(0), x), v(op, var, channels, A(1), x);
      for (int64_t c = 0; c < channels; ++c) {
        to[c] = m.data[c], to[channels + c] = r.data[c], to[3 * channels + c] = v.data[c];
        to[2 * channels + c] = A(1) / std::sqrt(v.data[c] + static_cast<A>(eps));
      }
    };
    if (stats.scalar_type() == ScalarType::Double) return into(static_cast<double*>(stats.mutable_data_ptr()));
    into(static_cast<float*>(stats.mutable_data_ptr()));
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T, class A = Acc<T>>
struct Backward {
  const Channels& s;
  Pointer<const T> x, dy, residual;
  T *dx, *dresidual;
  const uint8_t* bits;
  const A *weight, *bias, *stats;
  const A* given;     // (2, C) means of g and g x^
  A *sum_g, *sum_gx;  // sums of g and g x^ of this call
  Mode mode;
  Shape<A> shape;
  bool training, summed;

  bool written() const { return dx || dresidual; }

  static constexpr int kValues = kDrift + 1;
  void derive(int64_t c, const Arrays<A>& v) const {
    const A rest = stats[s.channels + c], rstd = stats[2 * s.channels + c];
    v[kMean][c] = stats[c];
    v[kScale][c] = weight ? rstd * weight[c] : rstd;
    v[kShift][c] = (bias ? bias[c] : A(0)) - rest * v[kScale][c];
    v[kRstd][c] = rstd;
    v[kDrift][c] = -rest * rstd;
  }
  void derive_means(int64_t c, Wide<A> g, Wide<A> gx, A* offset, A* slope_of) const {
    const auto samples = static_cast<Wide<A>>(s.samples());
    const A rstd = stats[2 * s.channels + c], drift = -stats[s.channels + c] * rstd;
    sum_g[c] = static_cast<A>(g), sum_gx[c] = static_cast<A>(gx);
    const A mean_g = given ? given[c] : static_cast<A>(g / samples);
    const A mean_gx = given ? given[s.channels + c] : static_cast<A>(gx / samples);
    slope_of[c] = rstd * mean_gx;
    offset[c] = mean_g + drift * mean_gx;
  }

  void planes(const Tensor& where) {
    const bool linear = neighbours(s, {x, dy, residual});
    const bool columns = linear && s.inner < Groups::kShort && mode != kMasked;
    const bool in_order = !summed && !columns;
    const Planes cut(s, in_order);
    const bool across = linear && !columns && s.inner < Groups::kAcross && s.inner % kLanes<A> != 0;
    const Groups groups(s, sizeof(T) * (residual.data ? 3 : 2), columns, in_order);
    const Arrays<A> values(kValues, s.channels, where), parts(2, s.channels * cut.chunks, where);
    const int64_t run = columns || across ? s.channels * s.inner : s.inner;
    const bool streaming = past_caches<T>(s, run, across || (mode != kMasked && !columns), {dx, dresidual});
    const Flags flags{streaming, residual.data != nullptr, training, dx != nullptr, dresidual != nullptr};
    const int64_t row_bytes = (s.inner + 7) / 8;
    auto run_at = [&](int64_t r, int64_t c, int64_t begin) {
      const int64_t at = (r * s.channels + c) * s.inner + begin;
      Run<T> run{};
      run.x = x.data + r * x.outer + c * x.channel + begin;
      run.dy = dy.data + r * dy.outer + c * dy.channel + begin;
      if (residual.data) run.residual = residual.data + r * residual.outer + c * residual.channel + begin;
      if (dx) run.dx = dx + at;
      if (dresidual) run.dresidual = dresidual + at;
      if (bits) run.bits.row = const_cast<uint8_t*>(bits) + (r * s.channels + c) * row_bytes + begin / 8;
      return run;
    };
    const std::array<int64_t, 4> outer{x.outer, dy.outer, residual.outer, s.channels * row_bytes};
    auto sum_chunk = [&]<Mode M>(int64_t group, int64_t i) {
      const auto at = cut.chunk(s, i);
      const int64_t first = groups.begin(group), channels = groups.end(group) - first;
      A found[Groups::kMost][2];
      gradient_sums<M, T>([&](int64_t c) { return run_at(at.run, c, at.begin); }, outer, first, channels, at.runs,
                          at.length, groups.as_columns, values, shape, found);
      for (int64_t c = 0; c < channels; ++c) {
        for (int n = 0; n < 2; ++n) parts[n][(first + c) * cut.chunks + i] = found[c][n];
      }
    };
    auto finish = [&](int64_t group) {
      for (int64_t c = groups.begin(group); c < groups.end(group); ++c) {
        Wide<A> g = 0, gx = 0;
        for (int64_t i = c * cut.chunks; summed && i < (c + 1) * cut.chunks; ++i) g += parts[0][i], gx += parts[1][i];
        derive_means(c, g, gx, values[kOffset], values[kSlope]);
      }
    };
    auto write_chunk = [&]<Mode M>(int64_t group, int64_t i, int64_t ahead) {
      const auto at = cut.chunk(s, i);
      const Ahead next{ahead * x.channel, ahead * dy.channel, ahead * residual.channel};
      const int64_t first = groups.begin(group), end = groups.end(group);
      with_backward_flags<M>(flags, [&](const auto& flags) {
        if (M != kMasked && groups.as_columns) {
          return walk_short_runs<kSlope + 1, much(M), A>(at, s, values, first, end, [&](int64_t r) {
            return [&, run = run_at(r, first, 0)](int64_t j, auto lanes, const auto& k)
                       __attribute__((always_inline)) { backward_step<M>(run, j, lanes, k, shape, flags); };
          });
        }
        for (int64_t r = at.run; r < at.run + at.runs; ++r) {
          if (across) {
            auto run = run_at(r, first, 0);
            const int64_t head = unaligned_head(flags.dx ? run.dx : run.dresidual);
            NeighbourBits<A, Groups::kTogether> bits(run.bits.row, row_bytes, end - first, s.inner, head);
            run.bits = bits.together();
            if (M == kMasked) bits.gather();
            const auto step = [&](int64_t j, auto lanes, const auto& k) __attribute__((always_inline)) {
              next.fetch(run, j, flags);
              backward_step<M>(run, j, lanes, k, shape, flags);
            };
            over_neighbours<kSlope + 1, much(M) ? 1 : 2, A>(end - first, s.inner, head, values, first, step);
            continue;
          }
          for (int64_t c = first; c < end; ++c) {
            const auto run = run_at(r, c, at.begin);
            const auto k = of_channel<kValues, A>(values, c);
            sweep_run<much(M) ? 1 : 2>(at.length, flags.dx ? run.dx : run.dresidual, flags.streaming,
                                       [&](int64_t j, auto lanes) __attribute__((always_inline)) {
                                         next.fetch(run, j, flags);
                                         backward_step<M>(run, j, lanes, k, shape, flags);
                                       });
          }
        }
      });
    };
    for (int64_t c = 0; c < s.channels; ++c) derive(c, values);
    with_mode(mode, [&]<Mode M>() {
      over_planes<true>(
          cut, groups, s, summed, written(), streaming,
          [&](int64_t group, int64_t i) { sum_chunk.template operator()<M>(group, i); }, finish,
          [&](int64_t group, int64_t i, int64_t ahead) { write_chunk.template operator()<M>(group, i, ahead); });
    });
  }

  void rows(const RowCut& cut, const Tensor& where) {
    const Arrays<A> values(kValues, cut.width, where);
    for (int64_t c = 0; c < s.channels; ++c) derive(c, values);
    for (int i : {kMean, kScale, kShift, kRstd, kDrift}) spread(cut, s, values[i]);
    auto run_at = [&](int64_t row) {
      Run<T> run{};
      run.x = x.data + row * x.outer;
      run.dy = dy.data + row * dy.outer;
      if (residual.data) run.residual = residual.data + row * residual.outer;
      if (dx) run.dx = dx + row * cut.width;
      if (dresidual) run.dresidual = dresidual + row * cut.width;
      if (bits) run.bits.row = const_cast<uint8_t*>(bits) + row * cut.width / 8;
      return run;
    };
    with_mode(mode, [&]<Mode M>() {
      std::vector<Wide<A>> g(cut.width), gx(cut.width);
      if (summed) {
        const Arrays<A> parts(2 * cut.chunks, cut.width, where);
        parallel(cut.chunks, cut.rows * cut.width, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            column_gradient_sums<M, T>(cut, i, run_at, values, shape, parts[2 * i], parts[2 * i + 1]);
          }
        });
        auto merge = [&](std::vector<Wide<A>>& to, int64_t which) {
          merge_chunks(cut, to.data(), [&](int64_t chunk) {
            return [part = parts[2 * chunk + which]](int64_t j, Wide<A>) { return static_cast<Wide<A>>(part[j]); };
          });
          sum_columns(cut, s, to.data());
        };
        merge(g, 0);
        merge(gx, 1);
      }
      for (int64_t c = 0; c < s.channels; ++c) derive_means(c, g[c], gx[c], values[kOffset], values[kSlope]);
      if (!written()) return;
      for (int i : {kOffset, kSlope}) spread(cut, s, values[i]);
      const bool streaming = past_caches<T>(s, cut.width, false, {dx, dresidual});
      const Flags flags{streaming, residual.data != nullptr, training, dx != nullptr, dresidual != nullptr};
      walk_back<A, kSlope + 1, much(M)>(cut, values, streaming, [&](int64_t row) {
        return [&, run = run_at(row)](int64_t j, auto lanes, const auto& k)
                   __attribute__((always_inline)) { backward_step<M>(run, j, lanes, k, shape, flags); };
      });
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& grad, const Tensor& x,
                                                          const MaybeTensor& residual, const MaybeTensor& weight,
                                                          const MaybeTensor& bias, const Tensor& stats,
                                                          const MaybeTensor& mask, const MaybeTensor& given,
                                                          bool training, int64_t activation, double slope, bool need_dx,
                                                          bool need_dresidual, bool need_dweight, bool need_dbias) {
  const char* op = "batch_norm_bwd";
  check_input(op, x, residual, weight, bias, activation);
  check_input(op, x, grad, std::nullopt, std::nullopt, activation);
  const int64_t channels = x.size(1);
  const auto kind = accumulate_dtype(x.scalar_type());
  STD_TORCH_CHECK(stats.numel() == 4 * channels && stats.is_contiguous() && stats.scalar_type() == kind, op,
                  ": the statistics must be those that the forward returned");
  STD_TORCH_CHECK(!given || (given->numel() == 2 * channels && given->is_contiguous() && given->scalar_type() == kind),
                  op, ": sums must be (2, C) in the dtype of the statistics");
  auto like_x = [&](bool need) { return need ? result_like(x) : empty({0}, x.scalar_type(), x); };
  auto dx = like_x(need_dx), dresidual = like_x(need_dresidual);
  const auto template_ = need_dx ? dx : need_dresidual ? dresidual : result_like(x);
  const auto kind_of_parameters = parameter_dtype(weight, stats);
  auto parameter = [&](bool need) { return empty({need ? channels : 0}, kind_of_parameters, x); };
  auto dweight = parameter(need_dweight), dbias = parameter(need_dbias);
  const Channels s(template_);
  if (s.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dresidual, dweight, dbias};
  }
  STD_TORCH_CHECK(!mask || (mask->numel() == s.mask_bytes() && mask->is_contiguous()), op,
                  ": the mask must be the one that the forward returned");
  Operands operands(template_, mask.has_value());
  const bool add = residual && !mask && activation != kIdentity;
  const int at_x = operands.add(x, template_), at_dy = operands.add(grad, template_);
  const int at_residual = add ? operands.add(*residual, template_) : -1;
  const RowCut cut(s, operands.dense, mask.has_value());
  const int64_t run = s.rows() ? cut.width : s.inner;
  const bool summed = need_dweight || need_dbias || (training && need_dx && !given);
  if (!summed && !need_dx && !need_dresidual) return {dx, dresidual, dweight, dbias};
  dispatch(op, x.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const Arrays<A> sums(2, channels, x);
    std::optional<Parameter<A>> w, b;
    if (weight) w.emplace(op, weight, channels, A(1), x);
    if (bias) b.emplace(op, bias, channels, A(0), x);
    auto written = [](Tensor& t, bool need) { return need ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    Backward<T> f{s,
                  operands.pointer<const T>(at_x, run, s.rows()),
                  operands.pointer<const T>(at_dy, run, s.rows()),
                  {},
                  written(dx, need_dx),
                  written(dresidual, need_dresidual),
                  mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                  w ? w->data : nullptr,
                  b ? b->data : nullptr,
                  static_cast<const A*>(stats.const_data_ptr()),
                  given ? static_cast<const A*>(given->const_data_ptr()) : nullptr,
                  sums[0],
                  sums[1],
                  mode_of(activation, mask.has_value()),
                  Shape<A>(activation, slope),
                  training,
                  summed};
    if (add) f.residual = operands.pointer<const T>(at_residual, run, s.rows());
    s.rows() ? f.rows(cut, stats) : f.planes(stats);
    dispatch(op, kind_of_parameters, [&]<class P>() {
      for (int64_t c = 0; c < channels; ++c) {
        if (need_dbias) static_cast<P*>(dbias.mutable_data_ptr())[c] = rounded_to<P>(f.sum_g[c]);
        if (need_dweight) static_cast<P*>(dweight.mutable_data_ptr())[c] = rounded_to<P>(f.sum_gx[c]);
      }
    });
  });
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

FT_CPU_KERNEL(batch_norm_fwd);
FT_CPU_KERNEL(batch_norm_apply);
FT_CPU_KERNEL(batch_norm_bwd);

}  // namespace fusedtricks::FT_ISA
