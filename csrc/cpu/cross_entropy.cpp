// cross_entropy_fwd, cross_entropy_bwd and cross_entropy_bwd_ on the CPU: the loops over rows and tiles, the operators.
#include <memory>

#include "cross_entropy_call.h"

namespace fusedtricks::FT_ISA {

namespace {

// ---- loops ----------------------------------------------------------------------------------------------------------

// What a pass is to make; null where it is not wanted.
template <class T, class A = Acc<T>>
struct Pass {
  bool forward;
  A* losses;      // (R,)
  A* stats;       // (3, R), read by a backward
  int32_t* rank;  // (1 or 2, R)
  T* dx;
  const A* dloss;  // one, or one a row
  bool one_dloss;
  A scale;        // of dloss
  const A* dlse;  // (R,)
};

constexpr int64_t kFewClasses = 24;

template <class T, class P, bool Plain, bool Probabilities, class A = Acc<T>>
void run_rows(const Layout& l, const Loss<T, P, Plain>& loss, const Targets<A>& targets, const Pass<T>& pass) {
  const T* x0 = static_cast<const T*>(l.x.const_data_ptr());
  const P* t0 = Probabilities ? static_cast<const P*>(l.t.const_data_ptr()) : nullptr;
  const int64_t R = l.rows.count, C = l.classes;
  const bool far = goes_far(R * C * static_cast<int64_t>(sizeof(T)));
  parallel_pieces(R, C, [&](Pieces& pieces) {
    // Exponentials of a row; in the result itself where that has their type and stays in the caches.
    const bool in_result = std::is_same_v<T, A> && !far;
    std::unique_ptr<A[]> scratch(pass.forward && pass.dx && !in_result ? new A[static_cast<size_t>(C)] : nullptr);
    auto kept_at = [&](int64_t j, auto lanes) __attribute__((always_inline)) { return load(scratch.get() + j, lanes); };
    // A gradient that goes past the caches waits for the sums of the next row: memory is then read and written at once,
    // which it does a third faster than one after the other. Registers that fill half a cache line are better stored
    // without anything in between.
    constexpr bool kMayWait = kLanes<A> * sizeof(T) == 64;
    RowGradient<Probabilities, T, P, Plain> waiting{loss};
    bool waits = false;
    auto rows = [&](int64_t begin, int64_t end) {
      typename Rows<4>::Walk at(l.rows, begin);
      for (int64_t left = end - begin; left > 0; --left) {
        const T* x = x0 + at.offset[1];
        const P* t = Probabilities ? t0 + at.offset[3] : nullptr;
        T* dx = pass.dx ? pass.dx + at.offset[0] : nullptr;
        const int64_t r = at.offset[2];
        if (left > 1 || pieces.next() == end) at.next();
        const T* next = x0 + at.offset[1];
        RowTarget<A> target;
        targets.set(target, r);
        A top, sum;
        A* kept = nullptr;
        if (pass.forward) {
          top = row_top(loss, x);
          A sums[3];
          auto nothing = [](int64_t) {};
          if (!dx) {
            row_sums<false, Probabilities>(loss, x, t, top, kept, next, nothing, sums);
          } else {
            kept = in_result ? reinterpret_cast<A*>(dx) : scratch.get();
            bool summed = false;
            if constexpr (kMayWait) {
              if (waits) {
                auto store_waiting = [&](int64_t j) __attribute__((always_inline)) {
                  j += waiting.head;
                  if (j + kLanes<A> <= C) {
                    waiting.template put<true>(j, Full{}, kept_at);
                  } else if (j < C) {
                    waiting.template put<true>(j, Tail{static_cast<int>(C - j)}, kept_at);
                  }
                };
                row_sums<true, Probabilities>(loss, x, t, top, kept, next, store_waiting, sums);
                waiting.close();
                waits = false, summed = true;
              }
            }
            if (!summed) row_sums<true, Probabilities>(loss, x, t, top, kept, next, nothing, sums);
          }
          sum = sums[0];
          const A logsum = log<A>(broadcast(sum))[0];
          if (Probabilities) target.q = sums[2];
          const A za = target.at_a != A(0) ? loss.z(load(x + target.a, Tail{1})[0]) - top : A(0);
          const A zb = target.at_b != A(0) ? loss.z(load(x + target.b, Tail{1})[0]) - top : A(0);
          pass.losses[r] = row_loss(target, top, logsum, za, zb, sums[1]);
          pass.stats[r] = top, pass.stats[R + r] = sum, pass.stats[2 * R + r] = target.q;
          if (pass.rank) {
            for (int64_t h = 0; h < (targets.b ? 2 : 1); ++h) {
              const int64_t label = h ? (*targets.b)[r] : (*targets.a)[r];
              pass.rank[h * R + r] = label == loss.o.ignore_index ? static_cast<int32_t>(C) : row_rank(x, C, label);
            }
          }
        } else {
          top = pass.stats[r], sum = pass.stats[R + r];
          target.q = pass.stats[2 * R + r];
        }
        if (!dx) continue;
        const A g = (pass.one_dloss ? *pass.dloss : pass.dloss[r]) * pass.scale;
        const A lse = target.z != A(0) ? top + log<A>(broadcast(sum))[0] : A(0), unit = A(1) / sum;
        const auto slope = row_slope(target, g, pass.dlse != nullptr, pass.dlse ? pass.dlse[r] : A(0), lse);
        if (slope.zero) {
          std::memset(dx, 0, static_cast<size_t>(C) * sizeof(T));
          continue;
        }
        const bool past_caches = far && dx != x && (C >= kFewestStreamed || unaligned_head(dx) == 0);
        auto store_gradient = [&]<bool Stream>(const auto& e) {
          RowGradient<Probabilities, T, P, Plain> gradient{loss};
          gradient.template open<Stream>(x, t, dx, target, slope, unit, e);
          gradient.template store<Stream>(e);
        };
        auto store_anywhere = [&](const auto& e) {
          past_caches ? store_gradient.template operator()<true>(e) : store_gradient.template operator()<false>(e);
        };
        if (!kept) {
          store_anywhere([&](int64_t j, auto lanes) { return exp<A>(loss.z(load(x + j, lanes)) - top); });
        } else if (kMayWait && past_caches) {
          waiting.template open<true>(x, t, dx, target, slope, unit, kept_at);
          waits = true;
        } else {
          store_anywhere([&](int64_t j, auto lanes) { return load(kept + j, lanes); });
        }
      }
    };
    pieces.each(rows);
    if (waits) waiting.template store<true>(kept_at);
    streamed();
  });
}

template <bool Strided, class T, class P, bool Plain, bool Probabilities, class A = Acc<T>>
void run_tiles(const Layout& l, const Loss<T, P, Plain>& loss, const Targets<A>& targets, const Pass<T>& pass) {
  constexpr int kP = kPositions<A>;
  const int64_t R = l.rows.count, C = l.classes;
  const int planes = 1 + (Plain ? 0 : 1) + (Probabilities ? 1 : 0);
  each_tile<Strided, T, P>(l, pass.dx, planes, C, [&](A* z) {
    const size_t area = static_cast<size_t>(C) * kP;
    return [&, z,
            tile = Tile<T, P, Plain>{loss, z, Plain ? nullptr : z + area,
                                     Probabilities ? z + area * (Plain ? 1 : 2) : nullptr}](
               const Positions<T, P>& at) mutable {
      const int count = at.count;
      const auto& row = at.row;
      RowTarget<A> target[kP];
      for (int p = 0; p < count; ++p) targets.set(target[p], row[p]);
      read_tile<Strided>(at.x, C, count, z);
      if constexpr (Probabilities) read_tile<Strided>(at.t, C, count, tile.t);
      if (pass.rank) {
        for (int p = 0; p < count; ++p) {
          for (int64_t h = 0; h < (targets.b ? 2 : 1); ++h) {
            const int64_t label = h ? (*targets.b)[row[p]] : (*targets.a)[row[p]];
            int32_t rank = static_cast<int32_t>(C);
            if (label != loss.o.ignore_index && z[label * kP + p] == z[label * kP + p]) {
              rank = 0;
              for (int64_t c = 0; c < C; ++c) {
                rank += z[c * kP + p] > z[label * kP + p] || (z[c * kP + p] == z[label * kP + p] && c < label);
              }
            }
            pass.rank[h * R + row[p]] = rank;
          }
        }
      }
      tile.scale();
      if (pass.forward) {
        tile.find_top();
        for (int p = 0; p < count; ++p) {
          tile.za.at[p] = z[target[p].a * kP + p] - tile.top.at[p];
          tile.zb.at[p] = z[target[p].b * kP + p] - tile.top.at[p];
        }
        tile.template add_up<Probabilities>();
        for (int p = 0; p < count; ++p) {
          if (Probabilities) target[p].q = tile.q.at[p];
          const A top = tile.top.at[p], logsum = tile.logsum.at[p];
          pass.losses[row[p]] = row_loss(target[p], top, logsum, tile.za.at[p], tile.zb.at[p], tile.rest.at[p]);
          pass.stats[row[p]] = top, pass.stats[R + row[p]] = tile.sum.at[p];
          pass.stats[2 * R + row[p]] = target[p].q;
        }
      } else {
        for (int p = 0; p < count; ++p) {
          tile.top.at[p] = pass.stats[row[p]], tile.sum.at[p] = pass.stats[R + row[p]];
          target[p].q = pass.stats[2 * R + row[p]];
        }
        tile.exponentiate();
      }
      if (pass.dx) {
        RowSlope<A> slope[kP];
        for (int p = 0; p < count; ++p) {
          const A g = (pass.one_dloss ? *pass.dloss : pass.dloss[row[p]]) * pass.scale;
          slope[p] = row_slope(target[p], g, pass.dlse != nullptr, pass.dlse ? pass.dlse[row[p]] : A(0),
                               tile.top.at[p] + tile.logsum.at[p]);
        }
        tile.template differentiate<Probabilities>(target, slope, count);
        write_tile<Strided>(z, C, count, at.out);
      }
    };
  });
}

template <class T, class P, bool Plain, bool Probabilities>
void run_layout(const Layout& l, const Targets<Acc<T>>& targets, const Pass<T>& pass) {
  const auto& o = targets.o;
  const Loss<T, P, Plain> loss{o, {o.softcap, o.scale}, l.classes, targets.of_classes()};
  if (l.strided) return run_tiles<true, T, P, Plain, Probabilities>(l, loss, targets, pass);
  if (l.classes <= kFewClasses) return run_tiles<false, T, P, Plain, Probabilities>(l, loss, targets, pass);
  run_rows<T, P, Plain, Probabilities>(l, loss, targets, pass);
}

template <class T>
void run(const Layout& l, const Targets<Acc<T>>& targets, const Pass<T>& pass) {
  using A = Acc<T>;
  if (targets.a) {
    const bool plain = !targets.weight && targets.o.softcap == A(0) && targets.o.scale == A(1);
    return plain ? run_layout<T, T, true, false>(l, targets, pass) : run_layout<T, T, false, false>(l, targets, pass);
  }
  // Reading class probabilities outweighs what plain instances would save.
  if (l.t.scalar_type() == l.x.scalar_type()) return run_layout<T, T, false, true>(l, targets, pass);
  run_layout<T, A, false, true>(l, targets, pass);
}

template <class A>
LossOptions<A> options(int64_t ignore_index, double on, double off, double z_loss, double softcap, double scale) {
  return {ignore_index,           static_cast<A>(on),      static_cast<A>(off),
          static_cast<A>(z_loss), static_cast<A>(softcap), static_cast<A>(scale)};
}

}  // namespace

// ---- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target,
                                                                     const MaybeTensor& other, const MaybeTensor& lam,
                                                                     const MaybeTensor& weight, int64_t ignore_index,
                                                                     double on, double off, double z_loss,
                                                                     double softcap, double scale, int64_t reduction,
                                                                     bool need_dlogits, bool need_rank) {
  const char* op = "cross_entropy_fwd";
  const auto shape = check_loss(op, logits, target, other, lam, weight);
  const int64_t R = shape.rows, C = shape.columns;
  const auto accumulate = accumulate_dtype(logits.scalar_type());
  const auto dlogits = need_dlogits ? result_like(logits) : empty({0}, logits.scalar_type(), logits);
  const auto rank =
      need_rank ? empty({other ? 2 : 1, R}, ScalarType::Int, logits) : empty({0}, ScalarType::Int, logits);
  const auto losses = empty(Sizes(logits.sizes().data(), logits.dim() - 1), accumulate, logits);
  const auto stats = empty({3, R}, accumulate, logits), total = empty(Sizes(), accumulate, logits);
  const auto loss = reduction == 0 ? losses : empty(Sizes(), accumulate, logits);
  const auto t = probabilities_of(target, logits);
  const auto layout = lay_out(logits, need_dlogits ? dlogits : logits, t);
  dispatch(op, logits.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const Targets<A> targets(target, other, lam, weight, C, options<A>(ignore_index, on, off, z_loss, softcap, scale));
    const A mass = targets.total(R);
    *static_cast<A*>(total.mutable_data_ptr()) = mass;
    A* rows = static_cast<A*>(losses.mutable_data_ptr());
    const A one = 1;
    if (R > 0) {
      run<T>(layout, targets,
             {true, rows, static_cast<A*>(stats.mutable_data_ptr()),
              need_rank ? static_cast<int32_t*>(rank.mutable_data_ptr()) : nullptr,
              need_dlogits ? static_cast<T*>(layout.out.mutable_data_ptr()) : nullptr, &one, true,
              reduction == 1 ? A(1) / mass : A(1), nullptr});
    }
    if (reduction != 0) {
      const double sum = sum_rows(R, [&](int64_t r) { return static_cast<double>(rows[r]); });
      *static_cast<A*>(loss.mutable_data_ptr()) =
          static_cast<A>(reduction == 1 ? sum / static_cast<double>(mass) : sum);
    }
  });
  if (need_dlogits && layout.copies) torch::stable::copy_(const_cast<Tensor&>(dlogits), layout.out);
  return {loss, stats, total, dlogits, rank};
}

