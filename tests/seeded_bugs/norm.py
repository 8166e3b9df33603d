"""Bugs of the row norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedtricks.ops._norm import trailing
from seeded_bugs import Bug, NativeBug, as_if_dense, first, in_place, overruns, partly_written, wide


def _layer_norm(statistics: Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """A forward with other statistics; they are saved as the right one would."""

    def wrong(right: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int) -> Any:
        y, stats = right(x, weight, bias, eps, dims)
        values = wide(x)
        mean, var = statistics(values, trailing(dims))
        out = (values - mean) * torch.rsqrt(var + eps)
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
        return y.copy_(out), stats

    return wrong


def _var(x: Tensor, axes: tuple[int, ...], correction: int = 0) -> Tensor:
    return x.var(axes, correction=correction, keepdim=True) if x.numel() else x.sum(axes, keepdim=True)


def _padded(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Zeros in the lanes beyond the row, which have distance mean from the mean."""
    mean, columns = x.mean(axes, keepdim=True), x[(0,) * (x.dim() - len(axes))].numel() if x.numel() else 1
    lanes = -columns % 16
    return mean, _var(x, axes) + lanes * mean.square() / columns


def _one_pass(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    return mean, (x.square().mean(axes, keepdim=True) - mean.square()).clamp_min(0)


def _in_16_bits(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.half().mean(axes, keepdim=True)
    return mean.to(x.dtype), (x.half() - mean).square().mean(axes, keepdim=True).to(x.dtype)


def _overflows(right: Any, x: Tensor, weight: Tensor | None, eps: float, dims: int) -> Any:
    y, rstd = right(x, weight, eps, dims)
    if x.numel():
        y.masked_fill_(wide(x).square().mean(trailing(dims), keepdim=True).isinf(), 0)
    return y, rstd


def _dx_term(mean_term: bool) -> Callable[..., Any]:
    """A backward of layer_norm that drops one of its two means."""

    def wrong(right: Any, dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, dims: int, *need: bool) -> Any:
        dx, dweight, dbias = right(dy, x, weight, stats, dims, *need)
        if dx.numel():
            axes = trailing(dims)
            mean, rest, rstd = stats.reshape(3, *x.shape[: x.dim() - dims], *(1,) * dims)
            g = wide(dy) * (1 if weight is None else weight)
            xhat = (wide(x) - mean - rest) * rstd
            kept = g.mean(axes, keepdim=True) if mean_term else xhat * (g * xhat).mean(axes, keepdim=True)
            dx = dx.copy_(rstd * (g - kept))
        return dx, dweight, dbias

    return wrong


def _parameter_gradients(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """dweight and dbias put through `change(gradient, x)`."""

    def wrong(right: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
        dx, *grads = right(dy, x, *rest)
        return dx, *(change(g, x) if g.numel() else g for g in grads)

    return wrong


def _rows_lost(right: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
    """Partial sums of rows past the 256th are never added."""
    dx, *_ = right(dy, x, *rest)
    if x.dim() != 2 or x.shape[0] <= 256:
        return right(dy, x, *rest)
    dy = dy.clone()
    dy[256:] = 0
    return dx, *right(dy, x, *rest)[1:]


LN, LN_BWD, RMS, RMS_BWD = "layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd", "rms_norm_bwd"

BUGS = {
    "bias dropped": Bug(LN, lambda right, x, w, b, *rest: right(x, w, None, *rest)),
    "weight dropped": Bug(LN, lambda right, x, w, *rest: right(x, None, *rest)),
    "eps ignored": Bug(LN, lambda right, x, w, b, eps, dims: right(x, w, b, 1e-5, dims)),
    "only the last dimension normalised": Bug(
        LN,
        lambda right, x, w, b, eps, dims: (right(x, None, None, eps, 1)[0], right(x, w, b, eps, dims)[1]),
    ),
    "unbiased variance": Bug(LN, _layer_norm(lambda x, a: (x.mean(a, keepdim=True), _var(x, a, correction=1)))),
    "padding lanes in the variance": Bug(LN, _layer_norm(_padded)),
    "E[x^2] - E[x]^2": Bug(LN, _layer_norm(_one_pass)),
    "fp16 accumulation": Bug(LN, _layer_norm(_in_16_bits)),
    "statistics saved in 16 bits": Bug(
        LN, lambda right, *args: (lambda y, stats: (y, stats.bfloat16().to(stats.dtype)))(*right(*args))
    ),
    "mean without its remainder": Bug(
        LN, _layer_norm(lambda x, a: (x.mean(a, keepdim=True) * (1 + 2**-22), _var(x, a)))
    ),
    "input strides ignored": Bug(LN, lambda right, x, *rest: first(right, lambda y: y, as_if_dense(x), *rest)),
    "output always contiguous": Bug(LN, lambda right, *args: first(right, lambda y: y.contiguous(), *args)),
    "output in fp32": Bug(LN, lambda right, *args: first(right, wide, *args)),
    "last element unwritten": Bug(LN, lambda right, *args: first(right, lambda y: partly_written(y, 1), *args)),
    "rows past a 16-bit grid unwritten": Bug(
        LN, lambda right, *args: first(right, lambda y: partly_written(y, max(y.numel() - 65535 * 3, 0)), *args)
    ),
    "writes one past the end of its input": Bug(LN, overruns),
    "squares overflow": Bug(RMS, _overflows),
    "mean subtracted": Bug(RMS, lambda right, x, *rest: right(x - x.mean(-1, keepdim=True) if x.numel() else x, *rest)),
    "input rounded to bf16": Bug(RMS, lambda right, x, *rest: right(x.bfloat16().to(x.dtype), *rest)),
    "weight offset by one": Bug(
        RMS, lambda right, x, w, *rest: right(x, w if w is None else w.reshape(-1).roll(1).view_as(w), *rest)
    ),
    "gradient strides ignored": Bug(LN_BWD, lambda right, dy, *rest: right(as_if_dense(dy), *rest)),
    "incoming gradient overwritten": Bug(LN_BWD, in_place),
    "mean(g) dropped": Bug(LN_BWD, _dx_term(mean_term=False)),
    "x^ mean(g x^) dropped": Bug(LN_BWD, _dx_term(mean_term=True)),
    "dweight of 16-bit sums": Bug(LN_BWD, _parameter_gradients(lambda g, x: g.bfloat16().to(g.dtype))),
    "rows past the first block lost": Bug(LN_BWD, _rows_lost),
    "order of the sums changes": Bug(
        LN_BWD, _parameter_gradients(lambda g, x: g * (1 + torch.finfo(g.dtype).eps * torch.randint(0, 2, g.shape)))
    ),
    "dweight only when dx is wanted": Bug(
        LN_BWD,
        lambda right, *args: (lambda dx, dw, db: (dx, dw if args[5] else dw * 0, db))(*right(*args)),
    ),
    "dweight and dbias exchanged": Bug(
        LN_BWD,
        lambda right, *args: (lambda dx, dw, db: (dx, db, dw) if dw.shape == db.shape else (dx, dw, db))(*right(*args)),
    ),
    "gradient expanded over columns": Bug(
        RMS_BWD, lambda right, dy, *rest: right(dy[..., :1].expand_as(dy) if 0 in dy.stride() else dy, *rest)
    ),
    "divided by the padded width": Bug(
        RMS_BWD,
        lambda right, *args: first(right, lambda dx: dx * (1 + 1 / 16) if dx.shape[-1:] == (33,) else dx, *args),
    ),
}

NATIVE_BUGS = {
    "rest of the mean forgotten": NativeBug(
        "math/norm.h", "(x - mean) * rstd - rest * rstd", "(x - mean) * rstd", "layer_norm"
    ),
    "sign of a gradient term": NativeBug(
        "math/norm.h", "(g - mean_g) - xhat * mean_gx", "(g - mean_g) + xhat * mean_gx", "layer_norm"
    ),
}
