"""Layer normalization (Ba, Kiros, Hinton 2016, arXiv:1607.06450), over any number of trailing dimensions."""

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
# stats (3, R), fp32 (fp64 for fp64): mean, the part of the mean that its own precision rounds away, rstd.
layer_norm_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, int dims) -> (Tensor y, Tensor stats)",
    stem="layer_norm",
)
# dweight and dbias come in the dtype of weight, or of stats without one; what is not wanted comes as an empty tensor.
layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor stats, int dims, bool need_dx, bool need_dweight, "
    "bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    stem="layer_norm",
)


def statistics(x: Tensor, eps: float, dims: int) -> Tensor:
    """(3, R): mean, its remainder, rstd.

    A mean of 1e5 in fp32 is rounded by up to 0.004. The residuals x - mean are exact, so their own mean is the part
    that was rounded away; centring by both keeps the error independent of the mean.
    """
    axes = _norm.trailing(dims)
    x = x.to(_norm.accumulate_dtype(x.dtype))
    mean = x.mean(axes, keepdim=True)
    rest = (x - mean).mean(axes, keepdim=True)
    rstd = _norm.rstd_of(x - mean - rest, axes, eps)
    return torch.stack((mean, rest, rstd)).reshape(3, _norm.row_count(x, dims))


def normalized(x: Tensor, stats: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """x^ = (x - mean) * rstd in the accumulation dtype, and rstd shaped to broadcast over x."""
    mean, rest, rstd = stats.reshape(3, *x.shape[: x.dim() - dims], *(1,) * dims)
    return (x.to(stats.dtype) - mean - rest) * rstd, rstd


@layer_norm_fwd.reference
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int) -> tuple[Tensor, Tensor]:
    stats = statistics(x, eps, dims)
    y, _ = normalized(x, stats, dims)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return _norm.laid_out_like(y.to(x.dtype), x), stats


@layer_norm_bwd.reference
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dims: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With g = dy * weight: dx = rstd (g - mean(g) - x^ mean(g x^)); dweight = sum(dy x^), dbias = sum(dy)."""
    axes = _norm.trailing(dims)
    xhat, rstd = normalized(x, stats, dims)
    dy = dy.to(stats.dtype)
    dtype = stats.dtype if weight is None else weight.dtype
    dx, dweight, dbias = (x.new_empty(0, dtype=d) for d in (x.dtype, dtype, dtype))
    if need_dx:
        g = dy if weight is None else dy * weight
        dx = rstd * (g - g.mean(axes, keepdim=True) - xhat * (g * xhat).mean(axes, keepdim=True))
        dx = _norm.laid_out_like(dx.to(x.dtype), x)
    if need_dweight:
        dweight = _norm.sum_rows(dy * xhat, dims).to(dtype)
    if need_dbias:
        dbias = _norm.sum_rows(dy, dims).to(dtype)
    return dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int) -> Tensor:
        y, stats = layer_norm_fwd(x, weight, bias, eps, dims)
        ctx.save_for_backward(x, weight, stats)
        ctx.eps, ctx.dims = eps, dims
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        run = layer_norm_bwd
        if differentiating():
            run, stats = layer_norm_bwd.implementation("reference"), statistics(x, ctx.eps, ctx.dims)
        grads = run(dy, x, weight, stats, ctx.dims, *need)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), None, None


_node = pair(_LayerNorm, layer_norm_fwd, layer_norm_bwd)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.layer_norm`.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and biased variance over the trailing `normalized_shape`.

    Args:
        input: (*, *normalized_shape); float32, bfloat16, float16 or float64, any strides. Rows with unit stride inside
            are read in place. Of a DTensor each process normalises the rows it holds.
        weight, bias: `normalized_shape`, of any of these dtypes, the same as `input` or not.
        eps: added to the variance.

    Returns:
        A tensor of `input`'s shape, dtype and memory format (torch returns a contiguous one). Statistics are fp32 or
        wider; the error does not grow with the mean, and rows up to 1e30 stay finite.

    Raises:
        RuntimeError: a shape that does not match `normalized_shape`, or tensors on different devices.
        NotImplementedError: an integer or complex `input`.
        TypeError: arguments of the wrong kind.
    """
    dims = _norm.check("layer_norm", input, normalized_shape, weight, bias)
    if not dims:
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    input, weight, bias = _norm.autocast_fp32(input, weight, bias)
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        # Kernels write both gradients in one dtype; the casts' own backward rounds each to its parameter's.
        weight, bias = (p.to(_norm.accumulate_dtype(input.dtype)) for p in (weight, bias))
    if (y := recorded(_node, input, weight, bias, eps, dims)) is not None:
        return y
    if torch.jit.is_tracing() or input.is_nested:  # traces are for other runtimes, which know torch's own
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    if all(p is None or is_dtensor(p) for p in (input, weight, bias)):
        return by_rows(lambda x, w, b: layer_norm(x, normalized_shape, w, b, eps), input, dims, weight, bias)
    if transforming():
        return layer_norm_fwd.implementation("reference")(input, weight, bias, eps, dims)[0]
    if not wants_grad(input, weight, bias):
        return layer_norm_fwd(input, weight, bias, eps, dims)[0]
    return apply(_LayerNorm, input, weight, bias, eps, dims)


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`: same arguments, parameters and state_dict. See :func:`layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
