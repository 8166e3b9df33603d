// dropout_fwd and dropout_fwd_ on the CPU. Bytes that must move, for n elements of s bytes: 2ns.
#include "dropout.h"

namespace fusedtricks::FT_ISA {

// x and y in memory order as rows of unit stride. Element j of a row that begins with group g is of group
// g + j / run, or g + j % period where channels are innermost and come again with every pixel.
struct DropoutRows {
  static constexpr int64_t kLongRun = 1024;  // longer runs have rows of their own
  Rows<3> rows;                              // y, x, first group
  int64_t columns = 1, run = 1, period = 0;
  bool walkable = true;

  DropoutRows(const Tensor& y, const Tensor& x, int64_t group) {
    std::array<int64_t, 64> mask;
    int64_t stride = 1;
    for (int64_t d = x.dim() - 1; d >= 0; stride *= x.size(d--)) mask[d] = stride;
    // A dimension is inside the groups or counts them; one element of a group has the group's number.
    for (int64_t d = 0; d < x.dim(); ++d) mask[d] /= group;
    rows = collapse_rows<3>(x.dim(), x.sizes().data(), {y.strides().data(), x.strides().data(), mask.data()});
    if (rows.levels == 0) return;
    const int64_t counted = rows.stride[2][rows.levels - 1];
    walkable = follows(1) && (counted == 0 || counted == 1);
    take();
    if (counted == 0) run = columns;
    if (rows.levels == 0 || !follows(columns)) return;
    const int64_t above = rows.stride[2][rows.levels - 1];
    if (counted == 0 && above == 1 && columns < kLongRun) take();
    if (counted == 1 && above == 0 && columns <= kDropped) period = columns, take();
  }

 private:
  bool follows(int64_t stride) const {
    return rows.stride[0][rows.levels - 1] == stride && rows.stride[1][rows.levels - 1] == stride;
  }
  // The innermost level joins the columns.
  void take() {
    const int64_t size = rows.size[--rows.levels];
    columns *= size;
    rows.count /= size;
  }
};

// The random bits of consecutive elements that share them with their group.
class GroupBits {
 public:
  GroupBits(const DropoutRows& plan, uint64_t seed) : plan_(plan), seed_(seed) {}

  // Of `count` columns from `first` on, at most kDropped, in a row that begins with `group`. Of a period, `first` is a
  // multiple of it.
  const uint16_t* at(int64_t group, int64_t first, int64_t count) {
    return plan_.period ? repeated(group) : spread(group + first / plan_.run, first % plan_.run, count);
  }

 private:
  // As many periods as there is room for.
  const uint16_t* repeated(int64_t group) {
    if (group != repeated_) {
      repeated_ = group;
      const auto* bits = random_elements(seed_, group, plan_.period, drawn_);
      std::memcpy(bits_, bits, static_cast<size_t>(plan_.period) * sizeof *bits);
      for (int64_t have = plan_.period; have + plan_.period <= kDropped;) {
        const int64_t more = std::min(have, (kDropped - have) / plan_.period * plan_.period);
        std::memcpy(bits_ + have, bits_, static_cast<size_t>(more) * sizeof *bits);
        have += more;
      }
    }
    return bits_;
  }
  // The first `skip` elements of the first group are not among them.
  const uint16_t* spread(int64_t group, int64_t skip, int64_t count) {
    const int64_t groups = (skip + count - 1) / plan_.run + 1;
    const auto* bits = random_elements(seed_, group, groups, drawn_);
    for (int64_t i = 0, j = -skip; i < groups; ++i, j += plan_.run) {
      std::fill(bits_ + std::max<int64_t>(j, 0), bits_ + std::min(j + plan_.run, count), bits[i]);
    }
    return bits_;
  }

