// One optimizer step over all parameters on the CPU: a rule of csrc/math applied to every element that the table lists,
// in one parallel region (two with clipping).
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "../math/optimizer.h"
#include "parallel.h"
#include "philox.h"

namespace fusedtricks::FT_ISA {

struct Math {
  template <class V>
  static FT_HD V root(V v) {
    V r;
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) r[i] = std::sqrt(v[i]);
    return r;
  }
};

// ---- weights of more bits than the parameter ------------------------------------------------------------------------

// Master weights are rounded to bfloat16 with ties away from zero, so that the sign of the 16 bits that are left over
// tells which way it went.
inline Vec<uint32_t> upper_half(Vec<float> v) {
  const auto bits = v == v ? (Vec<uint32_t>)v : Vec<uint32_t>{} + 0x7fc00000u;
  return (bits + 0x8000u) >> 16;
}

inline Vec<float> with_remainder(Vec<uint32_t> upper, Vec<uint32_t> lower) {
  return (Vec<float>)(((upper - (lower >> 15)) << 16) | lower);
}

template <class L>
inline Vec<uint32_t> load_words(const uint16_t* p, L lanes) {
  return (Vec<uint32_t>)load(reinterpret_cast<const bf16*>(p), lanes) >> 16;
}
template <class L>
inline void store_words(uint16_t* p, Vec<uint32_t> words, L lanes) {
  // Exact, as the lower half of every lane is zero; a NaN's bits survive because they are not looked at.
  const Packed packed = truncate(words);
  if constexpr (std::is_same_v<L, Full>) {
    std::memcpy(p, &packed, sizeof packed);
  } else {
    std::memcpy(p, &packed, lanes.n * sizeof(uint16_t));
  }
}

// ---- one tensor -----------------------------------------------------------------------------------------------------

// What one row of the table asks for, beyond the rule.
struct Extras {
  double grad_factor = 1;  // times the gradient: 1 / grad_scale, and the clip coefficient
  double unscale = 1;      // what is written back of it
  bool write_grad = false;
  double ema_weight = 0, ema_rest = 1;
  uint64_t seed = 0;
};

template <class T>
inline T* pointer(const int64_t* row, int column) {
  return reinterpret_cast<T*>(row[column]);
}

