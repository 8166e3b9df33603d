// Work shared among torch's own threads, and the dtype switch of the CPU kernels.
#pragma once

#include <cstdint>

#include "result.h"
#include "torch_api.h"
#include "vec.h"

#define FT_TEXT_(x) #x
#define FT_TEXT(x) FT_TEXT_(x)
// Enter `op` in the kernel list for the instruction set of this file.
#define FT_CPU_KERNEL(op) FT_KERNEL(op, "cpu:" FT_TEXT(FT_ISA), op)

namespace fusedtricks::FT_ISA {

// f(begin, end) over `count` items of `cost` elements each; a thread is woken for no less than 16 Ki elements.
template <class F>
void parallel(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kGrain = 16384;
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(cost, 1), 1);
  if (count <= grain) return f(0, count);
  torch::stable::parallel_for(0, count, grain, f);
}

// f.operator()<T>() with the storage type of a floating dtype.
template <class F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
#if defined(__AVX512F__)
      if (rounds_bf16_in_hardware()) return f.template operator()<bf16_rounded_in_hardware>();
#endif
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<fp16>();
    default:
      check_floating(op, "input", dtype);
  }
}

}  // namespace fusedtricks::FT_ISA
