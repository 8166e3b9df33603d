// Element types and 16-byte vectors of them: conversion, and access as wide as the alignment allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.cuh"

namespace fusedtricks::cuda {

// ---- elements -------------------------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(fp16 v) { return __half2float(v); }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

template <class T, class A>
__device__ __forceinline__ T narrow(A v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __float2half_rn(static_cast<float>(v));
  } else {
    return static_cast<T>(v);
  }
}

// f.operator()<T>() with the element type of a floating dtype.
template <class F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<fp16>();
    default:
      check_floating(op, "input", dtype);
  }
}

template <class T>
inline constexpr ScalarType scalar_type = std::is_same_v<T, double>  ? ScalarType::Double
                                          : std::is_same_v<T, float> ? ScalarType::Float
                                          : std::is_same_v<T, bf16>  ? ScalarType::BFloat16
                                                                     : ScalarType::Half;

// Where the type is only known at run time: one element.
__device__ __forceinline__ void store_as(ScalarType dtype, void* to, int64_t at, auto value) {
  switch (dtype) {
    case ScalarType::Double:
      static_cast<double*>(to)[at] = narrow<double>(value);
      break;
    case ScalarType::BFloat16:
      static_cast<bf16*>(to)[at] = narrow<bf16>(value);
      break;
    case ScalarType::Half:
      static_cast<fp16*>(to)[at] = narrow<fp16>(value);
      break;
    default:
      static_cast<float*>(to)[at] = narrow<float>(value);
  }
}

// ---- vectors --------------------------------------------------------------------------------------------------------

inline constexpr int kVectorBytes = 16;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kVectorBytes) Vector {
  T at[kLanes<T>];
};

__device__ __forceinline__ void narrow(const float (&from)[8], Vector<bf16>& to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<__nv_bfloat162*>(to.at)[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  }
}
__device__ __forceinline__ void narrow(const float (&from)[8], Vector<fp16>& to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<__half2*>(to.at)[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
  }
}
template <class T>
__device__ __forceinline__ void narrow(const T (&from)[kLanes<T>], Vector<T>& to) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) to.at[i] = from[i];
}

// ---- access ---------------------------------------------------------------------------------------------------------

// kStream: used once, leaves the caches first. kKeep: read-only and read by every block. kShared: written by other
// blocks of this launch, so not to be read from this multiprocessor's own cache.
enum class Cache { kStream, kKeep, kShared };

template <int Bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <Cache cache, class U>
__device__ __forceinline__ U load_word(const U* from) {
  if constexpr (cache == Cache::kStream) return __ldcs(from);
  if constexpr (cache == Cache::kKeep) return __ldg(from);
  if constexpr (cache == Cache::kShared) return __ldcg(from);
}

// `Width` consecutive elements from an address aligned to all of them, or to 16 bytes.
template <int Width, Cache cache, class T>
__device__ __forceinline__ void load(const T* from, T* to) {
  constexpr int kBytes = Width * static_cast<int>(sizeof(T)), kWord = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using U = typename WordOf<kWord>::type;
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) {
    reinterpret_cast<U*>(to)[i] = load_word<cache>(reinterpret_cast<const U*>(from) + i);
  }
}

template <int Width, Cache cache, class T>
__device__ __forceinline__ void store(const T* from, T* to) {
  constexpr int kBytes = Width * static_cast<int>(sizeof(T)), kWord = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using U = typename WordOf<kWord>::type;
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) {
    const U word = reinterpret_cast<const U*>(from)[i];
    if constexpr (cache == Cache::kStream) {
      __stcs(reinterpret_cast<U*>(to) + i, word);
    } else {
      reinterpret_cast<U*>(to)[i] = word;
    }
  }
}

// f.operator()<Width>() for accesses of up to `width` elements: whole vectors; of 16-bit elements half a vector, which
// is what planes of 14 x 14 allow; else one by one, which costs instructions but, coalesced, no bandwidth.
template <class T, class F>
void with_width(int width, const F& f) {
  if (width == kLanes<T>) return f.template operator()<kLanes<T>>();
  if constexpr (sizeof(T) == 2) {
    if (width >= kLanes<T> / 2) return f.template operator()<kLanes<T> / 2>();
  }
  f.template operator()<1>();
}

// How the columns of a row are dealt to `lanes` threads. An access is `Width` elements wide, where Width divides the
// alignment of every row of every tensor as well as the number of columns: an access is then inside the row or outside,
// and none is ever split. kLanes / Width accesses fill vector k of a thread, each coalesced over the threads, so odd
// alignment costs instructions but not bandwidth.
template <int Width>
struct Columns {
  int count, lanes, lane;

  template <class T>
  __device__ __forceinline__ int column(int k, int piece) const {
    return ((k * (kLanes<T> / Width) + piece) * lanes + lane) * Width;
  }

  // f(i) for the elements of vector k that exist.
  template <class T, class F>
  __device__ __forceinline__ void each(int k, const F& f) const {
#pragma unroll
    for (int p = 0; p < kLanes<T> / Width; ++p) {
      if (column<T>(k, p) < count) {
#pragma unroll
        for (int i = 0; i < Width; ++i) f(p * Width + i);
      }
    }
  }

  // The columns of vector k of T, from a row of any type P; `to` keeps its value outside the row.
  template <class T, Cache cache, class P>
  __device__ __forceinline__ void load(const P* row, int k, P (&to)[kLanes<T>]) const {
#pragma unroll
    for (int p = 0; p < kLanes<T> / Width; ++p) {
      const int j = column<T>(k, p);
      if (j < count) cuda::load<Width, cache>(row + j, to + p * Width);
    }
  }

  template <class T, Cache cache, class P>
  __device__ __forceinline__ void store(const P (&from)[kLanes<T>], int k, P* row) const {
#pragma unroll
    for (int p = 0; p < kLanes<T> / Width; ++p) {
      const int j = column<T>(k, p);
      if (j < count) cuda::store<Width, cache>(from + p * Width, row + j);
    }
  }
};

}  // namespace fusedtricks::cuda
