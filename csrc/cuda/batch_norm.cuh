// Batch normalization on CUDA devices: how a tensor lies in memory, how it is cut, and what forward and backward share.
//
// A dense tensor (N, C, *) is seen as lines of contiguous elements. Planes: a line is one channel's run, `runs` of them
// for each channel. Rows: a line is `copies` times the C channels of a pixel, so that it is a whole number of vectors
// and of bytes of the mask where that is possible. A thread works on bundles of 8 neighbours, a byte of the mask.
//
//   forward    first launch: statistics, the last block of a group of channels combines      1 ns
//              second launch, in the opposite order: x again, residual, y                    2 ns (3 ns and n / 8)
//   backward   the same; one launch where dx does not depend on sums over the batch          5 ns (6 ns and n / 4)
//   resident   planes of a channel that a block holds (batch_norm_resident.cuh), one launch
//              forward: x, residual, y                                                       2 ns (3 ns and n / 8)
//              backward: dy, x, dx, gradient of the residual                                 3 ns (4 ns and n / 8)
//
// In brackets: with a residual and the signs of z. Besides: a few numbers for each chunk and channel.
#pragma once

#include "math/batch_norm.h"
#include "row_norm.cuh"

namespace fusedtricks::cuda {

inline constexpr int kBundle = 8, kChannelThreads = 256, kStripBundles = 16;
// Bundles that a thread has in flight, and of a chunk: a shift from the first of them is a good one for all.
template <class T>
inline constexpr int kInFlight = sizeof(T) <= 2   ? 4
                                 : sizeof(T) == 4 ? 2
                                                  : 1;
inline constexpr int kBundlesInChunk = 16;

struct DeviceMath {
  template <class V>
  __device__ __forceinline__ static V exp(V v) {
    return ::exp(v);
  }
  template <class V>
  __device__ __forceinline__ static V erf(V v) {
    return ::erf(v);
  }
};

// ---- layout ---------------------------------------------------------------------------------------------------------

struct Lines {
  int64_t C, runs, length, total, bundles;  // bundles per line
  int64_t per, chunks, strips;              // bundles (planes) or rows in a chunk, chunks of a group of columns
  int copies, tx;                           // threads side by side in a strip of rows
  bool mask_in_rows;

  __device__ __forceinline__ int64_t columns(bool planes) const { return planes ? C : length; }
};

// Of a bundle: its first element, its byte of the mask, and how many of its elements there are.
struct Place {
  int64_t element, byte;
  int count;
};

// What a thread of a block works on, step by step.
template <bool Planes>
struct Walk {
  int64_t at, end, step, first;  // a bundle of the channel, or a row; the first of the chunk
  int64_t channel, column, chunk;

  __device__ __forceinline__ Walk(const Lines& s, int64_t block) {
    const int64_t groups = Planes ? s.C : s.strips;
    const int64_t group = Planes ? block / s.chunks : block % groups;
    chunk = Planes ? block % s.chunks : block / groups;
    first = chunk * s.per;
    const int64_t all = Planes ? s.runs * s.bundles : s.runs;
    end = first + s.per < all ? first + s.per : all;
    if constexpr (Planes) {
      channel = group, column = 0, at = first + threadIdx.x, step = blockDim.x;
    } else {
      channel = 0, column = (group * s.tx + threadIdx.x % s.tx) * kBundle;
      at = first + threadIdx.x / s.tx, step = blockDim.x / s.tx;
    }
  }

  // The first column of a thread, which of planes are the channels.
  __device__ __forceinline__ int64_t first_column() const { return Planes ? channel : column; }

