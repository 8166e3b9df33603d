// What mixup, cutmix and shake_shake share on CUDA devices: batches of dense samples, and how a sample is cut up.
#pragma once

#include "math/mixup.h"
#include "vector.cuh"

namespace fusedtricks::cuda {

inline constexpr int kPieceThreads = 256;
inline constexpr int kInFlight = 4;  // vectors that a thread asks for before it uses the first

// Of a sample of D elements, what a thread works on: kInFlight vectors of Width elements, as far apart as the block is
// wide. Blocks take the same columns of all samples one after the other.
template <int Width>
struct Piece {
  int64_t sample, first, D;

  __device__ __forceinline__ Piece(int64_t samples, int64_t D)
      : sample(blockIdx.x % samples),
        first(blockIdx.x / samples * blockDim.x * (kInFlight * Width) + threadIdx.x * Width),
        D(D) {}

  // f(k, column) for the vectors that exist.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t column = first + static_cast<int64_t>(k) * blockDim.x * Width;
      if (column < D) f(k, column);
    }
  }
};

// `Count` values of the arithmetic, rounded to T.
template <int Count, class T, class A>
__device__ __forceinline__ void round_to(const A (&from)[Count], T (&to)[Count]) {
  if constexpr (Count % kLanes<T> == 0) {
#pragma unroll
    for (int i = 0; i < Count; i += kLanes<T>) {
      narrow(reinterpret_cast<const A(&)[kLanes<T>]>(from[i]), reinterpret_cast<Vector<T>&>(to[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) to[i] = narrow<T>(from[i]);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

struct Pieces {
  int threads;
  int64_t blocks;

  Pieces(const Device& device, int64_t samples, int64_t D, int width) {
    const int64_t of_warp = int64_t{32} * kInFlight * width, most = std::min(device.threads_per_block(), kPieceThreads);
    threads = static_cast<int>(std::min<int64_t>(ceil_div(D, of_warp) * 32, most));
    blocks = samples * ceil_div(D, int64_t{threads} * kInFlight * width);
  }
};

// Are both batches one dense sample after the other, with the elements of a sample in the same order?
inline bool dense_samples(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto all = collapse_rows<2>(a.dim(), a.sizes().data(), {a.strides().data(), b.strides().data()});
  const bool dense = all.levels == 0 || (all.levels == 1 && all.stride[0][0] == 1 && all.stride[1][0] == 1);
  return dense && (a.size(0) == 1 || a.stride(0) == a.numel() / a.size(0));
}

// f.operator()<Width>() with Width a whole vector where samples of D elements at these places are aligned to one, else
// a single element: odd alignment costs instructions, not bandwidth.
template <int Most, class F>
void with_alignment(int64_t D, std::initializer_list<const void*> places, const F& f) {
  bool aligned = D % Most == 0;
  for (const void* place : places) aligned = aligned && reinterpret_cast<uintptr_t>(place) % kVectorBytes == 0;
  if (aligned) return f.template operator()<Most>();
  f.template operator()<1>();
}

}  // namespace fusedtricks::cuda
