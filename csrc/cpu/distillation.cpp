// distillation_fwd and distillation_bwd on the CPU: which loop runs, the operators.
#include "distillation_tiles.h"

namespace fusedtricks::FT_ISA {

namespace {

constexpr int64_t kFewClasses = 24;

template <class T>
void run(const Layout& l, const DistillationPass<T>& pass) {
  using A = Acc<T>;
  const bool both = pass.t && pass.hard != A(0) && pass.over != A(1);
  if (pass.sparse) return both ? distill_rows<true, true, T, A>(l, pass) : distill_rows<false, true, T, A>(l, pass);
  auto go = [&]<class P>() {
    if (l.strided) return distill_tiles<true, T, P>(l, pass, both);
    if (l.classes <= kFewClasses) return distill_tiles<false, T, P>(l, pass, both);
    both ? distill_rows<true, false, T, P>(l, pass) : distill_rows<false, false, T, P>(l, pass);
  };
  if (l.t.scalar_type() == l.x.scalar_type()) return go.template operator()<T>();
  go.template operator()<A>();
}

template <class A>
std::optional<Targets<A>> targets_of(const MaybeTensor& target, const MaybeTensor& other, const MaybeTensor& lam,
                                     const MaybeTensor& weight, int64_t classes, int64_t ignore_index, double on,
                                     double off) {
  const LossOptions<A> o{ignore_index, static_cast<A>(on), static_cast<A>(off), A(0), A(0), A(1)};
  return target ? std::make_optional<Targets<A>>(*target, other, lam, weight, classes, o) : std::nullopt;
}

template <class A>
std::optional<SparseTeacher<A>> sparse_of(const MaybeTensor& indices, const Tensor& teacher) {
  return indices ? std::make_optional<SparseTeacher<A>>(*indices, teacher) : std::nullopt;
}

}  // namespace

// ---- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_fwd(const Tensor& student, const Tensor& teacher,
                                                            const MaybeTensor& indices, const MaybeTensor& target,
                                                            const MaybeTensor& other, const MaybeTensor& lam,
                                                            const MaybeTensor& weight, int64_t ignore_index, double on,
                                                            double off, double temperature, double alpha,
                                                            int64_t reduction, bool need_dstudent) {
  const char* op = "distillation_fwd";
  const auto shape = check_distillation(op, student, teacher, indices, target, other, lam, weight, temperature);
  const int64_t R = shape.rows, C = shape.columns;
  const auto accumulate = accumulate_dtype(student.scalar_type());
  const Sizes lead(student.sizes().data(), student.dim() - 1);
  const auto dstudent = need_dstudent ? result_like(student) : empty({0}, student.scalar_type(), student);
  const auto losses = empty(lead, accumulate, student), stats = empty({kDistillationStats, R}, accumulate, student);
  const auto total = empty(Sizes(), accumulate, student);
  const auto loss = reduction == 0 ? losses : empty(Sizes(), accumulate, student);
  // A dense teacher takes the place of class probabilities.
  const auto layout = lay_out(student, need_dstudent ? dstudent : student,
                              indices ? student : probabilities_of(teacher, student), false, !indices);
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const auto targets = targets_of<A>(target, other, lam, weight, C, ignore_index, on, off);
    const A mass = targets ? targets->total(R) : A(1), one = 1;
    const auto sparse = sparse_of<A>(indices, teacher);
    if (sparse) sparse->check(R, C);
    *static_cast<A*>(total.mutable_data_ptr()) = mass;
    A* rows = static_cast<A*>(losses.mutable_data_ptr());
    A* kl = static_cast<A*>(stats.mutable_data_ptr()) + kDivergence * R;
    const bool mean = reduction == 1, hard = targets && alpha != 1;
    if (R > 0) {
      run<T>(layout, {true, static_cast<A>(1 / temperature),
                      static_cast<A>(alpha * temperature / (mean ? static_cast<double>(R) : 1)),
                      static_cast<A>((1 - alpha) / (mean ? static_cast<double>(mass) : 1)), hard ? &*targets : nullptr,
                      sparse ? &*sparse : nullptr, rows, static_cast<A*>(stats.mutable_data_ptr()),
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

Tensor distillation_bwd(const Tensor& dloss, const Tensor& student, const Tensor& teacher, const MaybeTensor& indices,
                        const MaybeTensor& target, const MaybeTensor& other, const MaybeTensor& lam,
                        const MaybeTensor& weight, const Tensor& stats, const Tensor& total, int64_t ignore_index,
                        double on, double off, double temperature, double alpha, int64_t reduction) {
  const char* op = "distillation_bwd";
  const auto shape = check_distillation(op, student, teacher, indices, target, other, lam, weight, temperature);
  const int64_t R = shape.rows, C = shape.columns;
  check_loss_gradient(op, student, R, dloss, std::nullopt, stats, total, reduction, kDistillationStats);
  auto dstudent = result_like(student);
  if (R == 0) return dstudent;
  const auto layout =
      lay_out(student, dstudent, indices ? student : probabilities_of(teacher, student), true, !indices);
  const Tensor grad = torch::stable::contiguous(dloss);
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const auto targets = targets_of<A>(target, other, lam, weight, C, ignore_index, on, off);
    const A mass = *static_cast<const A*>(total.const_data_ptr());
    const auto sparse = sparse_of<A>(indices, teacher);
    const bool mean = reduction == 1;
    run<T>(layout, {false, static_cast<A>(1 / temperature),
                    static_cast<A>(alpha * temperature / (mean ? static_cast<double>(R) : 1)),
                    static_cast<A>((1 - alpha) / (mean ? static_cast<double>(mass) : 1)),
                    targets && alpha != 1 ? &*targets : nullptr, sparse ? &*sparse : nullptr, nullptr,
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
