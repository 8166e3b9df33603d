// Between a launcher and the device: guard, stream, properties, error check, and the one function that launches
// kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>

#include "torch_api.h"

// Weak, because a CPU-only torch lacks it and this library must load beside one. Where torch has CUDA, the symbol comes
// from libtorch_cuda.so through our dependency on libtorch.so.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fusedtricks::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not surface in somebody else's check
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory that kernels may declare statically, for reductions, beside what they are launched with.
inline constexpr int kStaticShared = 4 << 10;

// Makes the device of `where` current while it lives, and holds what a launcher needs to know about it.
class Device {
 public:
  explicit Device(const Tensor& where) : guard_(where.get_device_index()), index_(where.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream,
                    "fusedtricks: a CUDA kernel was called, but the installed torch has no CUDA");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int threads_per_block() const { return attribute(cudaDevAttrMaxThreadsPerBlock); }
  int shared_per_block() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // `shared` is in bytes.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "fusedtricks: ", blocks,
                    " blocks are more than a kernel launch can have; split the input");
    // What a kernel declares counts as well.
    constexpr int64_t kWithoutOptIn = (48 << 10) - kStaticShared;
    if (shared > kWithoutOptIn) {
      // All there is, whatever this launch takes, so that no thread of the host takes back what another has asked for.
      const int64_t most = std::max<int64_t>(shared, shared_per_block() - kStaticShared);
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
                 "fusedtricks: shared memory");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "fusedtricks: kernel launch");
  }

  void zero(void* at, size_t bytes) const { check_cuda(cudaMemsetAsync(at, 0, bytes, stream_), "fusedtricks: memset"); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value;
    check_cuda(cudaDeviceGetAttribute(&value, which, index_), "fusedtricks: device attribute");
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_;
};

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char ft_dynamic_shared[];
  return reinterpret_cast<T*>(ft_dynamic_shared);
}

}  // namespace fusedtricks::cuda
