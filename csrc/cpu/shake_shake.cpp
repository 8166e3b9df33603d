// shake_shake on the CPU. Bytes that must move, for n elements of s bytes: 3ns each way.
#include "math/mixup.h"
#include "mixing.h"

namespace fusedtricks::FT_ISA {

inline constexpr int64_t kChunk = 2048;

// The elements of three tensors in memory order as rows of unit stride, each inside one sample.
struct SampleRows {
  Rows<4> rows;  // three tensors, weights
  int64_t columns = 1;
  bool unit = true;

  SampleRows(const Tensor& a, const Tensor& b, const Tensor& c, bool per_sample) {
    std::array<int64_t, 64> weight{};
    weight[0] = per_sample;
    rows = collapse_rows<4>(a.dim(), a.sizes().data(),
                            {a.strides().data(), b.strides().data(), c.strides().data(), weight.data()});
    const int last = rows.levels - 1;
    if (last < 0 || rows.stride[3][last] != 0) return;  // a sample is one element
    columns = rows.size[last];
    rows.count /= columns;
    rows.levels = last;
    for (int k = 0; k < 3; ++k) unit = unit && rows.stride[k][last] == 1;
  }
};

// f(offsets of a, b, c, weight's index, count) for pieces of rows.
template <class F>
void for_pieces(const SampleRows& plan, bool stream, const F& f) {
  const int64_t chunks = (plan.columns + kChunk - 1) / kChunk;
  parallel(plan.rows.count * chunks, std::min(plan.columns, kChunk), [&](int64_t begin, int64_t end) {
    Rows<4>::Walk at(plan.rows, begin / chunks);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % chunks, first = chunk * kChunk;
      f(at.offset[0] + first, at.offset[1] + first, at.offset[2] + first, at.offset[3],
        std::min(plan.columns - first, kChunk));
      if (chunk == chunks - 1 && item + 1 < end) at.next();
    }
    if (stream) streamed();
  });
}

Tensor shake_shake_fwd(const Tensor& x1, const Tensor& x2, const Tensor& alpha) {
  check_floating("shake_shake_fwd", "x1", x1.scalar_type());
  check_weights("shake_shake_fwd", x1, alpha);
  STD_TORCH_CHECK(x2.scalar_type() == x1.scalar_type() && x2.sizes().equals(x1.sizes()),
                  "shake_shake_fwd: x2 must have the shape and dtype of x1");
  auto y = result_like(x1);
  if (x1.numel() == 0) return y;
  const bool per_sample = alpha.numel() > 1;
  auto run = [&](const Tensor& a, const Tensor& b, const Tensor& out) {
    const SampleRows plan(out, a, b, per_sample);
    if (!plan.unit) return false;
    dispatch("shake_shake_fwd", a.scalar_type(), [&]<class T>() {
      using A = Acc<T>;
      const T *p = static_cast<const T*>(a.const_data_ptr()), *q = static_cast<const T*>(b.const_data_ptr());
      T* to = static_cast<T*>(out.mutable_data_ptr());
      const bool stream = worth_streaming(3 * a.numel() * int64_t{sizeof(T)});
      const A* weight = static_cast<const A*>(alpha.const_data_ptr());
      for_pieces(plan, stream, [&](int64_t at_y, int64_t at_a, int64_t at_b, int64_t i, int64_t count) {
        const A w = weight[i], rest = A(1) - w;
        with_stream(stream, to + at_y, count, [&]<bool Stream>() {
          sweep_stored<Stream, 4>(to + at_y, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
            store_or_stream<Stream>(to + at_y + j, mixed(load(p + at_a + j, lanes), load(q + at_b + j, lanes), w, rest),
                                    lanes);
          });
        });
      });
    });
    return true;
  };
  if (run(x1, x2, y)) return y;
  const Tensor plain = empty(x1.sizes(), x1.scalar_type(), x1);
  run(torch::stable::contiguous(x1), torch::stable::contiguous(x2), plain);
  torch::stable::copy_(y, plain);
  return y;
}

std::tuple<Tensor, Tensor> shake_shake_bwd(const Tensor& dy, const Tensor& beta) {
  check_floating("shake_shake_bwd", "dy", dy.scalar_type());
  check_weights("shake_shake_bwd", dy, beta);
  auto dx1 = result_like(dy), dx2 = result_like(dy);
  if (dy.numel() == 0) return {dx1, dx2};
  const bool per_sample = beta.numel() > 1;
  auto run = [&](const Tensor& from, const Tensor& one, const Tensor& two) {
    const SampleRows plan(one, two, from, per_sample);
    if (!plan.unit) return false;
    dispatch("shake_shake_bwd", from.scalar_type(), [&]<class T>() {
      using A = Acc<T>;
      const T* g = static_cast<const T*>(from.const_data_ptr());
      T *p = static_cast<T*>(one.mutable_data_ptr()), *q = static_cast<T*>(two.mutable_data_ptr());
      const bool stream = worth_streaming(3 * from.numel() * int64_t{sizeof(T)});
      const A* weight = static_cast<const A*>(beta.const_data_ptr());
      for_pieces(plan, stream, [&](int64_t at_1, int64_t at_2, int64_t at, int64_t i, int64_t count) {
        const A w = weight[i], rest = A(1) - w;
        const bool both = (reinterpret_cast<uintptr_t>(p + at_1) - reinterpret_cast<uintptr_t>(q + at_2)) % 64 == 0;
        with_stream(stream && both, p + at_1, count, [&]<bool Stream>() {
          sweep_stored<Stream, 4>(p + at_1, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
            const auto v = load(g + at + j, lanes);
            store_or_stream<Stream>(p + at_1 + j, v * w, lanes);
            store_or_stream<Stream>(q + at_2 + j, v * rest, lanes);
          });
        });
      });
    });
    return true;
  };
  if (run(dy, dx1, dx2)) return {dx1, dx2};
  const Tensor plain = torch::stable::contiguous(dy);
  const Tensor one = empty(dy.sizes(), dy.scalar_type(), dy), two = empty(dy.sizes(), dy.scalar_type(), dy);
  run(plain, one, two);
  torch::stable::copy_(dx1, one);
  torch::stable::copy_(dx2, two);
  return {dx1, dx2};
}

FT_CPU_KERNEL(shake_shake_fwd);
FT_CPU_KERNEL(shake_shake_bwd);

}  // namespace fusedtricks::FT_ISA