  __device__ __forceinline__ Place place(const Lines& s, int64_t at) const {
    int64_t line = at, j = column;
    if constexpr (Planes) {
      const int64_t run = at / s.bundles;
      line = run * s.C + channel, j = (at - run * s.bundles) * kBundle;
    }
    const int64_t element = line * s.length + j;
    int64_t count = s.length - j;
    if (!Planes && count > s.total - element) count = s.total - element;
    if (at >= end || count < 0) count = 0;
    return {element, Planes ? line * s.bundles + j / kBundle : element / kBundle,
            static_cast<int>(count < kBundle ? count : kBundle)};
  }
};

// Up to 8 elements in accesses of Width, of which no access is split; 0 beyond `count`.
template <int Width, Cache cache, class T>
__device__ __forceinline__ void load_bundle(const T* from, int count, T (&to)[kBundle]) {
#pragma unroll
  for (int i = 0; i < kBundle; i += Width) {
    if (i < count) load<Width, cache>(from + i, to + i);
  }
}
template <int Width, class T, class A>
__device__ __forceinline__ void store_bundle(const A (&from)[kBundle], int count, T* to) {
  alignas(kVectorBytes) T values[kBundle];
#pragma unroll
  for (int i = 0; i < kBundle; ++i) values[i] = narrow<T>(from[i]);
#pragma unroll
  for (int i = 0; i < kBundle; i += Width) {
    if (i < count) store<Width, Cache::kStream>(values + i, to + i);
  }
}

template <class T>
struct alignas(kVectorBytes) Bundle {
  T at[kBundle];
};

// ---- sums over a block ----------------------------------------------------------------------------------------------

// Values per thread: of one channel, or of the columns of a bundle.
template <bool Planes>
inline constexpr int kColumns = Planes ? 1 : kBundle;

// N sums for each column, over all threads of the block that share it; every one of these gets them.
template <bool Planes, class A, int N>
__device__ __forceinline__ void join(A (&sums)[N][kColumns<Planes>], int tx, Group& group) {
  if constexpr (Planes) {
    Sums<A, N> all;
#pragma unroll
    for (int n = 0; n < N; ++n) all.at[n] = sums[n][0];
    all = group.sum(all);
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n][0] = all.at[n];
  } else {
    A* shared = dynamic_shared<A>() + threadIdx.x;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < kBundle; ++i) shared[i * blockDim.x] = sums[n][i];
      for (int half = blockDim.x / 2; half >= tx; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
#pragma unroll
          for (int i = 0; i < kBundle; ++i) shared[i * blockDim.x] += shared[i * blockDim.x + half];
        }
      }
      __syncthreads();
      const A* mine = dynamic_shared<A>() + threadIdx.x % tx;
#pragma unroll
      for (int i = 0; i < kBundle; ++i) sums[n][i] = mine[i * blockDim.x];
      __syncthreads();
    }
  }
}

// ---- parameters of channels -----------------------------------------------------------------------------------------

template <class T, class A = Acc<T>>
__device__ __forceinline__ A parameter_at(const Parameter& p, int64_t c, A otherwise) {
  if (!p.data) return otherwise;
  if (std::is_same_v<T, A> || p.wide) return __ldg(static_cast<const A*>(p.data) + c);
  return widen(static_cast<const T*>(p.data)[c]);
}

// One element of whatever dtype, in the accumulator of T.
template <class A>
__device__ __forceinline__ A load_as(ScalarType dtype, const void* from, int64_t at) {
  switch (dtype) {
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(from)[at]);
    case ScalarType::BFloat16:
      return static_cast<A>(widen(static_cast<const bf16*>(from)[at]));
    case ScalarType::Half:
      return static_cast<A>(widen(static_cast<const fp16*>(from)[at]));
    default:
      return static_cast<A>(static_cast<const float*>(from)[at]);
  }
}

// mean, rest, rstd, and scale and shift of ChannelForward, for the columns of a thread.
template <bool Planes, class A>
struct ChannelValues {
  static constexpr int K = kColumns<Planes>;
  A mean[K], scale[K], shift[K];

  template <class T>
  __device__ __forceinline__ void read(const Lines& s, const A* stats, const Parameter& weight, const Parameter& bias,
                                       int64_t column) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t c = Planes ? column : (column + i) % s.C;
      const A rest = stats[s.C + c], rstd = stats[2 * s.C + c];
      mean[i] = stats[c];
      scale[i] = rstd * parameter_at<T>(weight, c, A(1));
      shift[i] = parameter_at<T>(bias, c, A(0)) - rest * scale[i];
    }
  }
  __device__ __forceinline__ A preactivation(A x, int i) const {
    const int k = Planes ? 0 : i;
    return ChannelForward<A>{mean[k], scale[k], shift[k]}(x);
  }
};

