#pragma once

#include <bit>

#include "cuda_runtime.h"

// Visible, as are the kernels that are templates over it.
struct __attribute__((visibility("default"))) __half {
  unsigned short bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
inline __half __float2half_rn(float v) { return {std::bit_cast<unsigned short>(static_cast<_Float16>(v))}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
