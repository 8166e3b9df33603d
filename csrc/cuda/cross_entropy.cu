// cross_entropy_fwd, cross_entropy_bwd and cross_entropy_bwd_ on CUDA devices: arguments, and what is launched.
#include "cross_entropy_backward.cuh"
#include "cross_entropy_forward.cuh"

namespace fusedtricks::cuda {

namespace {

// A warp has a row to itself up to so many slots: four rounds of what it has in flight.
constexpr int64_t kSlotsOfWarp = 4 * kSlotsAtOnce * kWarp;
// Blocks that a device is given at least, per multiprocessor, before rows are left whole; and a block's least share.
constexpr int64_t kBlocksEach = 4, kLeastShare = 2 * kSlotsAtOnce;

Tensor labels_of(const Tensor& t, LabelColumn& column) {
  Tensor owner = torch::stable::contiguous(t);
  column = {owner.const_data_ptr(), owner.scalar_type()};
  return owner;
}

template <class A>
Tensor values_of(const Tensor& t, const A*& data) {
  Tensor owner = torch::stable::contiguous(t);
  data = static_cast<const A*>(owner.const_data_ptr());
  return owner;
}

// Where the rows of the logits, a result and class probabilities lie; none where that takes more than two levels.
struct Layout {
  Tensor x, y, t;
  RowMap<4> rows;
};

std::optional<Layout> lay_out(const Tensor& x, const Tensor& y, const Tensor& t) {
  const auto dense = row_major(x, 1);
  const auto rows = map_rows(collapse_rows<4>(
      x.dim() - 1, x.sizes().data(), {y.strides().data(), x.strides().data(), dense.data(), t.strides().data()}));
  if (!rows) return std::nullopt;
  return Layout{x, y, t, *rows};
}

// The tensors themselves, or dense copies; a `y` that is not the caller's has to be copied back.
Layout addressable(const Tensor& x, const Tensor& y, const Tensor& t) {
  if (const auto found = lay_out(x, y, t)) return *found;
  const Tensor dense = torch::stable::contiguous(x);
  return *lay_out(dense, fusedtricks::empty_like(dense), torch::stable::contiguous(t));
}

// The arguments that forward and backward share, and the grid.
template <class T, class Arguments>
struct Call : Arguments {
  using A = Acc<T>;
  Tensor holds[4];
  int threads;
  int64_t blocks;
  bool soft, plain;

  Call(const Device& device, const Layout& l, const Tensor& target, const MaybeTensor& other, const MaybeTensor& lambda,
       const MaybeTensor& w, const LossOptions<A>& options, bool ranking, bool joining)
      : Arguments{} {
    const int64_t lead = l.x.dim() - 1;
    this->x = static_cast<const T*>(l.x.const_data_ptr());
    this->rows = l.rows;
    this->C = l.x.size(lead);
    this->R = l.x.numel() / this->C;
    this->x_step = this->C == 1 ? 1 : l.x.stride(lead);
    this->y_step = this->C == 1 ? 1 : l.y.stride(lead);
    this->t_step = this->C == 1 ? 1 : l.t.stride(lead);
    this->o = options;
    soft = !holds_labels(target);
    if (soft) {
      this->t = l.t.const_data_ptr();
      this->wide = l.t.scalar_type() == scalar_type<A>;
    } else {
      holds[0] = labels_of(target, this->a);
    }
    if (other) {
      holds[1] = labels_of(*other, this->b);
      holds[2] = values_of(*lambda, this->lam);
      this->one_lam = lambda->dim() == 0;
    }
    if (w) holds[3] = values_of(*w, this->weight);
    plain = !soft && !w && !ranking && options.softcap == A(0) && options.scale == A(1) && sizeof(T) < 8;

    const int most = std::min(device.threads_per_block(), kLossThreads);
    const int64_t slots = this->C / kLanes<T>;
    this->lanes = 1;
    if (this->x_step == 1) {
      while (this->lanes < std::min<int64_t>(slots, kWarp)) this->lanes *= 2;
      if (slots > kSlotsOfWarp) this->lanes = most;
    }
    threads = this->lanes > kWarp ? this->lanes : std::min(most, 128);
    blocks = ceil_div(this->R, threads / this->lanes);
    // The backward has nothing to join, and so no reason for long parts.
    const int64_t share = kLeastShare * this->lanes, wanted = ceil_div(kBlocksEach * device.processors(), blocks);
    this->parts = std::max<int64_t>(std::min(ceil_div(slots, share), joining ? wanted : slots), 1);
    this->length = ceil_div(slots, this->parts);
    if (this->length > 0) this->parts = ceil_div(slots, this->length);
    blocks *= this->parts;
  }
};

template <class A>
LossOptions<A> options(int64_t ignore_index, double on, double off, double z_loss, double softcap, double scale) {
  return {ignore_index,           static_cast<A>(on),      static_cast<A>(off),
          static_cast<A>(z_loss), static_cast<A>(softcap), static_cast<A>(scale)};
}

// f.operator()<Plain, Soft>()
template <class T, class C, class F>
void with_kind(const C& call, const F& f) {
  if (call.soft) return f.template operator()<false, true>();
  if constexpr (sizeof(T) < 8) {
    if (call.plain) return f.template operator()<true, false>();
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
    Call<T, LossBackward<T>> call(device, layout, target, other, lam, weight,
                                  options<A>(ignore_index, on, off, z_loss, softcap, scale), false, false);
    call.y = static_cast<T*>(layout.y.mutable_data_ptr());
    const Tensor gradient = values_of(dloss, call.dloss);
    MaybeTensor of_lse;
    if (dlse) of_lse = values_of(*dlse, call.dlse);
    call.stats = static_cast<const A*>(stats.const_data_ptr());
    call.total = static_cast<const A*>(total.const_data_ptr());
    call.one_dloss = reduction != 0;
    call.mean = reduction == 1;
    with_kind<T>(call, [&]<bool Plain, bool Soft>() {
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
    Call<T, LossForward<T>> call(device, layout, target, other, lam, weight,
                                 options<A>(ignore_index, on, off, z_loss, softcap, scale), need_rank, true);
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
    with_kind<T>(call, [&]<bool Plain, bool Soft>() {
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