// Elements begin .. end of one row; P is the dtype of the parameter and its gradient, S that of the moments. `c` is a
// copy, for what is written to could else be part of it.
template <class Rule, class P, class S, bool kPlain>
void update_elements(const int64_t* row, const double* h, typename Rule::template Scalars<Acc<P>> c,
                     const Extras& extras, int64_t begin, int64_t end) {
  using A = Acc<P>;
  static_assert(std::is_same_v<A, Acc<S>>);
  P* const param = pointer<P>(row, kParam);
  P* const grad = pointer<P>(row, kGrad);
  S* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = Rule::uses(h, k) ? pointer<S>(row, kState + k) : nullptr;
  const bool maximize = h[kMaximize] != 0, remainder = row[kFlags] & kRemainder;
  const bool stochastic = row[kFlags] & kStochastic;
  float* const master = remainder ? nullptr : pointer<float>(row, kMaster);
  uint16_t* const rest = remainder ? pointer<uint16_t>(row, kMaster) : nullptr;
  A* const ema = pointer<A>(row, kEma);
  const A factor = static_cast<A>(extras.grad_factor), unscale = static_cast<A>(extras.unscale);
  const A ema_weight = static_cast<A>(extras.ema_weight), ema_rest = static_cast<A>(extras.ema_rest);
  constexpr int64_t kDrawn = 1024;
  [[maybe_unused]] uint16_t room[random_room<uint16_t>(kDrawn)];
  [[maybe_unused]] const uint16_t* words = nullptr;
  [[maybe_unused]] int64_t from = begin;
  const auto element = [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    Vec<A> g = load(grad + j, lanes), p, s[Rule::kStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) {
      if (state[k]) s[k] = load(state[k] + j, lanes);
    }
    if constexpr (kPlain) {
      p = load(param + j, lanes);
      if (maximize) g = -g;
      store(param + j, p - Rule::template update<Math>(p, g, s, c), lanes);
    } else {
      if (extras.write_grad) store(grad + j, g * unscale, lanes);
      g = g * factor;
      if (maximize) g = -g;
      if constexpr (std::is_same_v<P, bf16>) {
        if (rest) {
          p = with_remainder(load_words(&param[j].bits, lanes), load_words(rest + j, lanes));
        } else {
          p = master ? load(master + j, lanes) : load(param + j, lanes);
        }
        p = p - Rule::template update<Math>(p, g, s, c);
        if (rest || master) {
          store_words(&param[j].bits, upper_half(p), lanes);
          if (master) store(master + j, p, lanes);
          if (rest) {
            const auto bits = p == p ? (Vec<uint32_t>)p : Vec<uint32_t>{} + 0x7fc00000u;
            store_words(rest + j, bits & 0xffffu, lanes);
          }
        } else if (stochastic) {
          // Up with the probability of the part that is cut off; neither infinity nor NaN is touched.
          const auto random = load_words(words + (j - from), lanes);
          const auto bits = (Vec<uint32_t>)p;
          const auto finite = (bits & 0x7f800000u) != 0x7f800000u;
          const auto rounded = finite ? bits + random : (p == p ? bits : Vec<uint32_t>{} + 0x7fc00000u);
          store_words(&param[j].bits, rounded >> 16, lanes);
        } else {
          store(param + j, p, lanes);
        }
      } else {
        if constexpr (std::is_same_v<P, fp16>) {
          p = master ? load(master + j, lanes) : load(param + j, lanes);
        } else {
          p = load(param + j, lanes);
        }
        p = p - Rule::template update<Math>(p, g, s, c);
        if constexpr (std::is_same_v<P, fp16>) {
          if (master) store(master + j, p, lanes);
        }
        store(param + j, p, lanes);
      }
      if (ema) store(ema + j, lerp(load(ema + j, lanes), p, ema_weight, ema_rest), lanes);
    }
    for (int k = 0; k < Rule::kStates; ++k) {
      if (state[k]) store(state[k] + j, s[k], lanes);
    }
  };
  if constexpr (!kPlain && std::is_same_v<P, bf16>) {
    for (; stochastic && from < end; from += kDrawn) {
      const int64_t count = std::min(end - from, kDrawn);
      words = random_elements(extras.seed, from, count, room, static_cast<uint32_t>(row[kStream]));
      sweep<A, 1>(from, from + count, element);
    }
    if (stochastic) return;
  }
  sweep<A, 1>(begin, end, element);
}

// f.operator()<P, S>() with the storage types of a row.
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

// ---- the table ------------------------------------------------------------------------------------------------------

struct Table {
  const int64_t* rows;
  int64_t count, elements;

  const int64_t* row(int64_t i) const { return rows + i * kColumns; }

  // Chunks of so many consecutive elements of all tensors laid end to end are the unit of work, so threads share
  // one tensor of a billion elements and a thousand of one element alike.
  static constexpr int64_t kChunk = 16384;
  int64_t chunks() const { return std::max<int64_t>((elements + kChunk - 1) / kChunk, 1); }

  // f(row index, begin, end) for the pieces of one chunk.
  template <class F>
  void pieces(int64_t chunk, const F& f) const {
    const int64_t first = chunk * kChunk, last = std::min(first + kChunk, elements);
    int64_t low = 0, high = count;  // the last row that starts at or before `first`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (row(middle)[kStart] <= first ? low : high) = middle;
    }
    for (int64_t i = low; i < count && row(i)[kStart] < last; ++i) {
      const int64_t start = row(i)[kStart];
      const int64_t begin = std::max<int64_t>(first - start, 0), end = std::min(last - start, row(i)[kNumel]);
      if (begin < end) f(i, begin, end);
    }
  }
};

