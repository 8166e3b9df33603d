// FT_HD marks a function that runs on host and device: the formulas in this folder are compiled by g++ and by nvcc.
#pragma once

#include <limits>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif

namespace fusedtricks {

// Variables, because nvcc takes the functions for those of the host.
template <class A>
inline constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
inline constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// v s, rounded: no sum or difference that it becomes part of takes it in unrounded (contraction to fma). A product less
// itself is then 0, wherever either of them was rounded before. V: A, or a register of it.
template <class V, class A>
FT_HD V rounded_product(V v, A s) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  if constexpr (std::is_same_v<V, float>)
    return __fmul_rn(v, s);
  else
    return __dmul_rn(v, s);
#elif defined(__clang__) || defined(__CUDACC__)
  return v * s;  // clang contracts within an expression alone; nvcc's host code calls no formula
#elif __GNUC__ >= 12
  return __builtin_assoc_barrier(v * s);
#else
  V product = v * s;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
#endif
}

}  // namespace fusedtricks