namespace {

void backward(const char* op, const Tensor& dloss, const MaybeTensor& dlse, const Tensor& logits, const Tensor& target,
              const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight, const Tensor& stats,
              const Tensor& total, int64_t ignore_index, double on, double off, double z_loss, double softcap,
              double scale, int64_t reduction, Tensor out) {
  const auto shape = check_loss(op, logits, target, other, lam, weight);
  const int64_t R = shape.rows, C = shape.columns;
  check_loss_gradient(op, logits, R, dloss, dlse, stats, total, reduction);
  if (R == 0) return;
  const auto layout = lay_out(logits, out, probabilities_of(target, logits), true);
  const Tensor grad = torch::stable::contiguous(dloss);
  const MaybeTensor lse_grad = dlse ? MaybeTensor(torch::stable::contiguous(*dlse)) : std::nullopt;
  dispatch(op, logits.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const Targets<A> targets(target, other, lam, weight, C, options<A>(ignore_index, on, off, z_loss, softcap, scale));
    const A mass = *static_cast<const A*>(total.const_data_ptr());
    run<T>(
        layout, targets,
        {false, nullptr, const_cast<A*>(static_cast<const A*>(stats.const_data_ptr())), nullptr,
         static_cast<T*>(layout.out.mutable_data_ptr()), static_cast<const A*>(grad.const_data_ptr()), reduction != 0,
         reduction == 1 ? A(1) / mass : A(1), lse_grad ? static_cast<const A*>(lse_grad->const_data_ptr()) : nullptr});
  });
  if (layout.copies) torch::stable::copy_(out, layout.out);
}

}  // namespace