// f(c) for the channels that a last block combines, with the threads of a channel's own where it has a block to itself:
// reduce(f over places q = first, first + step, ...) see the callers.
template <bool Planes, class W, int N, class Part>
__device__ __forceinline__ Sums<W, N> over_chunks(const Lines& s, int64_t c, Group& group, const Part& part) {
  Sums<W, N> sum{};
  if constexpr (Planes) {
    for (int64_t q = threadIdx.x; q < s.chunks; q += blockDim.x) sum = sum + part(q, c);
    return group.sum(sum);
  } else {
    for (int64_t q = 0; q < s.chunks; ++q) {
      for (int m = 0; m < s.copies; ++m) sum = sum + part(q, m * s.C + c);
    }
    return sum;
  }
}

// Elements of column j in chunk q.
template <bool Planes>
__device__ __forceinline__ int64_t elements(const Lines& s, int64_t q, int64_t j) {
  const int64_t begin = q * s.per;
  if constexpr (Planes) {
    auto before = [&](int64_t u) {
      const int64_t within = u % s.bundles * kBundle;
      return u / s.bundles * s.length + (within < s.length ? within : s.length);
    };
    const int64_t all = s.runs * s.bundles, end = begin + s.per;
    return before(end < all ? end : all) - before(begin);
  } else {
    const int64_t height = (s.total - j + s.length - 1) / s.length;  // rows that have this column
    const int64_t found = height - begin;
    return found < 0 ? 0 : found < s.per ? found : s.per;
  }
}

// The channels of the group that `walk` belongs to, and the blocks that measure it.
template <bool Planes>
__device__ __forceinline__ bool last_of_group(const Lines& s, const Walk<Planes>& walk, unsigned* counters,
                                              int64_t& begin, int64_t& end) {
  if constexpr (Planes) {
    begin = walk.channel, end = begin + 1;
    return arrives_last(counters + walk.channel, static_cast<unsigned>(s.chunks));
  } else {
    const int64_t strip = blockIdx.x % s.strips;
    const bool apart = s.copies == 1;
    begin = apart ? strip * s.tx * kBundle : 0;
    end = apart ? begin + s.tx * kBundle : s.C;
    if (end > s.C) end = s.C;
    return arrives_last(counters + (apart ? strip : 0), static_cast<unsigned>(apart ? s.chunks : s.chunks * s.strips));
  }
}

// f(c) by every thread for one channel of planes, by a thread each for rows.
template <bool Planes, class F>
__device__ __forceinline__ void each_channel(int64_t begin, int64_t end, const F& f) {
  for (int64_t c = begin + (Planes ? 0 : threadIdx.x); c < end; c += Planes ? 1 : blockDim.x) f(c);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// (outer, channels, inner) of a dense tensor; a single channel has nothing outside.
struct Channels {
  int64_t outer = 1, channels = 1, inner = 1;

  explicit Channels(const Tensor& y) : channels(y.size(1)) {
    for (int64_t d = 0; d < y.dim(); ++d) {
      if (d == 1 || y.size(d) == 1) continue;
      (channels > 1 && y.stride(d) > y.stride(1) ? outer : inner) *= y.size(d);
    }
  }
  int64_t total() const { return outer * channels * inner; }
  bool planes() const { return inner > 1; }
  // As _batch_norm.mask_rows: bits run through the whole tensor where channels are innermost or planes are short.
  // Kernels of planes know bytes of one plane alone, so bits of short planes are moved for them.
  bool bits_flat() const { return inner < 16; }
  bool bits_moved() const { return planes() && bits_flat(); }
  int64_t mask_rows() const { return bits_flat() ? 1 : outer * channels; }
  int64_t mask_columns() const { return ((bits_flat() ? total() : inner) + 7) / 8; }
  int64_t plane_bytes() const { return (inner + 7) / 8; }
};

// Bits of short planes between bytes of their own and a run through the whole tensor; a thread writes a byte.
template <class T, int Width, bool Flat>
__global__ void move_bits(const unsigned char* from, unsigned char* to, int64_t total, int64_t inner) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, plane_bytes = (inner + 7) / 8;
  if (i >= (Flat ? (total + 7) / 8 : total / inner * plane_bytes)) return;
  unsigned byte = 0;
  for (int b = 0; b < 8; ++b) {
    const int64_t flat = Flat ? 8 * i + b : i / plane_bytes * inner + i % plane_bytes * 8 + b;
    const int64_t column = Flat ? flat % inner : i % plane_bytes * 8 + b;
    if (flat >= total || column >= inner) continue;
    const int64_t at = Flat ? flat / inner * plane_bytes * 8 + column : flat;
    byte |= (from[at / 8] >> (at % 8) & 1u) << b;
  }
  to[i] = static_cast<unsigned char>(byte);
}

