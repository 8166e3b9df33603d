// batch_norm_fwd, batch_norm_apply and batch_norm_bwd on CUDA devices.
#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"

namespace fusedtricks::cuda {

Triple batch_norm_fwd(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                      const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& counter,
                      std::optional<double> momentum, double eps, int64_t activation, double slope, bool need_y,
                      bool need_mask) {
  const char* op = "batch_norm_fwd";
  check_channels(op, "running_mean", running_mean, x);
  check_channels(op, "running_var", running_var, x);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), op,
                  ": running_mean and running_var must come together");
  STD_TORCH_CHECK(
      !counter || (counter->scalar_type() == ScalarType::Long && counter->numel() == 1 && together(*counter, x)), op,
      ": num_batches_tracked must be one int64 on the device of the input");
  STD_TORCH_CHECK(momentum || counter || !running_mean, op, ": without momentum, num_batches_tracked must be given");
  MaybeTensor mean, var;
  if (running_mean) mean = torch::stable::contiguous(*running_mean);
  if (running_var) var = torch::stable::contiguous(*running_var);
  auto measure = [&]<class T, int Width, bool Planes>(const Device& device, BatchForward<T>& a, int64_t blocks,
                                                      int threads) {
    using A = Acc<T>;
    if (counter) a.tracked = static_cast<int64_t*>(counter->mutable_data_ptr());
    if (mean) {
      a.running_mean = mean->mutable_data_ptr(), a.mean_dtype = mean->scalar_type();
      a.running_var = var->mutable_data_ptr(), a.var_dtype = var->scalar_type();
    }
    a.cumulative = !momentum;
    a.momentum = static_cast<A>(momentum.value_or(0.0));
    std::optional<ResidentBlock> resident;
    if constexpr (Planes) {
      if (need_y) resident = resident_block<T>(a.lines, 1, false, device);
      if (resident) {
        a.lines = whole(a.lines);
        device.launch(forward_resident<T, Width>, a.lines.C, resident->threads, resident->shared, a);
      }
    }
    if (blocks > 0 && !resident) {
      const int64_t columns = Planes ? a.lines.C : a.lines.length, groups = Planes ? a.lines.C : a.lines.strips;
      const Tensor parts = empty({4, a.lines.chunks, columns}, scalar_type<A>, x);
      const Tensor counters = empty({groups}, ScalarType::Int, x);
      a.parts = static_cast<A*>(parts.mutable_data_ptr());
      a.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
      device.zero(a.counters, groups * sizeof(unsigned));
      device.launch(measure_channels<T, Width, Planes>, blocks, threads, shared_for<T, Planes>(threads), a);
    }
    if (counter && (a.cumulative || blocks == 0)) device.launch(count_batch<T, 1>, 1, 1, 0, a);
    return resident.has_value();
  };
  const auto result =
      batch_forward({op, x, residual, weight, bias, eps, activation, slope, need_y, need_mask}, measure);
  if (running_mean && mean->const_data_ptr() != running_mean->const_data_ptr()) {
    Tensor to = *running_mean;
    torch::stable::copy_(to, *mean);
  }
  if (running_var && var->const_data_ptr() != running_var->const_data_ptr()) {
    Tensor to = *running_var;
    torch::stable::copy_(to, *var);
  }
  return result;
}

