// distillation_fwd and distillation_bwd on CUDA devices: arguments, and what is launched.
#include "cross_entropy_call.cuh"
#include "distillation.cuh"

namespace fusedtricks::cuda {

namespace {

// The arguments of a call, and f.operator()<P>() with the type of the teacher's logits, void for those of a sparse one.
template <class T, class Arguments>
struct Distillation : Call<T, Arguments> {
  using A = Acc<T>;

  Tensor owners[2];

  Distillation(const Device& device, const Layout& layout, const Tensor& teacher, const MaybeTensor& indices,
               const MaybeTensor& target, const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight,
               int64_t ignore_index, double on, double off, double temperature, double alpha, double soft,
               int64_t reduction, bool joining)
      // Labels that count for nothing are as good as none.
      : Call<T, Arguments>(device, layout, alpha != 1 ? target : std::nullopt, other, lam, weight,
                           options<A>(ignore_index, on, target && alpha != 1 ? off : 0, 0, 0, 1), joining) {
    this->over = static_cast<A>(1 / temperature);
    this->soft = static_cast<A>(soft / (reduction == 1 ? static_cast<double>(this->R) : 1));
    this->hard = static_cast<A>(1 - alpha);
    this->mean = reduction == 1;
    this->both = this->a.data && this->over != A(1);
    if (!indices) return;
    owners[0] = labels_of(*indices, this->known);
    owners[1] = values_of(
        teacher.scalar_type() == scalar_type<A> ? teacher : torch::stable::to(teacher, scalar_type<A>), this->values);
    this->k = teacher.size(1);
  }

  template <class F>
  void with_teacher(const F& f) const {
    if (this->known.data) return f.template operator()<void>();
    if constexpr (sizeof(T) == 2) {
      if (this->wide) return f.template operator()<A>();
    }
    f.template operator()<T>();
  }
};

}  // namespace

// ---- operators ------------------------------------------------------------------------------------------------------

Tensor distillation_bwd(const Tensor& dloss, const Tensor& student, const Tensor& teacher, const MaybeTensor& indices,
                        const MaybeTensor& target, const MaybeTensor& other, const MaybeTensor& lam,
                        const MaybeTensor& weight, const Tensor& stats, const Tensor& total, int64_t ignore_index,
                        double on, double off, double temperature, double alpha, int64_t reduction) {
  const char* op = "distillation_bwd";
  const auto shape = check_distillation(op, student, teacher, indices, target, other, lam, weight, temperature);
  check_loss_gradient(op, student, shape.rows, dloss, std::nullopt, stats, total, reduction, kDistillationStats);
  auto dstudent = fusedtricks::empty_like(student);
  if (shape.rows == 0) return dstudent;
  const Device device(student);
  const auto layout = addressable(student, dstudent, indices ? student : probabilities_of(teacher, student));
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    Distillation<T, DistillationBackward<T>> call(device, layout, teacher, indices, target, other, lam, weight,
                                                  ignore_index, on, off, temperature, alpha, alpha * temperature,
                                                  reduction, false);
    call.y = static_cast<T*>(layout.y.mutable_data_ptr());
    const Tensor gradient = values_of(dloss, call.dloss);
    call.stats = static_cast<const A*>(stats.const_data_ptr());
    call.total = static_cast<const A*>(total.const_data_ptr());
    call.one_dloss = reduction != 0;
    call.with_teacher([&]<class P>() {
      device.launch(row_distillation_gradients<T, kLanes<T>, P>, call.blocks, call.threads, 0,
                    static_cast<const DistillationBackward<T>&>(call));
    });
  });
  if (layout.y.get() != dstudent.get()) torch::stable::copy_(dstudent, layout.y);
  return dstudent;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_fwd(const Tensor& student, const Tensor& teacher,
                                                            const MaybeTensor& indices, const MaybeTensor& target,
                                                            const MaybeTensor& other, const MaybeTensor& lam,
                                                            const MaybeTensor& weight, int64_t ignore_index, double on,
                                                            double off, double temperature, double alpha,
                                                            int64_t reduction, bool need_dstudent) {
  const char* op = "distillation_fwd";
  const auto shape = check_distillation(op, student, teacher, indices, target, other, lam, weight, temperature);
  const int64_t R = shape.rows;
  const auto accumulate = accumulate_dtype(student.scalar_type());
  const Device device(student);
  const auto stats = empty({kDistillationStats, R}, accumulate, student);
  auto total = empty(Sizes(), accumulate, student);
  auto loss = empty(reduction == 0 ? Sizes(student.sizes().data(), student.dim() - 1) : Sizes(), accumulate, student);
  auto dstudent = need_dstudent ? fusedtricks::empty_like(student) : empty({0}, student.scalar_type(), student);
  if (R == 0) {
    torch::stable::fill_(total, target && alpha != 1 ? 0.0 : 1.0);
    if (reduction != 0) torch::stable::fill_(loss, reduction == 1 ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    return {loss, stats, total, dstudent};
  }
  const auto layout = addressable(student, student, indices ? student : probabilities_of(teacher, student));
  dispatch(op, student.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    Distillation<T, DistillationForward<T>> call(device, layout, teacher, indices, target, other, lam, weight,
                                                 ignore_index, on, off, temperature, alpha,
                                                 alpha * temperature * temperature, reduction, true);
    auto into = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    call.losses = reduction == 0 ? into(loss) : nullptr;
    call.stats = into(stats);
    call.total = into(total);
    call.loss = into(loss);
    call.tiles = call.blocks / call.parts;
    Tensor part_sums;
    if (call.parts > 1) {
      part_sums = empty({R, call.parts, static_cast<int64_t>(sizeof(PairSums<A>) / sizeof(A))}, accumulate, student);
      call.part_sums = static_cast<PairSums<A>*>(part_sums.mutable_data_ptr());
    }
    const Tensor sums = empty({call.tiles, 4}, accumulate, student);
    call.sums = into(sums);
    const int64_t needed = fan_counters(call.tiles) + (call.parts > 1 ? call.tiles : 0);
    const Tensor counters = empty({needed}, ScalarType::Int, student);
    call.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
    device.zero(call.counters, needed * sizeof(unsigned));
    call.with_teacher([&]<class P>() {
      device.launch(row_divergences<T, kLanes<T>, P>, call.blocks, call.threads, 0,
                    static_cast<const DistillationForward<T>&>(call));
    });
  });
  if (need_dstudent) {
    Tensor one = empty(loss.sizes(), accumulate, student);
    torch::stable::fill_(one, 1.0);
    dstudent = distillation_bwd(one, student, teacher, indices, target, other, lam, weight, stats, total, ignore_index,
                                on, off, temperature, alpha, reduction);
  }
  return {loss, stats, total, dstudent};
}

FT_KERNEL(distillation_fwd, "cuda", distillation_fwd);
FT_KERNEL(distillation_bwd, "cuda", distillation_bwd);

}  // namespace fusedtricks::cuda
