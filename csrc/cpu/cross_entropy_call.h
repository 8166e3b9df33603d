// A call of a loss on the CPU: its labels, the layout of its logits, sums over rows, and the entry in the kernel list.
#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "cross_entropy_tiles.h"

namespace fusedtricks::FT_ISA {

// ---- arguments ------------------------------------------------------------------------------------------------------

struct Labels {
  Tensor owner;
  const void* data = nullptr;
  ScalarType type = ScalarType::Long;

  explicit Labels(const Tensor& t)
      : owner(torch::stable::contiguous(t)), data(owner.const_data_ptr()), type(owner.scalar_type()) {}

  int64_t operator[](int64_t r) const {
    if (type == ScalarType::Long) return static_cast<const int64_t*>(data)[r];
    if (type == ScalarType::Int) return static_cast<const int32_t*>(data)[r];
    return static_cast<const uint8_t*>(data)[r];
  }
};

inline bool adjacent(const Layout& l) {
  return l.rows.levels > 0 && l.rows.stride[0][l.rows.levels - 1] == 1 && l.rows.stride[1][l.rows.levels - 1] == 1 &&
         l.rows.stride[3][l.rows.levels - 1] == 1;
}

// `out` and `t` are the logits once more where there is no result of their size, or no probabilities. Without `tiles`
// strided classes are copied.
inline Layout lay_out(const Tensor& logits, const Tensor& out, const Tensor& t, bool in_place = false,
                      bool tiles = true) {
  const int64_t lead = logits.dim() - 1;
  auto describe = [&](const Tensor& x, const Tensor& o, const Tensor& p) {
    const auto dense = row_major(logits, 1);
    Layout l{
        x, o, p, {}, logits.size(lead), x.stride(lead), o.stride(lead), p.stride(lead), false, o.get() != out.get()};
    l.rows = collapse_rows<4>(lead, x.sizes().data(),
                              {o.strides().data(), x.strides().data(), dense.data(), p.strides().data()});
    return l;
  };
  auto unit = [&](const Layout& l) { return l.classes == 1 || (l.x_step == 1 && l.out_step == 1 && l.t_step == 1); };
  Layout l = describe(logits, out, t);
  if (unit(l)) return l;
  l.strided = true;
  if (tiles && adjacent(l) && l.classes <= kMostTileClasses) return l;
  const Tensor x = torch::stable::contiguous(logits);
  const bool no_result = out.get() == logits.get() && !in_place;
  return describe(x, no_result ? x : fusedtricks::empty_like(x),
                  t.get() == logits.get() ? x : torch::stable::contiguous(t));
}

// Sums of f(r), a double each, over all rows: chunks have their own, added in order, whatever the number of threads.
template <class F>
double sum_rows(int64_t rows, const F& f) {
  constexpr int64_t kChunk = 8192;
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(chunks)]);
  parallel(chunks, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0;
      for (int64_t r = c * kChunk; r < std::min(rows, (c + 1) * kChunk); ++r) sum += f(r);
      partial[c] = sum;
    }
  });
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += partial[c];
  return total;
}

// Everything about the targets of a call.
template <class A>
struct Targets {
  std::optional<Labels> a, b;
  const A* lam = nullptr;
  bool one_lam = true;
  const A* weight = nullptr;
  A weight_sum;
  Tensor lam_owner, weight_owner;
  int64_t classes;
  LossOptions<A> o;

  Targets(const Tensor& target, const MaybeTensor& other, const MaybeTensor& lambda, const MaybeTensor& w, int64_t C,
          const LossOptions<A>& options)
      : weight_sum(static_cast<A>(C)), classes(C), o(options) {
    if (holds_labels(target)) a.emplace(target);
    if (other) {
      b.emplace(*other);
      lam_owner = torch::stable::contiguous(*lambda);
      lam = static_cast<const A*>(lam_owner.const_data_ptr());
      one_lam = lambda->dim() == 0;
    }
    if (w) {
      weight_owner = torch::stable::contiguous(*w);
      weight = static_cast<const A*>(weight_owner.const_data_ptr());
      double sum = 0;
      for (int64_t c = 0; c < C; ++c) sum += weight[c];
      weight_sum = static_cast<A>(sum);
    }
  }

  // Null where a class that is no label has no share.
  const A* of_classes() const { return a && o.off == A(0) ? nullptr : weight; }

  void set(RowTarget<A>& t, int64_t r) const {
    if (a) {
      const int64_t first = (*a)[r];
      set_row_target(t, first, b ? (*b)[r] : first, lam ? lam[one_lam ? 0 : r] : A(1), weight, weight_sum, classes, o);
    } else {
      t.a = t.b = 0;
      t.at_a = t.at_b = 0;
      t.off = t.mass = 1;
      t.z = o.z_loss;
      t.dead = false;
    }
  }

  bool wrong(int64_t label) const {
    return label != o.ignore_index && static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes);
  }

  // What "mean" divides by. Refuses labels that are no class.
  A total(int64_t rows) const {
    std::atomic<bool> any = false;
    const double sum = sum_rows(rows, [&](int64_t r) {
      RowTarget<A> t;
      set(t, r);
      if (a && (wrong((*a)[r]) || (b && wrong((*b)[r])))) any = true;
      return static_cast<double>(t.mass);
    });
    for (int64_t r = 0; any && r < rows; ++r) {
      for (int64_t label : {(*a)[r], b ? (*b)[r] : (*a)[r]}) {
        if (!wrong(label)) continue;
        throw std::out_of_range("Target " + std::to_string(label) + " is out of bounds: row " + std::to_string(r) +
                                ", expected 0 to " + std::to_string(classes - 1) + " or ignore_index " +
                                std::to_string(o.ignore_index));
      }
    }
    return static_cast<A>(sum);
  }
};

// ---- registration ---------------------------------------------------------------------------------------------------

// As TORCH_BOX, whose tuple of so many arguments is a function that the instruction sets would share.
template <auto F>
struct Boxed;
template <class R, class... Args, R (*F)(Args...)>
struct Boxed<F> {
  template <size_t... I>
  static R apply(StableIValue* stack, std::index_sequence<I...>) {
    return F(torch::stable::detail::to<std::remove_cvref_t<Args>>(stack[I])...);
  }

  static void call(StableIValue* stack, uint64_t, uint64_t) {
    using torch::stable::detail::from;
    constexpr auto all = std::index_sequence_for<Args...>{};
    if constexpr (std::is_void_v<R>) {
      apply(stack, all);
    } else if constexpr (std::is_same_v<R, Tensor>) {
      stack[0] = from(apply(stack, all));
    } else {
      auto results = apply(stack, all);
      [&]<size_t... I>(std::index_sequence<I...>) {
        ((stack[I] = from(std::get<I>(results))), ...);
      }(std::make_index_sequence<std::tuple_size_v<R>>{});
    }
  }
};

#define FT_BOXED_KERNEL(op) \
  static const bool entered_##op = enter_kernel({#op, "cpu:" FT_TEXT(FT_ISA), &Boxed<&op>::call})

}  // namespace fusedtricks::FT_ISA
