// distillation_fwd and distillation_bwd on the CPU. Rows and tiles are those of cross_entropy, of both models at once.
//
// A row of either model is read from memory once. Bytes that must move, for n elements of s bytes: forward 2ns,
// backward 3ns, both in one pass 3ns.
#include "math/distillation.h"

#include <memory>

#include "cross_entropy_call.h"

namespace fusedtricks::FT_ISA {

namespace {

// What a pass is to make; null where it is not wanted.
template <class T, class A = Acc<T>>
struct Pass {
  bool forward;
  A over;               // 1 / temperature
  A soft, hard;         // what dloss is multiplied by in the gradient: alpha T, 1 - alpha, and what "mean" divides by
  const Targets<A>* t;  // null: alpha T^2 KL alone
  A* losses;            // (R,), of the cross-entropy
  A* stats;             // (7, R), read by a backward
  T* dx;
  const A* dloss;  // one, or one a row
  bool one_dloss;
};

// What the exponentials of a row are multiplied by in its gradient: exp(u), exp(v), exp(student), and the weights.
template <class A>
struct Slopes {
  A student, teacher, hard, off;
};

// Without `both` exp(u) serves for exp(student).
template <class A>
Slopes<A> slopes_of(SoftSlope<A> soft, RowSlope<A> hard, A unit, A off, bool both) {
  const A k = hard.softmax * unit;
  return {both ? soft.student : soft.student + k, soft.teacher, both ? k : A(0), hard.g * off};
}

constexpr int64_t kFewClasses = 24;
// Results beyond this are streamed past the caches.
constexpr int64_t kCacheBytes = 32 << 20;
enum Stat { kTop, kSum, kQ, kTeacherTop, kTeacherSum, kStudentSum, kDivergence, kStats };

template <class A>
void set(RowTarget<A>& target, const Targets<A>* t, int64_t r) {
  if (t) {
    t->set(target, r);
  } else {
    target = {};
    target.dead = true;
  }
}

template <class A>
Vec<A> weights(const A* weight, int64_t j, auto lanes) {
  return weight ? load(weight + j, lanes) : broadcast(A(1));
}

// Both: the student's exponentials at the temperature and at 1 are not the same.
template <bool Both, class T, class P, class A = Acc<T>>
void run_rows(const Layout& l, const Pass<T>& pass) {
  const T* x0 = static_cast<const T*>(l.x.const_data_ptr());
  const P* t0 = static_cast<const P*>(l.t.const_data_ptr());
  const int64_t R = l.rows.count, C = l.classes;
  const Loss<T, T, true> student{{}, {}, C, nullptr};
  const Loss<P, P, true> teacher{{}, {}, C, nullptr};
  const A* weight = pass.t ? pass.t->weight : nullptr;
  const A over = pass.over;
  const bool far = R * C * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  parallel(R, 2 * C, [&](int64_t begin, int64_t end) {
    const bool keeps = pass.forward && pass.dx;
    const std::unique_ptr<A[]> scratch(keeps ? new A[static_cast<size_t>(C * (Both ? 3 : 2))] : nullptr);
    A *eu = scratch.get(), *ev = eu + C, *es = Both ? ev + C : eu;
    typename Rows<4>::Walk at(l.rows, begin);
    for (int64_t left = end - begin; left > 0; --left) {
      const T* x = x0 + at.offset[1];
      const P* t = t0 + at.offset[3];
      T* dx = pass.dx ? pass.dx + at.offset[0] : nullptr;
      const int64_t r = at.offset[2];
      if (left > 1) at.next();
      const T* next_x = x0 + at.offset[1];
      const P* next_t = t0 + at.offset[3];
      auto stat = [&](Stat s) -> A& { return pass.stats[s * R + r]; };
      RowTarget<A> target;
      set(target, pass.t, r);
      if (pass.forward) {
        const A top = row_top(student, x), teacher_top = row_top(teacher, t);
        // exp(u), exp(v), exp(v) (v - u) T, w (z - top), exp(student)
        A sums[5];
        auto add = [&]<bool Keep>() {
          reduce<A, 2>(C, sums, [&](int64_t j, auto lanes, Vec<A>* s) __attribute__((always_inline)) {
            __builtin_prefetch(next_x + j, 0, 2);
            __builtin_prefetch(next_t + j, 0, 2);
            const Vec<A> z = load(x + j, lanes) - top, v = load(t + j, lanes) - teacher_top;
            const Vec<A> e_u = exp<A>(z * over), e_v = keep<A>(exp<A>(v * over), lanes);
            s[0] += keep<A>(e_u, lanes);
            s[1] += e_v;
            s[2] += e_v != A(0) ? e_v * (v - z) : Vec<A>{};
            const Vec<A> w = keep<A>(weights(weight, j, lanes), lanes);
            s[3] += w != A(0) ? w * z : Vec<A>{};
            if constexpr (Keep) store(eu + j, e_u, lanes), store(ev + j, e_v, lanes);
            if constexpr (Both) {
              const Vec<A> e_s = exp<A>(z);
              s[4] += keep<A>(e_s, lanes);
              if constexpr (Keep) store(es + j, e_s, lanes);
            }
          });
        };
        keeps ? add.template operator()<true>() : add.template operator()<false>();
        const A sum = Both ? sums[4] : sums[0];
        stat(kTop) = top, stat(kSum) = sum, stat(kQ) = target.q;
        stat(kTeacherTop) = teacher_top, stat(kTeacherSum) = sums[1], stat(kStudentSum) = sums[0];
        stat(kDivergence) = divergence(sums[2] * over, sums[1], log<A>(broadcast(sums[0] / sums[1]))[0]);
        const A za = target.at_a != A(0) ? load(x + target.a, Tail{1})[0] - top : A(0);
        const A zb = target.at_b != A(0) ? load(x + target.b, Tail{1})[0] - top : A(0);
        pass.losses[r] = row_loss(target, top, log<A>(broadcast(sum))[0], za, zb, sums[3]);
      }
      if (!dx) continue;
      const A dloss = pass.one_dloss ? *pass.dloss : pass.dloss[r];
      const auto hard = row_slope(target, dloss * pass.hard, false, A(0), A(0));
      const auto soft = soft_slope(dloss * pass.soft, stat(kStudentSum), stat(kTeacherSum));
      const auto k = slopes_of(soft, hard, A(1) / stat(kSum), target.off, Both);
      const A top = stat(kTop), teacher_top = stat(kTeacherTop);
      auto differentiate = [&]<bool Stream>(const auto& value) {
        auto at_label = [&](int64_t c) {
          A v = value(c, Tail{1})[0];
          if (c == target.a) v -= hard.g * target.at_a;
          if (c == target.b) v -= hard.g * target.at_b;
          return v;
        };
        sweep<A, 4>(0, C, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
          store_or_stream<Stream>(dx + j, value(j, lanes), lanes);
        });
        if (hard.zero) return;
        // Rounded once, with what the label takes away.
        dx[target.a] = rounded_to<T>(at_label(target.a));
        dx[target.b] = rounded_to<T>(at_label(target.b));
      };
      auto from = [&](const auto& value) {
        const bool aligned = reinterpret_cast<uintptr_t>(dx) % (kLanes<A> * sizeof(T)) == 0;
        far&& aligned ? differentiate.template operator()<true>(value)
                      : differentiate.template operator()<false>(value);
      };
      if (keeps) {
        from([&](int64_t j, auto lanes) {
          Vec<A> v = k.student * load(eu + j, lanes) - k.teacher * load(ev + j, lanes);
          if constexpr (Both) v += k.hard * load(es + j, lanes);
          return v - k.off * weights(weight, j, lanes);
        });
      } else {
        from([&](int64_t j, auto lanes) {
          const Vec<A> z = load(x + j, lanes) - top;
          Vec<A> v = k.student * exp<A>(z * over) - k.teacher * exp<A>((load(t + j, lanes) - teacher_top) * over);
          if constexpr (Both) v += k.hard * exp<A>(z);
          return v - k.off * weights(weight, j, lanes);
        });
      }
    }
    streamed();
  });
}

// One tile of both models: logits, then exponentials, then the gradient in place of the student's.
template <class T, class A = Acc<T>>
struct Tiles {
  static constexpr int V = kVectors<A>, L = kLanes<A>, kP = kPositions<A>;
  int64_t classes;
  A *u, *v, *s;  // (C, kP) each; s null where exp(u) serves for it
  PerPosition<A> top, teacher_top, sum, student_sum, teacher_sum, cross, rest;

