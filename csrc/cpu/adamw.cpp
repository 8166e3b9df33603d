// adamw_ on the CPU.
#include "../math/adamw.h"

#include "multi_tensor.h"

namespace fusedtricks::FT_ISA {

void adamw_(const Tensor& table, const Tensor& segments, const Tensor& progress, const Tensor& hyper,
            const Tensor& outcome, const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& norm,
            std::optional<double> max_norm) {
  step<AdamW>(table, segments, progress, hyper, outcome, grad_scale, found_inf, norm, max_norm);
}

FT_CPU_KERNEL(adamw_);

}  // namespace fusedtricks::FT_ISA
