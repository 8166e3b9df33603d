// Memory for results.
#pragma once

#include <cstdint>

#include "large_pages.h"
#include "torch_api.h"

namespace fusedtricks::FT_ISA {

// As torch.empty_like gives it; of `dtype` where one is given.
template <class... Dtype>
Tensor result_like(const Tensor& t, Dtype... dtype) {
  auto out = fusedtricks::empty_like(t, dtype...);
  advise_large_pages(out.const_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

}  // namespace fusedtricks::FT_ISA
