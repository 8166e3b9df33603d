// adagrad_ on CUDA devices.
#include "math/adagrad.h"
#include "multi_tensor.cuh"

namespace fusedtricks::cuda {

void adagrad_(const Tensor& table, const Tensor& segments, const Tensor& progress, const Tensor& hyper,
              const Tensor& outcome, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
              const MaybeTensor& norm, std::optional<double> max_norm) {
  step<Adagrad>(table, segments, progress, hyper, outcome, grad_scale, found_inf, norm, max_norm);
}

FT_KERNEL(adagrad_, "cuda", adagrad_);

}  // namespace fusedtricks::cuda
