// rms_norm_fwd and rms_norm_bwd on CUDA devices.
#include "row_norm_backward.cuh"
#include "row_norm_forward.cuh"

namespace fusedtricks::cuda {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const MaybeTensor& weight, double eps, int64_t dims) {
  return forward<false>("rms_norm_fwd", x, weight, std::nullopt, eps, dims);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                        const Tensor& rstd, int64_t dims, bool need_dx, bool need_dweight) {
  auto [dx, dweight, none] = backward<false>("rms_norm_bwd", dy, x, weight, rstd, dims, need_dx, need_dweight, false);
  return {dx, dweight};
}

FT_KERNEL(rms_norm_fwd, "cuda", rms_norm_fwd);
FT_KERNEL(rms_norm_bwd, "cuda", rms_norm_bwd);

}  // namespace fusedtricks::cuda
