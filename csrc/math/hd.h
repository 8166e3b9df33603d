// FT_HD marks a function that runs on host and device: the formulas in this folder are compiled by g++ and by nvcc.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
