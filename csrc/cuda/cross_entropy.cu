// cross_entropy_fwd, cross_entropy_bwd and cross_entropy_bwd_ on CUDA devices: arguments, and what is launched.
#include "cross_entropy_backward.cuh"
#include "cross_entropy_call.cuh"
#include "cross_entropy_forward.cuh"

namespace fusedtricks::cuda {

namespace {

MaybeTensor labels_in(const Tensor& target) { return holds_labels(target) ? MaybeTensor(target) : std::nullopt; }

// f.operator()<Plain, Soft>()
template <class T, class F>
void with_kind(const LossArguments<T>& a, bool ranking, const F& f) {
  if (!a.a.data) return f.template operator()<false, true>();
  if constexpr (sizeof(T) < 8) {
    if (!a.weight && !ranking && a.o.softcap == 0 && a.o.scale == 1) return f.template operator()<true, false>();
  }
  f.template operator()<false, false>();
}

void backward(const char* op, const Tensor& dloss, const MaybeTensor& dlse, const Tensor& logits, const Tensor& target,
              const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight, const Tensor& stats,
              const Tensor& total, int64_t ignore_index, double on, double off, double z_loss, double softcap,
              double scale, int64_t reduction, Tensor out) {
  const auto shape = check_loss(op, logits, target, other, lam, weight);
  check_loss_gradient(op, logits, shape.rows, dloss, dlse, stats, total, reduction);
  if (shape.rows == 0) return;
  const Device device(logits);
  const auto layout = addressable(logits, out, probabilities_of(target, logits));
  dispatch(op, logits.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    Call<T, LossBackward<T>> call(device, layout, labels_in(target), other, lam, weight,
                                  options<A>(ignore_index, on, off, z_loss, softcap, scale), false);
    call.y = static_cast<T*>(layout.y.mutable_data_ptr());
    const Tensor gradient = values_of(dloss, call.dloss);
    MaybeTensor of_lse;
    if (dlse) of_lse = values_of(*dlse, call.dlse);
    call.stats = static_cast<const A*>(stats.const_data_ptr());
    call.total = static_cast<const A*>(total.const_data_ptr());
    call.one_dloss = reduction != 0;
    call.mean = reduction == 1;
    with_kind<T>(call, false, [&]<bool Plain, bool Soft>() {
      device.launch(row_gradients<T, kLanes<T>, Plain, Soft>, call.blocks, call.threads, 0,
                    static_cast<const LossBackward<T>&>(call));
    });
  });
  if (layout.y.get() != out.get()) torch::stable::copy_(out, layout.y);
}

}  // namespace

// ---- operators ------------------------------------------------------------------------------------------------------

Tensor cross_entropy_bwd(const Tensor& dloss, const MaybeTensor& dlse, const Tensor& logits, const Tensor& target,
                         const MaybeTensor& other, const MaybeTensor& lam, const MaybeTensor& weight,
                         const Tensor& stats, const Tensor& total, int64_t ignore_index, double on, double off,
                         double z_loss, double softcap, double scale, int64_t reduction) {
  auto out = fusedtricks::empty_like(logits);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target,
                                                                     const MaybeTensor& other, const MaybeTensor& lam,
                                                                     const MaybeTensor& weight, int64_t ignore_index,
                                                                     double on, double off, double z_loss,
                                                                     double softcap, double scale, int64_t reduction,
                                                                     bool need_dlogits, bool need_rank) {
  const char* op = "cross_entropy_fwd";
  const auto shape = check_loss(op, logits, target, other, lam, weight);
  const int64_t R = shape.rows;
  const auto accumulate = accumulate_dtype(logits.scalar_type());
  const Device device(logits);
  const auto losses = empty(Sizes(logits.sizes().data(), logits.dim() - 1), accumulate, logits);
  const auto stats = empty({3, R}, accumulate, logits);
  auto total = empty(Sizes(), accumulate, logits), loss = reduction == 0 ? losses : empty(Sizes(), accumulate, logits);
  const auto rank =
      need_rank ? empty({other ? 2 : 1, R}, ScalarType::Int, logits) : empty({0}, ScalarType::Int, logits);
  auto dlogits = need_dlogits ? fusedtricks::empty_like(logits) : empty({0}, logits.scalar_type(), logits);
  if (R == 0) {
    torch::stable::zero_(total);
    if (reduction != 0) torch::stable::fill_(loss, reduction == 1 ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    return {loss, stats, total, dlogits, rank};
  }
  const auto layout = addressable(logits, logits, probabilities_of(target, logits));
  dispatch(op, logits.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    Call<T, LossForward<T>> call(device, layout, labels_in(target), other, lam, weight,
                                 options<A>(ignore_index, on, off, z_loss, softcap, scale), true);
    auto into = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    call.losses = into(losses);
    call.stats = into(stats);
    call.total = into(total);
    call.loss = into(loss);
    call.rank = need_rank ? static_cast<int32_t*>(rank.mutable_data_ptr()) : nullptr;
    call.reduction = static_cast<int>(reduction);
    call.tiles = call.blocks / call.parts;
    Tensor part_sums, part_counts;
    if (call.parts > 1) {
      part_sums = empty({R, call.parts, 4}, accumulate, logits);
      part_counts = empty({R, call.parts, 2}, ScalarType::Int, logits);
      call.part_sums = static_cast<ClassSums<A>*>(part_sums.mutable_data_ptr());
      call.part_counts = static_cast<int*>(part_counts.mutable_data_ptr());
    }
    const Tensor sums = empty({call.tiles, 2}, accumulate, logits);
    call.sums = into(sums);
    const int64_t needed = fan_counters(call.tiles) + (call.parts > 1 ? call.tiles : 0);
    const Tensor counters = empty({needed}, ScalarType::Int, logits);
    call.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
    device.zero(call.counters, needed * sizeof(unsigned));
    with_kind<T>(call, need_rank, [&]<bool Plain, bool Soft>() {
      device.launch(row_losses<T, kLanes<T>, Plain, Soft>, call.blocks, call.threads, 0,
                    static_cast<const LossForward<T>&>(call));
    });
  });
  if (need_dlogits) {
    Tensor one = empty(loss.sizes(), accumulate, logits);
    torch::stable::fill_(one, 1.0);
    dlogits = cross_entropy_bwd(one, std::nullopt, logits, target, other, lam, weight, stats, total, ignore_index, on,
                                off, z_loss, softcap, scale, reduction);
  }
  return {loss, stats, total, dlogits, rank};
}

FT_KERNEL(cross_entropy_fwd, "cuda", cross_entropy_fwd);
FT_KERNEL(cross_entropy_bwd, "cuda", cross_entropy_bwd);
FT_KERNEL(cross_entropy_bwd_, "cuda", cross_entropy_bwd_);

}  // namespace fusedtricks::cuda