Tensor cross_entropy_bwd(const Tensor& dloss, const MaybeTensor& dlse, const Tensor& logits, const Tensor& target,
                         const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight,
                         const Tensor& stats, const Tensor& total, int64_t ignore_index, double on, double off,
                         double z_loss, double softcap, double scale, int64_t reduction) {
  auto out = result_like(logits);
  backward("cross_entropy_bwd", dloss, dlse, logits, target, other, lam, weight, stats, total, ignore_index, on, off,
           z_loss, softcap, scale, reduction, out);
  return out;
}

void cross_entropy_bwd_(const Tensor& dloss, const MaybeTensor& dlse, Tensor logits, const Tensor& target,
                        const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight,
                        const Tensor& stats, const Tensor& total, int64_t ignore_index, double on, double off,
                        double z_loss, double softcap, double scale, int64_t reduction) {
  backward("cross_entropy_bwd_", dloss, dlse, logits, target, other, lam, weight, stats, total, ignore_index, on, off,
           z_loss, softcap, scale, reduction, logits);
}

FT_BOXED_KERNEL(cross_entropy_fwd);
FT_BOXED_KERNEL(cross_entropy_bwd);
FT_BOXED_KERNEL(cross_entropy_bwd_);

}  // namespace fusedtricks::FT_ISA
