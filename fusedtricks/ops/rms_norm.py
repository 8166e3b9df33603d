"""Root mean square layer normalization (Zhang, Sennrich 2019, arXiv:1910.07467), over trailing dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, apply, differentiating, leaf, transforming, wants_grad
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _norm
from fusedtricks.ops._dtensor import by_rows, is_dtensor

# x (*, C...) with `dims` trailing dimensions normalised, R rows in logical order. y has the strides of empty_like(x).
# rstd (R,), fp32 (fp64 for fp64).
rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, int dims) -> (Tensor y, Tensor rstd)", stem="rms_norm"
)
# dweight comes in the dtype of weight; what is not wanted comes as an empty tensor.
rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, int dims, bool need_dx, bool need_dweight) "
    "-> (Tensor dx, Tensor dweight)",
    stem="rms_norm",
)


def statistics(x: Tensor, eps: float, dims: int) -> Tensor:
    """(R,): 1 / sqrt(mean(x^2) + eps)."""
    x = x.to(_norm.accumulate_dtype(x.dtype))
    return _norm.rstd_of(x, _norm.trailing(dims), eps).reshape(_norm.row_count(x, dims))


def normalized(x: Tensor, rstd: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """x^ = x * rstd in the accumulation dtype, and rstd shaped to broadcast over x."""
    rstd = rstd.reshape(*x.shape[: x.dim() - dims], *(1,) * dims)
    return x.to(rstd.dtype) * rstd, rstd


@rms_norm_fwd.reference
def _(x: Tensor, weight: Tensor | None, eps: float, dims: int) -> tuple[Tensor, Tensor]:
    rstd = statistics(x, eps, dims)
    y, _ = normalized(x, rstd, dims)
    if weight is not None:
        y = y * weight
    return _norm.laid_out_like(y.to(x.dtype), x), rstd


@rms_norm_bwd.reference
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """With g = dy * weight:  dx = rstd (g - x^ mean(g x^)),  dweight = sum_rows(dy x^)."""
    axes = _norm.trailing(dims)
    xhat, rstd = normalized(x, rstd, dims)
    dy = dy.to(rstd.dtype)
    dtype = rstd.dtype if weight is None else weight.dtype
    dx, dweight = (x.new_empty(0, dtype=d) for d in (x.dtype, dtype))
    if need_dx:
        g = dy if weight is None else dy * weight
        dx = rstd * (g - xhat * (g * xhat).mean(axes, keepdim=True))
        dx = _norm.laid_out_like(dx.to(x.dtype), x)
    if need_dweight:
        dweight = _norm.sum_rows(dy * xhat, dims).to(dtype)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dims: int) -> Tensor:
        y, rstd = rms_norm_fwd(x, weight, eps, dims)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.dims = eps, dims
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        run = rms_norm_bwd
        if differentiating():
            run, rstd = rms_norm_bwd.implementation("reference"), statistics(x, ctx.eps, ctx.dims)
        grads = run(dy, x, weight, rstd, ctx.dims, *need)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), None, None


_node = pair(_RMSNorm, rms_norm_fwd, rms_norm_bwd)


def rms_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.rms_norm`.

    y = x / sqrt(mean(x^2) + eps) * weight, the mean over the trailing `normalized_shape`.

    Args:
        input: (*, *normalized_shape); float32, bfloat16, float16 or float64, any strides. Rows with unit stride inside
            are read in place. Of a DTensor each process normalises the rows it holds. Complex input is torch's own.
        weight: `normalized_shape`, of any of these dtypes, the same as `input` or not.
        eps: added to the mean of squares; None is the machine epsilon of the arithmetic (fp32, or fp64 for fp64).

    Returns:
        A tensor of `input`'s shape, dtype and memory format. Rows up to 1e30 stay finite.

    Raises:
        RuntimeError: a shape that does not match `normalized_shape`, or tensors on different devices.
        NotImplementedError: an integer `input`.
        TypeError: arguments of the wrong kind.
    """
    if isinstance(input, Tensor) and input.is_complex():
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
    dims = _norm.check("rms_norm", input, normalized_shape, weight)
    if not dims:
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
    input, weight = _norm.autocast_fp32(input, weight)
    if eps is None:
        eps = torch.finfo(_norm.accumulate_dtype(input.dtype)).eps
    if (y := recorded(_node, input, weight, eps, dims)) is not None:
        return y
    if torch.jit.is_tracing() or input.is_nested:  # traces are for other runtimes, which know torch's own
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
    if all(p is None or is_dtensor(p) for p in (input, weight)):
        return by_rows(lambda x, w: rms_norm(x, normalized_shape, w, eps), input, dims, weight)
    if transforming():
        return rms_norm_fwd.implementation("reference")(input, weight, eps, dims)[0]
    if not wants_grad(input, weight):
        return rms_norm_fwd(input, weight, eps, dims)[0]
    return apply(_RMSNorm, input, weight, eps, dims)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`: same arguments, parameters and state_dict. See :func:`rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