  // Exponentials, and the sums of `run_rows`. Blocks of classes are summed separately, so that rounding does not grow
  // with their number.
  void add_up(A over, const A* weight) {
    constexpr int64_t kBlock = 256;
    for (int i = 0; i < V; ++i) {
      const Vec<A> most = top[i], teacher_most = teacher_top[i];
      Vec<A> total[5] = {};
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        Vec<A> part[5] = {};
        for (int64_t c = begin; c < std::min(classes, begin + kBlock); ++c) {
          const int64_t at = c * kP + i * L;
          const Vec<A> z = load(u + at, Full{}) - most, d = load(v + at, Full{}) - teacher_most;
          const Vec<A> e_u = exp<A>(z * over), e_v = exp<A>(d * over);
          store(u + at, e_u, Full{}), store(v + at, e_v, Full{});
          part[0] += e_u;
          part[1] += e_v;
          part[2] += e_v != A(0) ? e_v * (d - z) : Vec<A>{};
          const A w = weight ? weight[c] : A(1);
          if (w != A(0)) part[3] += w * z;
          if (s) {
            const Vec<A> e_s = exp<A>(z);
            store(s + at, e_s, Full{});
            part[4] += e_s;
          }
        }
        for (int n = 0; n < 5; ++n) total[n] += part[n];
      }
      student_sum.set(i, total[0]), teacher_sum.set(i, total[1]), cross.set(i, total[2] * over);
      rest.set(i, total[3]), sum.set(i, s ? total[4] : total[0]);
    }
  }

