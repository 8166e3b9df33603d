// dropout_fwd and dropout_fwd_ on the CPU. Bytes that must move, for n elements of s bytes: 2ns.
#include "dropout.h"

namespace fusedtricks::FT_ISA {

// x and y in memory order as rows of unit stride. A row of mask stride 1 has consecutive groups, one of stride 0 a
// single group.
struct DropoutRows {
  Rows<3> rows;  // y, x, groups
  int64_t columns = 1;
  bool unit = true, one_group = true, consecutive = true;

  DropoutRows(const Tensor& y, const Tensor& x, int64_t group) {
    std::array<int64_t, 64> mask;
    int64_t stride = 1;
    for (int64_t d = x.dim() - 1; d >= 0; stride *= x.size(d--)) mask[d] = stride;
    // A dimension is inside the groups or counts them; one element of a group has the group's number.
    for (int64_t d = 0; d < x.dim(); ++d) mask[d] /= group;
    rows = collapse_rows<3>(x.dim(), x.sizes().data(), {y.strides().data(), x.strides().data(), mask.data()});
    if (rows.levels == 0) return;
    const int last = --rows.levels;
    columns = rows.size[last];
    rows.count /= columns;
    unit = rows.stride[0][last] == 1 && rows.stride[1][last] == 1;
    one_group = rows.stride[2][last] == 0;
    consecutive = rows.stride[2][last] == 1;
  }
};

template <class T, class A = Acc<T>>
void drop_group(const T* x, T* y, int64_t count, bool kept, A scale) {
  sweep<A>(0, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    store(y + j, kept ? load(x + j, lanes) * scale : Vec<A>{}, lanes);
  });
}

void run(const char* op, const DropoutRows& plan, const Tensor& x, const Tensor& y, uint64_t seed, int64_t keep) {
  const int64_t chunks = (plan.columns + kDropped - 1) / kDropped;
  dispatch(op, x.scalar_type(), [&]<class T>() {
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto scale = dropout_scale<Acc<T>>(keep);
    parallel(plan.rows.count * chunks, std::min(plan.columns, kDropped), [&](int64_t begin, int64_t end) {
      Rows<3>::Walk at(plan.rows, begin / chunks);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks, first = chunk * kDropped, count = std::min(plan.columns - first, kDropped);
        const T* source = from + at.offset[1] + first;
        T* target = to + at.offset[0] + first;
        if (plan.consecutive) {
          drop_elements(source, target, count, at.offset[2] + first, seed, static_cast<uint32_t>(keep), scale);
        } else {
          drop_group(source, target, count, random16(seed, at.offset[2]) < keep, scale);
        }
        if (chunk == chunks - 1 && item + 1 < end) at.next();
      }
    });
  });
}

// y = dropout(x); they may be the same tensor.
void drop(const char* op, const Tensor& x, Tensor& y, const Tensor& seed, int64_t keep, int64_t group) {
  check_dropout(op, x, seed, keep, group);
  if (x.numel() == 0) return;
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const DropoutRows plan(y, x, group);
  if (plan.unit && (plan.one_group || plan.consecutive)) return run(op, plan, x, y, key, keep);
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
