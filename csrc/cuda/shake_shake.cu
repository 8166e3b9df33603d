// shake_shake_fwd and shake_shake_bwd on CUDA devices. Bytes that must move, for n elements of s bytes: 3ns each way.
#include "mixing.cuh"

namespace fusedtricks::cuda {

template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kPieceThreads)
    shake(const T* x1, const T* x2, T* y, const A* alpha, int64_t samples, int64_t D) {
  const Piece<Width> piece(samples, D);
  const A weight = __ldg(alpha + piece.sample), rest = A(1) - weight;
  alignas(kVectorBytes) T a[kInFlight][Width], b[kInFlight][Width];
  piece.each([&](int k, int64_t column) {
    const int64_t at = piece.sample * D + column;
    load<Width, Cache::kStream>(x1 + at, a[k]);
    load<Width, Cache::kStream>(x2 + at, b[k]);
  });
  piece.each([&](int k, int64_t column) {
    A value[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) value[i] = mixed(widen(a[k][i]), widen(b[k][i]), weight, rest);
    round_to(value, a[k]);
    store<Width, Cache::kStream>(a[k], y + piece.sample * D + column);
  });
}

template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kPieceThreads)
    shake_backward(const T* dy, T* dx1, T* dx2, const A* beta, int64_t samples, int64_t D) {
  const Piece<Width> piece(samples, D);
  const A weight = __ldg(beta + piece.sample), rest = A(1) - weight;
  alignas(kVectorBytes) T g[kInFlight][Width];
  piece.each([&](int k, int64_t column) { load<Width, Cache::kStream>(dy + piece.sample * D + column, g[k]); });
  piece.each([&](int k, int64_t column) {
    A first[Width], second[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) first[i] = widen(g[k][i]) * weight, second[i] = widen(g[k][i]) * rest;
    const int64_t at = piece.sample * D + column;
    round_to(first, g[k]);
    store<Width, Cache::kStream>(g[k], dx1 + at);
    round_to(second, g[k]);
    store<Width, Cache::kStream>(g[k], dx2 + at);
  });
}

// With one weight for all, the batch is one sample.
struct Batch {
  int64_t samples, D;

  Batch(const Tensor& x, const Tensor& weights) : samples(weights.numel() == 1 ? 1 : x.size(0)) {
    D = x.numel() / samples;
  }
};

void run_forward(const Device& device, const Tensor& x1, const Tensor& x2, Tensor& y, const Tensor& alpha) {
  const Batch batch(x1, alpha);
  dispatch("shake_shake_fwd", x1.scalar_type(), [&]<class T>() {
    const auto *a = static_cast<const T*>(x1.const_data_ptr()), *b = static_cast<const T*>(x2.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    with_alignment<kLanes<T>>(batch.D, {a, b, to}, [&]<int Width>() {
      const Pieces pieces(device, batch.samples, batch.D, Width);
      device.launch(shake<T, Width>, pieces.blocks, pieces.threads, 0, a, b, to,
                    static_cast<const Acc<T>*>(alpha.const_data_ptr()), batch.samples, batch.D);
    });
  });
}

void run_backward(const Device& device, const Tensor& dy, Tensor& dx1, Tensor& dx2, const Tensor& beta) {
  const Batch batch(dy, beta);
  dispatch("shake_shake_bwd", dy.scalar_type(), [&]<class T>() {
    const auto* from = static_cast<const T*>(dy.const_data_ptr());
    auto *one = static_cast<T*>(dx1.mutable_data_ptr()), *two = static_cast<T*>(dx2.mutable_data_ptr());
    with_alignment<kLanes<T>>(batch.D, {from, one, two}, [&]<int Width>() {
      const Pieces pieces(device, batch.samples, batch.D, Width);
      device.launch(shake_backward<T, Width>, pieces.blocks, pieces.threads, 0, from, one, two,
                    static_cast<const Acc<T>*>(beta.const_data_ptr()), batch.samples, batch.D);
    });
  });
}

Tensor shake_shake_fwd(const Tensor& x1, const Tensor& x2, const Tensor& alpha) {
  check_floating("shake_shake_fwd", "x1", x1.scalar_type());
  check_weights("shake_shake_fwd", x1, alpha);
  STD_TORCH_CHECK(x2.scalar_type() == x1.scalar_type() && x2.sizes().equals(x1.sizes()) && together(x2, x1),
                  "shake_shake_fwd: x2 must have the shape, dtype and device of x1");
  auto y = fusedtricks::empty_like(x1);
  if (x1.numel() == 0) return y;
  const Device device(x1);
  if (dense_samples(x1, x2) && dense_samples(x1, y)) {
    run_forward(device, x1, x2, y, alpha);
    return y;
  }
  Tensor plain = empty(x1.sizes(), x1.scalar_type(), x1);
  run_forward(device, torch::stable::contiguous(x1), torch::stable::contiguous(x2), plain, alpha);
  torch::stable::copy_(y, plain);
  return y;
}

std::tuple<Tensor, Tensor> shake_shake_bwd(const Tensor& dy, const Tensor& beta) {
  check_floating("shake_shake_bwd", "dy", dy.scalar_type());
  check_weights("shake_shake_bwd", dy, beta);
  auto dx1 = fusedtricks::empty_like(dy), dx2 = fusedtricks::empty_like(dy);
  if (dy.numel() == 0) return {dx1, dx2};
  const Device device(dy);
  if (dense_samples(dy, dx1)) {
    run_backward(device, dy, dx1, dx2, beta);
    return {dx1, dx2};
  }
  Tensor one = empty(dy.sizes(), dy.scalar_type(), dy), two = empty(dy.sizes(), dy.scalar_type(), dy);
  run_backward(device, torch::stable::contiguous(dy), one, two, beta);
  torch::stable::copy_(dx1, one);
  torch::stable::copy_(dx2, two);
  return {dx1, dx2};
}

FT_KERNEL(shake_shake_fwd, "cuda", shake_shake_fwd);
FT_KERNEL(shake_shake_bwd, "cuda", shake_shake_bwd);

}  // namespace fusedtricks::cuda