// Flat: the mask that is returned, from one of planes; else the other way.
template <bool Flat>
Tensor moved_bits(const Channels& shape, const Tensor& from, const Device& device) {
  const int64_t bytes = Flat ? shape.mask_columns() : shape.outer * shape.channels * shape.plane_bytes();
  const Tensor to =
      empty({Flat ? 1 : shape.outer * shape.channels, Flat ? bytes : shape.plane_bytes()}, ScalarType::Byte, from);
  const int threads = std::min(device.threads_per_block(), 256);
  device.launch(move_bits<float, 1, Flat>, ceil_div(bytes, threads), threads, 0,
                static_cast<const unsigned char*>(from.const_data_ptr()),
                static_cast<unsigned char*>(to.mutable_data_ptr()), shape.total(), shape.inner);
  return to;
}

// `t` with the strides of `like`, copied only if need be.
inline Tensor dense(const Tensor& t, const Tensor& like) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) same = same && (t.size(d) == 1 || t.stride(d) == like.stride(d));
  if (same) return t;
  Tensor copy = fusedtricks::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Lines cut(const Channels& x, bool masked, const Device& device, int threads) {
  Lines s{};
  s.C = x.channels, s.total = x.total(), s.copies = 1, s.tx = 1;
  if (x.planes()) {
    s.runs = x.outer, s.length = x.inner, s.bundles = ceil_div(s.length, kBundle), s.strips = 1;
    const int64_t all = s.runs * s.bundles;
    const int64_t fill = ceil_div(all * s.C, 8 * int64_t{device.processors()});
    s.per = std::clamp<int64_t>(ceil_div(fill, threads), 1, kBundlesInChunk) * threads;
    s.chunks = ceil_div(all, s.per);
    return s;
  }
  // Lines of whole vectors where that comes out even; of whole bytes in any case where there is a mask.
  while (s.C * s.copies % kBundle && x.outer % (2 * s.copies) == 0) s.copies *= 2;
  if (masked) {
    while (s.C * s.copies % kBundle) s.copies *= 2;
  }
  s.length = s.C * s.copies, s.runs = ceil_div(x.outer, s.copies), s.bundles = ceil_div(s.length, kBundle);
  while (s.tx < s.bundles && s.tx < kStripBundles && s.tx < threads) s.tx *= 2;
  s.strips = ceil_div(s.bundles, s.tx);
  const int64_t at_once = threads / s.tx;
  const int64_t fill = ceil_div(s.runs * s.strips, 8 * int64_t{device.processors()});
  s.per = std::clamp<int64_t>(ceil_div(fill, at_once), 1, 2 * kBundlesInChunk) * at_once;
  s.chunks = ceil_div(s.runs, s.per);
  return s;
}

// Elements an access can span in every line of `tensors`.
template <class T>
int width_of(const Lines& s, std::initializer_list<const void*> tensors) {
  uint64_t together = static_cast<uint64_t>(s.length) * sizeof(T);
  if (s.total % s.length) together |= static_cast<uint64_t>(s.total) * sizeof(T);
  for (const void* tensor : tensors) together |= reinterpret_cast<uintptr_t>(tensor);
  int width = kLanes<T>;
  while (together % (width * sizeof(T))) width /= 2;
  return width;
}

inline void check_batch(const char* op, const Tensor& x, int64_t activation) {
  check_floating(op, "input", x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 2, op, ": expected input of at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGelu, op, ": no activation has the code ", activation);
}
inline void check_like(const char* op, const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return;
  bool same = t->dim() == x.dim() && t->scalar_type() == x.scalar_type() && together(*t, x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t->size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape, dtype and device of the input");
}
inline void check_channels(const char* op, const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return;
  check_floating(op, name, t->scalar_type());
  STD_TORCH_CHECK(t->numel() == x.size(1) && together(*t, x), op, ": ", name,
                  " must have one element per channel and the device of the input");
}

}  // namespace fusedtricks::cuda
