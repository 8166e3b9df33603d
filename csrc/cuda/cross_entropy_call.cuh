// A call of a loss on CUDA devices: where its rows lie, its labels, and the grid.
#pragma once

#include "cross_entropy.cuh"

namespace fusedtricks::cuda {

// A warp has a row to itself up to so many slots: four rounds of what it has in flight.
inline constexpr int64_t kSlotsOfWarp = 4 * kSlotsAtOnce * kWarp;
// Blocks that a device is given at least, per multiprocessor, before rows are left whole; and a block's least share.
inline constexpr int64_t kBlocksEach = 4, kLeastShare = 2 * kSlotsAtOnce;

inline Tensor labels_of(const Tensor& t, LabelColumn& column) {
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

inline std::optional<Layout> lay_out(const Tensor& x, const Tensor& y, const Tensor& t) {
  const auto dense = row_major(x, 1);
  const auto rows = map_rows(collapse_rows<4>(
      x.dim() - 1, x.sizes().data(), {y.strides().data(), x.strides().data(), dense.data(), t.strides().data()}));
  if (!rows) return std::nullopt;
  return Layout{x, y, t, *rows};
}

// The tensors themselves, or dense copies; a `y` that is not the caller's has to be copied back.
inline Layout addressable(const Tensor& x, const Tensor& y, const Tensor& t) {
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

  // `labels` may be none. joining: several blocks that share a row have to join what they found.
  Call(const Device& device, const Layout& l, const MaybeTensor& labels, const MaybeTensor& other,
       const MaybeTensor& lambda, const MaybeTensor& w, const LossOptions<A>& options, bool joining)
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
    this->t = l.t.const_data_ptr();
    this->wide = l.t.scalar_type() == scalar_type<A>;
    if (labels) holds[0] = labels_of(*labels, this->a);
    if (other) {
      holds[1] = labels_of(*other, this->b);
      holds[2] = values_of(*lambda, this->lam);
      this->one_lam = lambda->dim() == 0;
    }
    if (w) holds[3] = values_of(*w, this->weight);

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

}  // namespace fusedtricks::cuda
