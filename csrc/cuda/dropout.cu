// dropout_fwd and dropout_fwd_ on CUDA devices. Bytes that must move, for n elements of s bytes: 2ns.
#include "math/dropout.h"
#include "math/philox.h"
#include "vector.cuh"

namespace fusedtricks::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kOfBlock = 8;      // elements that share a random block
inline constexpr int kVectorRows = 16;  // rows of channels that share the bits of a thread

// `Count` consecutive elements, `Width` an access.
template <class T, int Width, int Count>
__device__ __forceinline__ void load_all(const T* from, T (&to)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i += Width) load<Width, Cache::kStream>(from + i, to + i);
}

template <class T, int Width, int Count>
__device__ __forceinline__ void store_all(const T (&from)[Count], T* to) {
#pragma unroll
  for (int i = 0; i < Count; i += Width) store<Width, Cache::kStream>(from + i, to + i);
}

template <class T, class A = Acc<T>>
__device__ __forceinline__ T drop(T x, uint32_t bits, uint32_t keep, A scale) {
  return narrow<T>(dropped(widen(x), bits, keep, scale));
}

// Elements in counting order, a random block a thread.
template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads)
    drop_elements(const T* x, T* y, const int64_t* seed, int64_t n, uint32_t keep, A scale) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, first = block * kOfBlock;
  if (first >= n) return;
  const bool whole = first + kOfBlock <= n;
  alignas(kVectorBytes) T value[kOfBlock];
  if (whole) load_all<T, Width>(x + first, value);
  const RandomBlock random(static_cast<uint64_t>(__ldg(seed)), static_cast<uint64_t>(block));
  if (whole) {
#pragma unroll
    for (int i = 0; i < kOfBlock; ++i) value[i] = drop(value[i], random.half(i), keep, scale);
    return store_all<T, Width>(value, y + first);
  }
#pragma unroll
  for (int i = 0; i < kOfBlock; ++i) {
    if (first + i < n) y[first + i] = drop(x[first + i], random.half(i), keep, scale);
  }
}

// (channels, inner), a channel a row, which `chunks` blocks share.
template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads)
    drop_channels(const T* x, T* y, const int64_t* seed, int64_t inner, int64_t chunks, uint32_t keep, A scale) {
  const int64_t row = blockIdx.x / chunks;
  const int64_t column = ((blockIdx.x % chunks) * blockDim.x + threadIdx.x) * Width;
  if (column >= inner) return;
  alignas(kVectorBytes) T value[Width];
  load_all<T, Width>(x + row * inner + column, value);
  const uint32_t bits = random16(static_cast<uint64_t>(__ldg(seed)), static_cast<uint64_t>(row));
#pragma unroll
  for (int i = 0; i < Width; ++i) value[i] = drop(value[i], bits, keep, scale);
  store_all<T, Width>(value, y + row * inner + column);
}

// (batch, group, channels): a thread has `Width` channels and draws once for kVectorRows rows of them.
template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads)
    drop_channels_last(const T* x, T* y, const int64_t* seed, int64_t batches, int64_t group, int64_t channels,
                       uint32_t keep, A scale) {
  const int64_t vectors = channels / Width, tiles = (group + kVectorRows - 1) / kVectorRows;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t column = item % vectors * Width, tile = item / vectors % tiles, batch = item / vectors / tiles;
  if (batch >= batches) return;
  uint32_t bits[Width];
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    bits[i] = random16(static_cast<uint64_t>(__ldg(seed)), static_cast<uint64_t>(batch * channels + column + i));
  }
  for (int64_t r = tile * kVectorRows; r < group && r < (tile + 1) * kVectorRows; ++r) {
    const int64_t at = (batch * group + r) * channels + column;
    alignas(kVectorBytes) T value[Width];
    load_all<T, Width>(x + at, value);
#pragma unroll
    for (int i = 0; i < Width; ++i) value[i] = drop(value[i], bits[i], keep, scale);
    store_all<T, Width>(value, y + at);
  }
}

// Dense (N, C, ...) with the channels innermost, and a group a channel.
bool channels_last(const Tensor& x, int64_t group) {
  if (x.dim() < 3 || x.size(0) * x.size(1) * group != x.numel()) return false;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d > 1; expected *= x.size(d--)) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
  }
  return (x.size(1) == 1 || x.stride(1) == 1) && (x.size(0) == 1 || x.stride(0) == expected);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void run(const char* op, const Device& device, const Tensor& x, const Tensor& y, const Tensor& seed, int64_t keep,
         int64_t group, bool last) {
  const int64_t n = x.numel();
  const int threads = std::min(device.threads_per_block(), kThreads);
  const auto* key = static_cast<const int64_t*>(seed.const_data_ptr());
  dispatch(op, x.scalar_type(), [&]<class T>() {
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto scale = dropout_scale<Acc<T>>(keep);
    const auto kept = static_cast<uint32_t>(keep);
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % kVectorBytes == 0;
    const int64_t row = last ? x.size(1) : group == 1 ? 0 : group;
    with_width<T>(aligned && row % kLanes<T> == 0 ? kLanes<T> : 1, [&]<int Width>() {
      if constexpr (Width == 1 || Width == kLanes<T>) {
        if (last) {
          const int64_t batches = n / (row * group);
          const int64_t items = batches * ceil_div(group, kVectorRows) * (row / Width);
          device.launch(drop_channels_last<T, Width>, ceil_div(items, threads), threads, 0, from, to, key, batches,
                        group, row, kept, scale);
        } else if (group == 1) {
          device.launch(drop_elements<T, Width>, ceil_div(n, threads * kOfBlock), threads, 0, from, to, key, n, kept,
                        scale);
        } else {
          const int64_t chunks = ceil_div(group, threads * Width);
          device.launch(drop_channels<T, Width>, n / group * chunks, threads, 0, from, to, key, group, chunks, kept,
                        scale);
        }
      }
    });
  });
}

// y = dropout(x); they may be the same tensor.
void drop(const char* op, const Tensor& x, Tensor& y, const Tensor& seed, int64_t keep, int64_t group) {
  check_dropout(op, x, seed, keep, group);
  if (x.numel() == 0) return;
  const Device device(x);
  if (x.is_contiguous() && y.is_contiguous()) return run(op, device, x, y, seed, keep, group, false);
  if (channels_last(x, group) && same_strides(x, y)) return run(op, device, x, y, seed, keep, group, true);
  Tensor plain = empty(x.sizes(), x.scalar_type(), x);
  torch::stable::copy_(plain, x);
  run(op, device, plain, plain, seed, keep, group, false);
  torch::stable::copy_(y, plain);
}

Tensor dropout_fwd(const Tensor& x, const Tensor& seed, int64_t keep, int64_t group) {
  auto y = fusedtricks::empty_like(x);
  drop("dropout_fwd", x, y, seed, keep, group);
  return y;
}

void dropout_fwd_(Tensor x, const Tensor& seed, int64_t keep, int64_t group) {
  drop("dropout_fwd_", x, x, seed, keep, group);
}

FT_KERNEL(dropout_fwd, "cuda", dropout_fwd);
FT_KERNEL(dropout_fwd_, "cuda", dropout_fwd_);

}  // namespace fusedtricks::cuda