inline Table read_table(const Tensor& table) {
  Table t{static_cast<const int64_t*>(table.const_data_ptr()), table.size(0), 0};
  if (t.count) t.elements = t.row(t.count - 1)[kStart] + t.row(t.count - 1)[kNumel];
  return t;
}

template <class T>
double sum_of_squares(const T* p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int D = kLanes<double>;
  Vec<double> total[kLanes<A> / D] = {};
  sweep<A, 1>(begin, end, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    const Vec<A> v = load(p + j, lanes);
    for (int k = 0; k < kLanes<A> / D; ++k) {
      Vec<double> d;
      for (int i = 0; i < D; ++i) d[i] = v[k * D + i];
      total[k] += d * d;
    }
  });
  double sum = 0;
  for (const auto& t : total) sum += sum_lanes<double>(t);
  return sum;
}

// The 2-norm of all gradients as they are stored; the same for any number of threads.
inline double norm_of(const Table& table) {
  std::vector<double> sums(table.chunks(), 0.0);
  parallel(table.chunks(), Table::kChunk, [&](int64_t from, int64_t to) {
    for (int64_t chunk = from; chunk < to; ++chunk) {
      table.pieces(chunk, [&](int64_t i, int64_t begin, int64_t end) {
        dispatch_kind(table.row(i)[kKind], [&]<class P, class S>() {
          sums[chunk] += sum_of_squares(pointer<const P>(table.row(i), kGrad), begin, end);
        });
      });
    }
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return std::sqrt(sum);
}

// A 0-dim state that torch keeps in float32, or in float64 where that is the default dtype.
inline double read_scalar(const int64_t* row, int column) {
  return row[kFlags] & kStepFloat64 ? *pointer<double>(row, column) : *pointer<float>(row, column);
}
inline void write_scalar(const int64_t* row, int column, double value) {
  if (row[kFlags] & kStepFloat64) {
    *pointer<double>(row, column) = value;
  } else {
    *pointer<float>(row, column) = static_cast<float>(value);
  }
}

// Steps taken, exact where float32 is not: the count, unless somebody changed what it was written to.
inline double steps_before(const int64_t* row, const int64_t* progress) {
  if (!row[kStep]) return static_cast<double>(*progress);
  const double stored = read_scalar(row, kStep), counted = static_cast<double>(*progress);
  const bool same = row[kFlags] & kStepFloat64 ? counted == stored : static_cast<float>(counted) == stored;
  return same ? counted : stored;
}

inline double item(const MaybeTensor& t, double otherwise) {
  if (!t) return otherwise;
  STD_TORCH_CHECK(t->numel() == 1 && !t->is_cuda(), "fusedtricks: expected a tensor of one element on the CPU");
  return t->scalar_type() == ScalarType::Double ? *static_cast<const double*>(t->const_data_ptr())
                                                : *static_cast<const float*>(t->const_data_ptr());
}

// The powers that a rule asks for in `slot`, the last of each kept: a power takes as long as all else that is prepared,
// and groups that differ in their learning rates share it.
class Powers {
 public:
  double operator()(int slot, double base, double exponent) {
    Last& last = last_[slot];
    if (base != last.base || exponent != last.exponent) last = {base, exponent, std::pow(base, exponent)};
    return last.power;
  }

 private:
  struct Last {
    double base = 0, exponent = 1, power = 0;
  };
  Last last_[3];
};

// The scalars of a rule, prepared again only where the numbers of a row's group or its history differ from the row's
// before: powers cost more than a small tensor.
template <class Rule, class A>
class Prepared {
 public:
  const typename Rule::template Scalars<A>& at(const int64_t* row, const int64_t* progress, const double* h, double t) {
    const double factor = row[kFactor] ? read_scalar(row, kFactor) : 1;
    const bool first = (row[kFlags] & kFirstMomentum) && *progress == 0;
    if (!same(h) || t != t_ || factor != before_ || first != first_) {
      h_ = h, t_ = t, before_ = after_ = factor, first_ = first;
      scalars_ = Rule::template prepare<A>(h, t, first, after_, powers_);
    }
    return scalars_;
  }
  double factor_after() const { return after_; }

 private:
  bool same(const double* h) const { return h == h_ || (h_ && std::memcmp(h, h_, kHyper * sizeof *h) == 0); }

  const double* h_ = nullptr;
  double t_ = 0, before_ = 0, after_ = 0;
  bool first_ = false;
  Powers powers_;
  typename Rule::template Scalars<A> scalars_;
};

// See fusedtricks/ops/_table.py for the arguments.
template <class Rule>
void step(const Tensor& table_tensor, const Tensor& /*segments*/, const Tensor& progress, const Tensor& hyper,
          const Tensor& outcome, const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& norm,
          std::optional<double> max_norm) {
  const Table table = read_table(table_tensor);
  auto* const counts = static_cast<int64_t*>(progress.mutable_data_ptr());
  const auto* const hypers = static_cast<const double*>(hyper.const_data_ptr());
  auto* const out = static_cast<float*>(outcome.mutable_data_ptr());  // norm of the gradients; was the step skipped?
  const bool skip = item(found_inf, 0) != 0;
  Extras extras;
  extras.write_grad = grad_scale.has_value();
  extras.unscale = 1 / item(grad_scale, 1);
  extras.grad_factor = extras.unscale;
  out[1] = skip;
  if (max_norm) {
    const double total = norm ? item(norm, 0) : norm_of(table) * std::abs(extras.unscale);
    out[0] = static_cast<float>(total);
    const double clip = *max_norm / (total + 1e-6);  // as torch.nn.utils.clip_grad_norm_
    extras.grad_factor *= clip < 1 || clip != clip ? clip : 1;
  }
  if (skip) return;
  const bool scaled = extras.write_grad || extras.grad_factor != 1;
  parallel(table.chunks(), Table::kChunk, [&](int64_t from, int64_t to) {
    Prepared<Rule, float> of_float;
    Prepared<Rule, double> of_double;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      table.pieces(chunk, [&](int64_t i, int64_t begin, int64_t end) {
        const int64_t* row = table.row(i);
        const double* h = hypers + row[kGroup] * kHyper;
        const double t = steps_before(row, counts + i) + 1;
        const bool plain = !scaled && !row[kMaster] && !row[kEma] && !(row[kFlags] & kStochastic);
        dispatch_kind(row[kKind], [&]<class P, class S>() {
          const auto& c = [&]() -> const auto& {
            if constexpr (std::is_same_v<P, double>) return of_double.at(row, counts + i, h, t);
            if constexpr (!std::is_same_v<P, double>) return of_float.at(row, counts + i, h, t);
          }();
          if (plain) return update_elements<Rule, P, S, true>(row, h, c, extras, begin, end);
          Extras mine = extras;
          mine.ema_weight = 1 - h[kEmaDecay], mine.ema_rest = h[kEmaDecay];
          mine.seed = static_cast<uint64_t>(h[kSeed]) + static_cast<uint64_t>(t);
          update_elements<Rule, P, S, false>(row, h, c, mine, begin, end);
        });
      });
    }
  });
  // Only now: every thread has read them.
  Prepared<Rule, float> prepared;
  for (int64_t i = 0; i < table.count; ++i) {
    const int64_t* row = table.row(i);
    const double t = steps_before(row, counts + i) + 1;
    if (row[kFactor]) {
      prepared.at(row, counts + i, hypers + row[kGroup] * kHyper, t);
      write_scalar(row, kFactor, prepared.factor_after());
    }
    counts[i] = static_cast<int64_t>(t);
    if (row[kStep]) write_scalar(row, kStep, t);
  }
}

}  // namespace fusedtricks::FT_ISA
