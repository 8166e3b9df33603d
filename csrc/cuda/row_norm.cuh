// Layer and RMS normalization over rows: what forward and backward share. Everything of layer_norm.cu and rms_norm.cu
// but the signatures is here and in the two files named after them. Center is true for layer normalization.
//
// R rows of C columns, s bytes an element. A row is cut into 16-byte vectors, and its length decides who holds it:
//
//   forward    <= 64 KB   registers, 4 vectors a thread: 1 to 32 lanes of a warp, or a block, a row    2 R C s bytes
//              <= shared  shared memory, a block a row                                                 2 R C s
//              wider      strips: statistics, then normalization; x again, from L2 while it fits       2 or 3 R C s
//   backward   <= 16 KB   registers, 2 vectors a thread; sums over rows in registers                   3 R C s
//              <= 32 KB   registers, 8 vectors a thread; sums over rows in shared memory               3 R C s
//              wider      strips: projections, then gradients; dy and x again, from L2 while they fit  3 or 5 R C s
//
// Rows that are not aligned to 16 bytes take more registers, hence fewer threads: 32 KB and 8 to 16 KB in registers.
// Besides: 4 to 12 bytes of statistics a row and, in the backward, a row of sums per block.
#pragma once

#include "math/norm.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace fusedtricks::cuda {

// ---- arguments ------------------------------------------------------------------------------------------------------

// C values of T, or of Acc<T> where `wide`.
struct Parameter {
  const void* data;
  bool wide;
};

// Where a statistic of row r is: stats + number * R + r, r counted in logical order.
template <bool Center, class A>
__device__ __forceinline__ Normalize<A> load_stats(const A* stats, int64_t R, int64_t r) {
  if constexpr (Center) return {__ldg(stats + r), __ldg(stats + R + r), __ldg(stats + 2 * R + r)};
  return {A(0), A(0), __ldg(stats + r)};
}

template <bool Center, class A>
__device__ __forceinline__ void store_stats(A* stats, int64_t R, int64_t r, const Normalize<A>& n) {
  if constexpr (Center) {
    stats[r] = n.mean;
    stats[R + r] = n.rest;
    stats[2 * R + r] = n.rstd;
  } else {
    stats[r] = n.rstd;
  }
}

// Vector k of a parameter; ones or zeros (`otherwise`) where there is none.
template <class T, int Width, class A = Acc<T>>
__device__ __forceinline__ void load_parameter(const Parameter& p, int64_t first, const Columns<Width>& columns, int k,
                                               A otherwise, A (&to)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) to[i] = otherwise;
  if (!p.data) return;
  if (std::is_same_v<T, A> || p.wide) {
    alignas(kVectorBytes) A values[kLanes<T>] = {};
    columns.template load<T, Cache::kKeep>(static_cast<const A*>(p.data) + first, k, values);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) to[i] = values[i];
  } else {
    Vector<T> values{};
    columns.template load<T, Cache::kKeep>(static_cast<const T*>(p.data) + first, k, values.at);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) to[i] = widen(values.at[i]);
  }
}

// 16-byte vectors of a row that a thread holds, and the most threads of a block, which leave it the registers for that.
// Narrow accesses need many: up to eight for a vector.
inline constexpr int kForwardVectors = 4, kBackwardVectors = 2;
template <class T, int Width>
inline constexpr int kForwardThreads = Width == kLanes<T> ? 1024 : 512;
template <class T, int Width>
inline constexpr int kBackwardThreads = Width == kLanes<T> || sizeof(T) > 2 ? 512 : 256;
// The same with the sums over rows in shared memory. Where that does not fit either, rows go in strips.
inline constexpr int kBackwardVectorsInShared = 8, kBackwardThreadsInShared = 256, kStripThreads = 256;
template <class T, int Width>
inline constexpr bool kSumsFitInShared = Width == kLanes<T> && sizeof(T) < 8;

// ---- the part of a row that a thread holds --------------------------------------------------------------------------

template <class T, int N>
struct InRegisters {
  Vector<T> v[N];

  template <Cache cache, int Width>
  __device__ __forceinline__ void load(const T* row, const Columns<Width>& columns) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v[k] = {};
      columns.template load<T, cache>(row, k, v[k].at);
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int k = 0; k < N; ++k) f(k, v[k]);
  }
};

template <class T>
struct InShared {
  Vector<T>* v;
  int vectors, lanes, lane;

  template <Cache cache, int Width>
  __device__ __forceinline__ void load(const T* row, const Columns<Width>& columns) const {
    constexpr int kInFlight = 4;
    for (int k = 0; k < vectors; k += kInFlight) {
      Vector<T> batch[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) columns.template load<T, cache>(row, k + i, batch[i].at);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (k + i < vectors) v[(k + i) * lanes + lane] = batch[i];
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int k = 0; k < vectors; ++k) f(k, v[k * lanes + lane]);
  }
};

// The strip of a row that a block works on.
template <class T>
struct Strip {
  int64_t r, s, first;
  int count;

  __device__ __forceinline__ Strip(int64_t block, int64_t strips, int64_t C, int vectors)
      : r(block / strips), s(block % strips) {
    const int64_t size = static_cast<int64_t>(blockDim.x) * vectors * kLanes<T>;
    first = s * size;
    count = static_cast<int>(size < C - first ? size : C - first);
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

// A parameter the kernels can read: of T or Acc<T>, unit stride, aligned. Others are copied, which costs C elements.
template <class T>
struct KernelParameter : Parameter {
  Tensor owner;

  explicit KernelParameter(const MaybeTensor& parameter) : Parameter{nullptr, false} {
    if (!parameter) return;
    owner = torch::stable::contiguous(*parameter);
    constexpr auto own = scalar_type<T>, wide_type = scalar_type<Acc<T>>;
    if (owner.scalar_type() != own && owner.scalar_type() != wide_type) owner = torch::stable::to(owner, wide_type);
    if (reinterpret_cast<uintptr_t>(owner.const_data_ptr()) % kVectorBytes) owner = torch::stable::clone(owner);
    data = owner.const_data_ptr();
    wide = owner.scalar_type() == wide_type;
  }
};

// Elements of T an access can span in every row of `tensors`.
template <class T, int K>
int access_width(int64_t C, const RowMap<K>& rows, std::initializer_list<const void*> tensors) {
  uint64_t together = static_cast<uint64_t>(C) * sizeof(T);
  for (const void* tensor : tensors) together |= reinterpret_cast<uintptr_t>(tensor);
  for (size_t k = 0; k < tensors.size(); ++k) {
    together |= static_cast<uint64_t>(rows.inner_stride[k] | rows.outer_stride[k]) * sizeof(T);
  }
  int width = kLanes<T>;
  while (together % (width * sizeof(T))) width /= 2;
  return width;
}

// Threads for a row of C elements in N vectors each: a power of two up to a warp, then whole warps. A row of two
// vectors takes two lanes at least, so that an access of the warp fills 32-byte sectors.
template <class T>
int64_t lanes_for(int64_t C, int N) {
  const int64_t vectors = ceil_div(C, kLanes<T>),
                needed = std::max(ceil_div(vectors, N), std::min<int64_t>(vectors, 2));
  if (needed > kWarp) return ceil_div(needed, kWarp) * kWarp;
  int64_t lanes = 1;
  while (lanes < needed) lanes *= 2;
  return lanes;
}

// A row on more than a warp has a block of its own; narrower ones share `threads`.
inline int block_for(int lanes, int threads) { return lanes > kWarp ? lanes : std::max(lanes, threads); }

}  // namespace fusedtricks::cuda
