// layer_norm_fwd and layer_norm_bwd on the CPU.
#include "row_norm.h"

namespace fusedtricks::FT_ISA {

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                          double eps, int64_t dims) {
  return forward<true>("layer_norm_fwd", x, weight, bias, eps, dims);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                                  const Tensor& stats, int64_t dims, bool need_dx, bool need_dweight,
                                                  bool need_dbias) {
  return backward<true>("layer_norm_bwd", dy, x, weight, stats, dims, need_dx, need_dweight, need_dbias);
}

FT_CPU_KERNEL(layer_norm_fwd);
FT_CPU_KERNEL(layer_norm_bwd);

}  // namespace fusedtricks::FT_ISA
