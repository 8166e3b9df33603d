// FT_HD marks a function that runs on host and device: the formulas in this folder are compiled by g++ and by nvcc.
#pragma once

#include <limits>

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

}  // namespace fusedtricks