  const DropoutRows& plan_;
  uint64_t seed_;
  int64_t repeated_ = -1;
  uint16_t drawn_[random_room<uint16_t>(kDropped)];
  alignas(64) uint16_t bits_[kDropped + kLanes<float>];
};

// y = dropout(x); they may be the same.
template <bool Stream, class T, class A = Acc<T>>
void drop_columns(const T* x, T* y, int64_t count, const uint16_t* bits, uint32_t keep, A scale) {
  sweep_stored<Stream, 4>(y, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    store_or_stream<Stream>(y + j, dropped_lanes<A>(load(x + j, lanes), bits + j, keep, scale), lanes);
  });
}
template <bool Stream, class T, class A = Acc<T>>
void drop_group(const T* x, T* y, int64_t count, bool kept, A scale) {
  sweep_stored<Stream, 4>(y, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    store_or_stream<Stream>(y + j, kept ? load(x + j, lanes) * scale : Vec<A>{}, lanes);
  });
}

template <bool Stream, class T>
void drop_rows(const DropoutRows& plan, const T* x, T* y, uint64_t seed, int64_t keep) {
  const auto scale = dropout_scale<Acc<T>>(keep);
  const auto limit = static_cast<uint32_t>(keep);
  const int64_t most = plan.period ? kDropped / plan.period * plan.period : kDropped;
  const int64_t chunks = (plan.columns + most - 1) / most;
  parallel_pieces(plan.rows.count * chunks, std::min(plan.columns, most), [&](Pieces& pieces) {
    GroupBits groups(plan, seed);
    pieces.each([&](int64_t begin, int64_t end) {
      Rows<3>::Walk at(plan.rows, begin / chunks);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % chunks * most, count = std::min(plan.columns - first, most);
        const T* from = x + at.offset[1] + first;
        T* to = y + at.offset[0] + first;
        const int64_t group = at.offset[2];
        if (plan.run == 1 && !plan.period) {
          drop_elements(from, to, count, group + first, seed, limit, scale);
        } else if (plan.run == plan.columns) {
          drop_group<Stream>(from, to, count, random16(seed, group) < limit, scale);
        } else {
          drop_columns<Stream>(from, to, count, groups.at(group, first, count), limit, scale);
        }
        if (first + most >= plan.columns && item + 1 < end) at.next();
      }
    });
    if (Stream) streamed();
  });
}

void run(const char* op, const DropoutRows& plan, const Tensor& x, const Tensor& y, uint64_t seed, int64_t keep) {
  dispatch(op, x.scalar_type(), [&]<class T>() {
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    // Rows of few whole lines would end with parts of one too often.
    const bool stream =
        from != to && plan.columns >= kFewestStreamed && worth_streaming(2 * x.numel() * int64_t{sizeof(T)});
    stream ? drop_rows<true>(plan, from, to, seed, keep) : drop_rows<false>(plan, from, to, seed, keep);
  });
}

// y = dropout(x); they may be the same tensor.
void drop(const char* op, const Tensor& x, Tensor& y, const Tensor& seed, int64_t keep, int64_t group) {
  check_dropout(op, x, seed, keep, group);
  if (x.numel() == 0) return;
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const DropoutRows plan(y, x, group);
  if (plan.walkable) return run(op, plan, x, y, key, keep);
  // Elements that are neighbours in memory but not in counting order: through a plain tensor.
  Tensor plain = empty(x.sizes(), x.scalar_type(), x);
  torch::stable::copy_(plain, x);
  run(op, DropoutRows(plain, plain, group), plain, plain, key, keep);
  torch::stable::copy_(y, plain);
}

Tensor dropout_fwd(const Tensor& x, const Tensor& seed, int64_t keep, int64_t group) {
  auto y = result_like(x);
  drop("dropout_fwd", x, y, seed, keep, group);
  return y;
}

void dropout_fwd_(Tensor x, const Tensor& seed, int64_t keep, int64_t group) {
  drop("dropout_fwd_", x, x, seed, keep, group);
}

FT_CPU_KERNEL(dropout_fwd);
FT_CPU_KERNEL(dropout_fwd_);

}  // namespace fusedtricks::FT_ISA
