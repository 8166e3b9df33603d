// layer_norm_fwd and layer_norm_bwd on CUDA devices.
#include "row_norm_backward.cuh"
#include "row_norm_forward.cuh"

namespace fusedtricks::cuda {

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                          double eps, int64_t dims) {
  return forward<true>("layer_norm_fwd", x, weight, bias, eps, dims);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                                  const Tensor& stats, int64_t dims, bool need_dx, bool need_dweight,
                                                  bool need_dbias) {
  return backward<true>("layer_norm_bwd", dy, x, weight, stats, dims, need_dx, need_dweight, need_dbias);
}

FT_KERNEL(layer_norm_fwd, "cuda", layer_norm_fwd);
FT_KERNEL(layer_norm_bwd, "cuda", layer_norm_bwd);

}  // namespace fusedtricks::cuda
