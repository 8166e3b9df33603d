// CUDA's execution model on the CPU, for tests: the part of it that csrc/cuda uses, for g++. A CUDA thread is a fiber
// that runs until it meets a barrier or a warp exchange. runtime.cpp schedules them.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

// ---- language -------------------------------------------------------------------------------------------------------

// Visible, so that a launch can tell the kernel's name.
#define __global__ __attribute__((visibility("default")))
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One operating-system thread runs all threads of a block, and one block at a time.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace cuda_on_host {

struct Site {
  const char* file;
  int line;
};

// Bytes that went through the functions for global memory, which is how kernels move whole tensors.
inline int64_t loaded = 0, stored = 0;

// Ends the launch with an error, from inside a kernel.
[[noreturn]] void fail(const char* what, const void* address, Site site);
void block_barrier(Site site);
// Every lane of `mask` shows 8 bytes; the result points at what all 32 lanes show.
const uint64_t* warp_exchange(unsigned mask, uint64_t shown, Site site);
unsigned lane();

// All threads of a grid of the kernel at `kernel`. Throws what was found wrong.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

template <class T>
void check_aligned(const T* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("misaligned access", address, site);
}

}  // namespace cuda_on_host

#define FT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FT_SITE) { cuda_on_host::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, FT_SITE) { cuda_on_host::warp_exchange(mask, 0, {file, line}); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FT_SITE) {
  static_assert(sizeof(T) <= 8);
  uint64_t shown = 0;
  std::memcpy(&shown, &value, sizeof(T));
  const uint64_t* all = cuda_on_host::warp_exchange(mask, shown, {file, line});
  const unsigned lane = cuda_on_host::lane(), from = lane ^ static_cast<unsigned>(lane_mask);
  std::memcpy(&value, all + (from / width == lane / width ? from : lane), sizeof(T));
  return value;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, FT_SITE) {
  static_assert(sizeof(T) <= 8);
  uint64_t shown = 0;
  std::memcpy(&shown, &value, sizeof(T));
  std::memcpy(&value, cuda_on_host::warp_exchange(mask, shown, {file, line}) + from % 32, sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote, FT_SITE) {
  const uint64_t* all = cuda_on_host::warp_exchange(mask, vote, {file, line});
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(mask >> i & 1 && all[i] == 1) << i;
  return votes;
}

inline bool __any_sync(unsigned mask, bool vote, FT_SITE) {
  const uint64_t* all = cuda_on_host::warp_exchange(mask, vote, {file, line});
  bool any = false;
  for (int i = 0; i < 32; ++i) any = any || (mask >> i & 1 && all[i] == 1);
  return any;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

#define FT_LOAD(name)                                   \
  template <class T>                                    \
  T name(const T* address, FT_SITE) {                   \
    cuda_on_host::check_aligned(address, {file, line}); \
    cuda_on_host::loaded += sizeof(T);                  \
    return *address;                                    \
  }
FT_LOAD(__ldg)
FT_LOAD(__ldcs)
FT_LOAD(__ldcg)
#undef FT_LOAD

template <class T>
void __stcs(T* address, T value, FT_SITE) {
  cuda_on_host::check_aligned(address, {file, line});
  cuda_on_host::stored += sizeof(T);
  *address = value;
}

inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// ---- runtime --------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorInvalidResourceHandle };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

namespace cuda_on_host {
// Is it torch's stream, on a device that a guard made current?
bool is_current(cudaStream_t stream);
// Bytes of dynamic shared memory that a kernel may have: those it was allowed, if more than any kernel is.
size_t& allowed_shared(const void* kernel);
}  // namespace cuda_on_host

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue            ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidResourceHandle ? "cudaErrorInvalidResourceHandle"
                                                   : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t) { return "refused by tests/cuda_on_host"; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  int most;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes > most) return cudaErrorInvalidValue;
  cuda_on_host::allowed_shared(kernel) = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t stream) {
  if (!cuda_on_host::is_current(stream)) return cudaErrorInvalidResourceHandle;
  std::memset(at, byte, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!cuda_on_host::is_current(config->stream)) return cudaErrorInvalidResourceHandle;
  int threads, shared;
  cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerBlock, 0);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (config->blockDim.x > static_cast<unsigned>(threads) || config->gridDim.x == 0)
    return cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  const size_t most = std::min(static_cast<size_t>(shared), cuda_on_host::allowed_shared(function));
  if (config->dynamicSmemBytes > most) return cudaErrorInvalidValue;
  cuda_on_host::run(function, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                    [&] { kernel(arguments...); });
  return cudaSuccess;
}