  void differentiate(const PerPosition<A> (&k)[4], const A* weight) {
    for (int i = 0; i < V; ++i) {
      const Vec<A> student = k[0][i], teacher = k[1][i], hard = k[2][i], off = k[3][i];
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t at = c * kP + i * L;
        Vec<A> value = student * load(u + at, Full{}) - teacher * load(v + at, Full{});
        if (s) value += hard * load(s + at, Full{});
        store(u + at, value - off * (weight ? weight[c] : A(1)), Full{});
      }
    }
  }
};

template <bool Strided, class T, class P, class A = Acc<T>>
void run_tiles(const Layout& l, const Pass<T>& pass, bool both) {
  constexpr int kP = kPositions<A>;
  const T* x0 = static_cast<const T*>(l.x.const_data_ptr());
  const P* t0 = static_cast<const P*>(l.t.const_data_ptr());
  const int64_t R = l.rows.count, C = l.classes;
  const A* weight = pass.t ? pass.t->weight : nullptr;
  const Loss<T, T, true> loss{{}, {}, C, nullptr};
  // Tiles of neighbours stay inside the innermost level.
  const int64_t inner = Strided ? l.rows.size[l.rows.levels - 1] : R, tiles_inner = (inner + kP - 1) / kP;
  parallel(R / inner * tiles_inner, 2 * C * kP, [&](int64_t begin, int64_t end) {
    const size_t area = static_cast<size_t>(C) * kP;
    const std::unique_ptr<A[]> memory(new A[area * (both ? 3 : 2)]());
    Tiles<T> tile{C, memory.get(), memory.get() + area, both ? memory.get() + 2 * area : nullptr};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / tiles_inner * inner + i % tiles_inner * kP;
      const int count = static_cast<int>(std::min<int64_t>(kP, inner - i % tiles_inner * kP));
      typename Rows<4>::Walk at(l.rows, first);
      TileMemory<const T> x{x0 + (Strided ? at.offset[1] : 0), l.x_step, {}};
      TileMemory<const P> t{t0 + (Strided ? at.offset[3] : 0), l.t_step, {}};
      TileMemory<T> dx{pass.dx + (Strided ? at.offset[0] : 0), l.out_step, {}};
      int64_t row[kP];
      RowTarget<A> target[kP];
      for (int p = 0; p < count; ++p) {
        dx.offset[p] = at.offset[0], x.offset[p] = at.offset[1], row[p] = at.offset[2], t.offset[p] = at.offset[3];
        set(target[p], pass.t, row[p]);
        if (p + 1 < count) at.next();
      }
      read_tile<Strided>(x, C, count, tile.u);
      read_tile<Strided>(t, C, count, tile.v);
      Tile<T, T, true> student{loss, tile.u, nullptr, nullptr}, teacher{loss, tile.v, nullptr, nullptr};
      student.find_top(), teacher.find_top();
      tile.top = student.top, tile.teacher_top = teacher.top;
      A za[kP], zb[kP];
      for (int p = 0; p < count; ++p) {
        za[p] = tile.u[target[p].a * kP + p] - tile.top.at[p];
        zb[p] = tile.u[target[p].b * kP + p] - tile.top.at[p];
      }
      tile.add_up(pass.over, weight);
      for (int p = 0; pass.forward && p < count; ++p) {
        const A log_sum = log<A>(broadcast(tile.sum.at[p]))[0];
        const A log_ratio = log<A>(broadcast(tile.student_sum.at[p] / tile.teacher_sum.at[p]))[0];
        const A kl = divergence(tile.cross.at[p], tile.teacher_sum.at[p], log_ratio);
        pass.losses[row[p]] = row_loss(target[p], tile.top.at[p], log_sum, za[p], zb[p], tile.rest.at[p]);
        const A stats[] = {tile.top.at[p],         tile.sum.at[p],         target[p].q, tile.teacher_top.at[p],
                           tile.teacher_sum.at[p], tile.student_sum.at[p], kl};
        for (int s = 0; s < kStats; ++s) pass.stats[s * R + row[p]] = stats[s];
      }
      if (!pass.dx) continue;
      PerPosition<A> k[4];
      RowSlope<A> hard[kP];
      for (int p = 0; p < count; ++p) {
        const A dloss = pass.one_dloss ? *pass.dloss : pass.dloss[row[p]];
        hard[p] = row_slope(target[p], dloss * pass.hard, false, A(0), A(0));
        const auto soft = soft_slope(dloss * pass.soft, tile.student_sum.at[p], tile.teacher_sum.at[p]);
        const auto here = slopes_of(soft, hard[p], A(1) / tile.sum.at[p], target[p].off, both);
        k[0].at[p] = here.student, k[1].at[p] = here.teacher, k[2].at[p] = here.hard, k[3].at[p] = here.off;
      }
      tile.differentiate(k, weight);
      for (int p = 0; p < count; ++p) {
        if (hard[p].zero) continue;
        tile.u[target[p].a * kP + p] -= hard[p].g * target[p].at_a;
        tile.u[target[p].b * kP + p] -= hard[p].g * target[p].at_b;
      }
      write_tile<Strided>(tile.u, C, count, dx);
    }
  });
}

