// Reductions over the threads that share a row, and over the blocks of a launch.
#pragma once

#include "vector.cuh"

namespace fusedtricks::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---- threads --------------------------------------------------------------------------------------------------------

// A value of any trivially copyable type made of 32-bit words, from the lane whose number differs in bit `mask`.
template <class S>
__device__ __forceinline__ S shuffle_xor(S value, int mask) {
  constexpr int kWords = sizeof(S) / sizeof(unsigned);
  static_assert(sizeof(S) % sizeof(unsigned) == 0);
  union {
    S value;
    unsigned words[kWords];
  } u{value};
#pragma unroll
  for (int i = 0; i < kWords; ++i) u.words[i] = __shfl_xor_sync(kAllLanes, u.words[i], mask);
  return u.value;
}

template <class A, int N>
struct Sums {
  A at[N];

  __device__ __forceinline__ Sums operator+(const Sums& other) const {
    Sums s;
#pragma unroll
    for (int i = 0; i < N; ++i) s.at[i] = at[i] + other.at[i];
    return s;
  }
};

// `size` neighbouring threads: a power of two up to a warp, or else the whole block.
struct Group {
  int size, rank;
  bool odd = false;  // which half of the exchange space the next reduction uses

  __device__ __forceinline__ explicit Group(int threads)
      : size(threads), rank(threads <= kWarp ? threadIdx.x % threads : threadIdx.x) {}

  // What the group wrote to shared memory is visible to all of it. All threads of the block call this together.
  __device__ __forceinline__ void meet() const { size <= kWarp ? __syncwarp() : __syncthreads(); }

  // combine(a, b) is commutative and S{} is its neutral element; every thread of the group gets the same bits. The
  // tree is fixed by `size`. All threads of the block call this together.
  template <class S, class Combine>
  __device__ __forceinline__ S reduce(S value, const Combine& combine) {
    for (int mask = min(size, kWarp) / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    if (size <= kWarp) return value;
    // Two halves in turn: whoever writes one again has passed the barrier behind which all others have read it.
    __shared__ __align__(16) unsigned char exchange[2][kWarp * sizeof(S)];
    S* partial = reinterpret_cast<S*>(exchange[odd]);
    odd = !odd;
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = threadIdx.x % kWarp < size / kWarp ? partial[threadIdx.x % kWarp] : S{};
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    return value;
  }

  template <class A, int N>
  __device__ __forceinline__ Sums<A, N> sum(const Sums<A, N>& value) {
    return reduce(value, [](const auto& a, const auto& b) { return a + b; });
  }
};

// ---- blocks ---------------------------------------------------------------------------------------------------------

// True, in every thread, in the block that is the last of `expected` to arrive at a counter that started at zero. What
// the others wrote to global memory before they arrived is then visible to loads with Cache::kShared.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == expected - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The blocks of a launch join in groups of kFan: the last block of a group to arrive folds what its group left, and
// stands for it in the next round. Which block that is does not matter to the result. Nobody waits, so blocks need not
// be resident together, as a grid barrier or a cooperative launch would ask (and a backward overlapping communication
// could not give); and no round is longer than kFan, as it would be if the last block of all did the work alone.
//
// fold(first, step, members, root): combine the places first, first + step, ... into the first, or, at the root, into
// the result.
inline constexpr int kFan = 8;

inline int64_t fan_counters(int64_t blocks) {
  int64_t total = 0;
  for (; blocks > 1 || total == 0; total += blocks) blocks = ceil_div(blocks, kFan);
  return total;
}

template <class Fold>
__device__ __forceinline__ void join_blocks(unsigned* counters, int blocks, int block, const Fold& fold) {
  for (int step = 1;; step *= kFan) {
    const int group = block / kFan, members = min(kFan, blocks - group * kFan);
    if (!arrives_last(counters + group, members)) return;
    const bool root = blocks <= kFan;
    fold(group * kFan * step, step, members, root);
    if (root) return;
    blocks = (blocks + kFan - 1) / kFan;
    counters += blocks;
    block = group;
  }
}

}  // namespace fusedtricks::cuda