Triple batch_norm_apply(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                        const MaybeTensor& bias, const Tensor& mean, const MaybeTensor& rest, const Tensor& var,
                        double eps, int64_t activation, double slope, bool need_mask) {
  const char* op = "batch_norm_apply";
  check_channels(op, "mean", mean, x);
  check_channels(op, "rest", rest, x);
  check_channels(op, "var", var, x);
  auto take = [&]<class T, int Width, bool Planes>(const Device& device, BatchForward<T>& a, int64_t, int threads) {
    if (a.lines.C == 0) return false;
    const KernelParameter<T> m(mean), r(rest), v(var);
    device.launch(take_statistics<T, 1>, ceil_div(a.lines.C, threads), threads, 0, a, static_cast<Parameter>(m),
                  static_cast<Parameter>(r), static_cast<Parameter>(v));
    return false;
  };
  return batch_forward({op, x, residual, weight, bias, eps, activation, slope, true, need_mask}, take);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& grad, const Tensor& input,
                                                          const MaybeTensor& residual, const MaybeTensor& weight,
                                                          const MaybeTensor& bias, const Tensor& stats,
                                                          const MaybeTensor& bits, const MaybeTensor& given,
                                                          bool training, int64_t activation, double slope, bool need_dx,
                                                          bool need_dresidual, bool need_dweight, bool need_dbias) {
  const char* op = "batch_norm_bwd";
  check_batch(op, input, activation);
  check_like(op, "the gradient", grad, input);
  check_like(op, "residual", residual, input);
  check_channels(op, "weight", weight, input);
  check_channels(op, "bias", bias, input);
  const auto kind = accumulate_dtype(input.scalar_type());
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(
      stats.numel() == 4 * channels && stats.is_contiguous() && stats.scalar_type() == kind && together(stats, input),
      op, ": the statistics must be those that the forward returned");
  STD_TORCH_CHECK(!given || (given->numel() == 2 * channels && given->is_contiguous() && given->scalar_type() == kind &&
                             together(*given, input)),
                  op, ": sums must be (2, C) in the dtype of the statistics, on the input's device");
  const Device device(input);
  const auto like = fusedtricks::empty_like(input), nothing = empty({0}, input.scalar_type(), input);
  const auto dx = need_dx ? like : nothing;
  const auto dresidual = need_dresidual ? fusedtricks::empty_like(input) : nothing;
  const auto parameter_dtype = weight ? weight->scalar_type() : stats.scalar_type();
  auto dweight = empty({need_dweight ? channels : 0}, parameter_dtype, input);
  auto dbias = empty({need_dbias ? channels : 0}, parameter_dtype, input);
  const Channels shape(like);
  if (shape.total() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dresidual, dweight, dbias};
  }
  STD_TORCH_CHECK(!bits || (bits->numel() == shape.mask_rows() * shape.mask_columns() && bits->is_contiguous() &&
                            together(*bits, input)),
                  op, ": the mask must be the one that the forward returned");
  const MaybeTensor mask = bits && shape.bits_moved() ? MaybeTensor(moved_bits<false>(shape, *bits, device)) : bits;
  const bool depends = training && need_dx, later = depends && !given;
  const bool summing = later || need_dweight || need_dbias, writing = need_dx || need_dresidual;
  if (!summing && !writing) return {dx, dresidual, dweight, dbias};
  const Tensor x = dense(input, like), dy = dense(grad, like);
  MaybeTensor added;
  if (residual && !mask && activation != kIdentity) added = dense(*residual, like);
  const int threads = std::min(device.threads_per_block(), kChannelThreads);
  dispatch(op, input.scalar_type(), [&]<class T>() {
    using A = Acc<T>;
    const KernelParameter<T> w(weight), b(bias);
    BatchBackward<T> a{};
    a.lines = cut(shape, mask.has_value(), device, threads);
    a.dy = static_cast<const T*>(dy.const_data_ptr());
    a.x = static_cast<const T*>(x.const_data_ptr());
    a.residual = added ? static_cast<const T*>(added->const_data_ptr()) : nullptr;
    a.dx = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    a.dresidual = need_dresidual ? static_cast<T*>(dresidual.mutable_data_ptr()) : nullptr;
    a.bits = mask ? static_cast<const unsigned char*>(mask->const_data_ptr()) : nullptr;
    a.stats = static_cast<const A*>(stats.const_data_ptr());
    a.weight = w, a.bias = b;
    a.slope = static_cast<A>(slope);
    a.activation = static_cast<int>(activation);
    a.samples = shape.outer * shape.inner;
    a.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
    a.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
    a.parameter_dtype = parameter_dtype;
    Tensor parts, counters, sums;
    if (later) {
      sums = empty({2, channels}, scalar_type<A>, input);
      a.sums = static_cast<A*>(sums.mutable_data_ptr());
    }
    const int width = width_of<T>(a.lines, {a.dy, a.x, a.residual, a.dx, a.dresidual});
    const auto resident =
        later && shape.planes() ? resident_block<T>(a.lines, a.residual ? 3 : 2, a.bits, device) : std::nullopt;
    if (resident) {
      a.lines = whole(a.lines);
      return with_width<T>(width, [&]<int Width>() {
        device.launch(backward_resident<T, Width>, channels, resident->threads, resident->shared, a);
      });
    }
    const int64_t groups = shape.planes() ? channels : a.lines.strips, blocks = a.lines.chunks * groups;
    if (summing) {
      parts = empty({2, a.lines.chunks, shape.planes() ? channels : a.lines.length}, scalar_type<A>, input);
      counters = empty({groups}, ScalarType::Int, input);
      a.parts = static_cast<A*>(parts.mutable_data_ptr());
      a.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
      device.zero(a.counters, groups * sizeof(unsigned));
    }
    if (depends && given) a.means = static_cast<const A*>(given->const_data_ptr());
    with_width<T>(width, [&]<int Width>() {
      auto run = [&]<bool Planes>() {
        const int64_t shared = shared_for<T, Planes>(threads);
        if (summing && writing && !later) {
          return device.launch(backward_channels<T, Width, Planes, true>, blocks, threads, shared, a);
        }
        if (summing) device.launch(sum_channels<T, Width, Planes>, blocks, threads, shared, a);
        if (later) a.means = a.sums;
        if (writing) device.launch(backward_channels<T, Width, Planes, false>, blocks, threads, 0, a);
      };
      shape.planes() ? run.template operator()<true>() : run.template operator()<false>();
    });
  });
  return {dx, dresidual, dweight, dbias};
}

FT_KERNEL(batch_norm_fwd, "cuda", batch_norm_fwd);
FT_KERNEL(batch_norm_apply, "cuda", batch_norm_apply);
FT_KERNEL(batch_norm_bwd, "cuda", batch_norm_bwd);

}  // namespace fusedtricks::cuda