template <class T>
void run(const Layout& l, const Pass<T>& pass) {
  using A = Acc<T>;
  const bool both = pass.t && pass.hard != A(0) && pass.over != A(1);
  auto go = [&]<class P>() {
    if (l.strided) return run_tiles<true, T, P>(l, pass, both);
    if (l.classes <= kFewClasses) return run_tiles<false, T, P>(l, pass, both);
    both ? run_rows<true, T, P>(l, pass) : run_rows<false, T, P>(l, pass);
  };
  if (l.t.scalar_type() == l.x.scalar_type()) return go.template operator()<T>();
  go.template operator()<A>();
}

RowShape check(const char* op, const Tensor& student, const Tensor& teacher, const MaybeTensor& target,
               const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight, double temperature) {
  const auto shape = check_loss(op, student, target ? *target : student, other, lam, weight);
  STD_TORCH_CHECK(!target || holds_labels(*target), op, ": expected labels of int64, int32 or uint8");
  check_floating(op, "teacher", teacher.scalar_type());
  bool same = teacher.dim() == student.dim();
  for (int64_t d = 0; same && d < student.dim(); ++d) same = teacher.size(d) == student.size(d);
  STD_TORCH_CHECK(same, op, ": expected a teacher of the student's shape");
  STD_TORCH_CHECK(temperature > 0, op, ": expected a positive temperature, got ", temperature);
  return shape;
}

template <class A>
std::optional<Targets<A>> targets_of(const MaybeTensor& target, const MaybeTensor& other, const MaybeTensor& lam,
                                     const MaybeTensor& weight, int64_t classes, int64_t ignore_index, double on,
                                     double off) {
  const LossOptions<A> o{ignore_index, static_cast<A>(on), static_cast<A>(off), A(0), A(0), A(1)};
  return target ? std::make_optional<Targets<A>>(*target, other, lam, weight, classes, o) : std::nullopt;
}

}  // namespace

