"""Shake-shake regularization (Gastaldi 2017, arXiv:1705.07485) of two branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, apply, differentiating, leaf, transforming
from fusedtricks.ops import _mixing, _norm

# y = alpha x1 + (1 - alpha) x2; dx1 = beta dy, dx2 = (1 - beta) dy. alpha and beta have one element or one for each
# sample, fp32 (fp64 for fp64). Results have the strides of empty_like of the first argument.
shake_shake_fwd = Op("shake_shake_fwd(Tensor x1, Tensor x2, Tensor alpha) -> Tensor", stem="shake_shake")
shake_shake_bwd = Op("shake_shake_bwd(Tensor dy, Tensor beta) -> (Tensor dx1, Tensor dx2)", stem="shake_shake")


def shake(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    """The formula, in the arithmetic of alpha."""
    alpha = _mixing.per_sample(alpha, x1)
    return alpha * x1.to(alpha.dtype) + (1 - alpha) * x2.to(alpha.dtype)


@shake_shake_fwd.reference
def _(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    return _norm.laid_out_like(shake(x1, x2, alpha).to(x1.dtype), x1)


@shake_shake_bwd.reference
def _(dy: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    beta = _mixing.per_sample(beta, dy)
    wide = dy.to(beta.dtype)
    return tuple(_norm.laid_out_like((b * wide).to(dy.dtype), dy) for b in (beta, 1 - beta))


def draw(x: Tensor, per_sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [0, 1), one or one for each sample."""
    return _mixing.uniform((x.shape[0] if per_sample else 1,), x, generator, _norm.accumulate_dtype(x.dtype))


class _ShakeShake(torch.autograd.Function):
    """`beta` None: drawn in each backward, from the generator's state then."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor | None, generator: Any) -> Tensor:
        ctx.per_sample, ctx.generator = alpha.numel() > 1, generator
        ctx.save_for_backward(beta)
        y = shake_shake_fwd(x1, x2, alpha)
        ctx.strides = y.stride(), _norm.strides_like(x2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (beta,) = ctx.saved_tensors
        if beta is None:
            beta = draw(dy, ctx.per_sample, ctx.generator)
        backward = _ShakeShakeBackward.apply if differentiating() else shake_shake_bwd
        (dx1, dx2), (strides1, strides2) = backward(dy, beta), ctx.strides
        return _norm.laid_out(dx1, strides1), _norm.laid_out(dx2, strides2), None, None, None


class _ShakeShakeBackward(torch.autograd.Function):
    """Linear in dy: its own backward is the forward with alpha = beta."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(beta)
        return shake_shake_bwd(dy, beta)

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        (beta,) = ctx.saved_tensors
        return _ShakeShake.apply(d1, d2, beta, beta, None), None


def run(
    x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    if transforming():
        beta = draw(x1, alpha.numel() > 1, generator) if beta is None else beta
        y = shake(x1, x2, beta)
        return (y + (shake(x1, x2, alpha) - y).detach()).to(x1.dtype)
    if torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad):
        return apply(_ShakeShake, x1, x2, alpha, beta, generator)
    return shake_shake_fwd(x1, x2, alpha)


def shake_shake(
    x1: Tensor,
    x2: Tensor,
    training: bool = True,
    per_sample: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """alpha x1 + (1 - alpha) x2 with alpha ~ U(0, 1); its gradient is that of beta x1 + (1 - beta) x2.

    Args:
        x1, x2: (N, *), of one shape, dtype (float32, bfloat16, float16 or float64) and device, any strides.
        training: False takes 1/2 for alpha and beta, and draws nothing.
        per_sample: a draw for each sample, else one for the batch.
        generator: where both are drawn, on the device of x1; default: torch's own.

    Returns:
        A tensor of x1's shape, dtype and memory format. beta is independent of alpha and drawn anew in each backward;
        activation checkpointing recomputes with the same alpha.

    Raises:
        RuntimeError: x1 and x2 of different shapes, dtypes or devices, not floating, or without a batch.

    Source: Gastaldi 2017, section 1.2 and its Lua code.
    """
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        raise RuntimeError(
            f"shake_shake: expected two tensors of one shape, dtype and device, but got {x1.dtype} of shape "
            f"{tuple(x1.shape)} on {x1.device} and {x2.dtype} of shape {tuple(x2.shape)} on {x2.device}"
        )
    if x1.dtype not in _norm.FLOATS or x1.dim() == 0:
        raise RuntimeError(f"shake_shake: expected floating (N, *), but got {x1.dtype} of shape {tuple(x1.shape)}")
    if not training:
        half = torch.full((1,), 0.5, dtype=_norm.accumulate_dtype(x1.dtype), device=x1.device)
        return run(x1, x2, half, half)
    return run(x1, x2, draw(x1, per_sample, generator), None, generator)


class ShakeShake(torch.nn.Module):
    """Mixes two branches, x1, x2 -> y. See :func:`shake_shake`."""

    def __init__(self, per_sample: bool = True, *, generator: torch.Generator | None = None):
        super().__init__()
        self.per_sample, self.generator = per_sample, generator

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        if isinstance(x1, Proxy):
            return leaf(self, x1, x2)
        return shake_shake(x1, x2, self.training, self.per_sample, generator=self.generator)

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}"