// ---- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_fwd(const Tensor& student, const Tensor& teacher,
                                                            const MaybeTensor& target, const MaybeTensor& other,
                                                            const MaybeTensor& lam, const MaybeTensor& weight,
                                                            int64_t ignore_index, double on, double off,
                                                            double temperature, double alpha, int64_t reduction,
                                                            bool need_dstudent) {
  const char* op = "distillation_fwd";
  const auto shape = check(op, student, teacher, target, other, lam, weight, temperature);
  const int64_t R = shape.rows, C = shape.columns;
  const auto accumulate = accumulate_dtype(student.scalar_type());
  const Sizes lead(student.sizes().data(), student.dim() - 1);
  const auto dstudent = need_dstudent ? fusedtricks::empty_like(student) : empty({0}, student.scalar_type(), student);
  const auto losses = empty(lead, accumulate, student), stats = empty({kStats, R}, accumulate, student);
  const auto total = empty(Sizes(), accumulate, student);
  const auto loss = reduction == 0 ? losses : empty(Sizes(), accumulate, student);
  // The teacher takes the place of class probabilities.
  const auto layout = lay_out(student, need_dstudent ? dstudent : student, probabilities_of(teacher, student));
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const auto targets = targets_of<A>(target, other, lam, weight, C, ignore_index, on, off);
    const A mass = targets ? targets->total(R) : A(1), one = 1;
    *static_cast<A*>(total.mutable_data_ptr()) = mass;
    A* rows = static_cast<A*>(losses.mutable_data_ptr());
    A* kl = static_cast<A*>(stats.mutable_data_ptr()) + kDivergence * R;
    const bool mean = reduction == 1, hard = targets && alpha != 1;
    if (R > 0) {
      run<T>(layout, {true, static_cast<A>(1 / temperature),
                      static_cast<A>(alpha * temperature / (mean ? static_cast<double>(R) : 1)),
                      static_cast<A>((1 - alpha) / (mean ? static_cast<double>(mass) : 1)), hard ? &*targets : nullptr,
                      rows, static_cast<A*>(stats.mutable_data_ptr()),
                      need_dstudent ? static_cast<T*>(layout.out.mutable_data_ptr()) : nullptr, &one, true});
    }
    const double share = alpha * temperature * temperature, other_share = 1 - alpha;
    if (reduction == 0) {
      parallel(R, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          rows[r] = static_cast<A>(share * kl[r] + (hard ? other_share * rows[r] : 0));
        }
      });
      return;
    }
    const double soft = sum_rows(R, [&](int64_t r) { return static_cast<double>(kl[r]); });
    double result = share * (mean ? soft / static_cast<double>(R) : soft);
    if (hard) {
      const double sum = sum_rows(R, [&](int64_t r) { return static_cast<double>(rows[r]); });
      result += other_share * (mean ? sum / static_cast<double>(mass) : sum);
    }
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(result);
  });
  if (need_dstudent && layout.copies) torch::stable::copy_(const_cast<Tensor&>(dstudent), layout.out);
  return {loss, stats, total, dstudent};
}

Tensor distillation_bwd(const Tensor& dloss, const Tensor& student, const Tensor& teacher, const MaybeTensor& target,
                        const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight,
                        const Tensor& stats, const Tensor& total, int64_t ignore_index, double on, double off,
                        double temperature, double alpha, int64_t reduction) {
  const char* op = "distillation_bwd";
  const auto shape = check(op, student, teacher, target, other, lam, weight, temperature);
  const int64_t R = shape.rows, C = shape.columns;
  const auto accumulate = accumulate_dtype(student.scalar_type());
  STD_TORCH_CHECK(dloss.scalar_type() == accumulate && dloss.numel() == (reduction == 0 ? R : 1), op,
                  ": the gradient must have the shape and dtype of the loss");
  STD_TORCH_CHECK(stats.numel() == kStats * R && stats.is_contiguous() && stats.scalar_type() == accumulate &&
                      total.scalar_type() == accumulate && total.numel() == 1,
                  op, ": the statistics must be those that the forward returned");
  auto dstudent = fusedtricks::empty_like(student);
  if (R == 0) return dstudent;
  const auto layout = lay_out(student, dstudent, probabilities_of(teacher, student), true);
  const Tensor grad = torch::stable::contiguous(dloss);
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const auto targets = targets_of<A>(target, other, lam, weight, C, ignore_index, on, off);
    const A mass = *static_cast<const A*>(total.const_data_ptr());
    const bool mean = reduction == 1;
    run<T>(layout, {false, static_cast<A>(1 / temperature),
                    static_cast<A>(alpha * temperature / (mean ? static_cast<double>(R) : 1)),
                    static_cast<A>((1 - alpha) / (mean ? static_cast<double>(mass) : 1)),
                    targets && alpha != 1 ? &*targets : nullptr, nullptr,
                    const_cast<A*>(static_cast<const A*>(stats.const_data_ptr())),
                    static_cast<T*>(layout.out.mutable_data_ptr()), static_cast<const A*>(grad.const_data_ptr()),
                    reduction != 0});
  });
  if (layout.copies) torch::stable::copy_(dstudent, layout.out);
  return dstudent;
}

FT_BOXED_KERNEL(distillation_fwd);
FT_BOXED_KERNEL(distillation_bwd);

}  // namespace fusedtricks::FT_ISA
