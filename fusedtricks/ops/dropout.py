"""Dropout (Srivastava et al. 2014) by element and by channel, without a mask: backward draws the same bits again."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, leaf, transforming
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _norm
from fusedtricks.ops._dtensor import is_dtensor
from fusedtricks.ops._mixing import check_in_place
from fusedtricks.ops._philox import DRAW, Seed, drawn, new_seed, random16

# Element i of x, counted in row-major order whatever the strides, belongs to group i // group, and is kept if the 16
# random bits of its group (_philox.py) are below `keep`, 0 to 65536. What is kept is scaled by 65536 / keep, the rest
# is zero. y has the strides of empty_like(x). The gradient of x is the same operator on that of y.
dropout_fwd = Op("dropout_fwd(Tensor x, Tensor seed, int keep, int group) -> Tensor", stem="dropout")
dropout_fwd_ = Op("dropout_fwd_(Tensor(a!) x, Tensor seed, int keep, int group) -> ()", stem="dropout")


def keep_of(p: float) -> int:
    """How many of the 65536 values of 16 bits keep an element: never none unless p is 1."""
    return 0 if p == 1 else round((1 - p) * 65536) or 1


def kept(shape: torch.Size, seed: Tensor, keep: int, group: int) -> Tensor:
    """The mask of a tensor of `shape`: True where it is kept."""
    numel = math.prod(shape)
    mask = random16(seed, numel // max(group, 1)) < keep
    return (mask if group <= 1 else mask.repeat_interleave(group, output_size=numel)).reshape(shape)


def drop(x: Tensor, seed: Tensor, keep: int, group: int) -> Tensor:
    """The formula, in operations that torch differentiates and maps."""
    wide = x.to(_norm.accumulate_dtype(x.dtype))
    mask = kept(x.shape, seed, keep, group)
    return torch.where(mask, wide * (65536 / max(keep, 1)), 0.0).to(x.dtype)


@dropout_fwd.reference
def _(x: Tensor, seed: Tensor, keep: int, group: int) -> Tensor:
    return _norm.laid_out_like(drop(x, seed, keep, group), x)


@dropout_fwd_.reference
def _(x: Tensor, seed: Tensor, keep: int, group: int) -> None:
    x.copy_(drop(x, seed, keep, group))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, keep: int, group: int, inplace: bool) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.keep, ctx.group = keep, group
        if inplace:
            dropout_fwd_(x, seed, keep, group)
            ctx.mark_dirty(x)
            ctx.strides = _norm.strides_like(x)
            return x
        y = dropout_fwd(x, seed, keep, group)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = run(dy, *ctx.saved_tensors, ctx.keep, ctx.group)
        return _norm.laid_out(dx, ctx.strides), None, None, None, None


_node = pair(_Dropout, dropout_fwd, dropout_fwd, given={"x": "dy"}, laid_out=("x",))


def run(x: Tensor, seed: Seed, keep: int, group: int, inplace: bool = False) -> Tensor:
    if not inplace and (y := recorded(_node, x, seed, keep, group)) is not None:
        return y
    seed = drawn(seed, x.device)
    if transforming():
        y = drop(x, seed, keep, group)
        return x.copy_(y) if inplace else y
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, seed, keep, group, inplace)
    if not inplace:
        return dropout_fwd(x, seed, keep, group)
    dropout_fwd_(x, seed, keep, group)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)
    return x


def _dropout(
    input: Tensor, p: float, training: bool, inplace: bool, group: int, generator: torch.Generator | None
) -> Tensor:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0 or input.numel() == 0:
        return input
    if not input.is_floating_point():
        if input.is_complex():
            return torch.nn.functional.dropout(input, p, training, inplace)
        raise RuntimeError(f"dropout: expected an input of a floating dtype, but got {input.dtype}")
    if is_dtensor(input) and group != 1:
        return (torch.feature_dropout_ if inplace else torch.feature_dropout)(input, p, training)
    if input.is_nested or is_dtensor(input):
        return torch.nn.functional.dropout(input, p, training, inplace)
    if inplace:
        check_in_place("dropout", input)
        apart = not torch.compiler.is_compiling() and input.is_inference()
        if apart and not torch.is_inference_mode_enabled():
            raise RuntimeError("dropout: inplace update to inference tensor outside InferenceMode is not allowed")
    if p == 1:
        return input.zero_() if inplace else torch.where(input.new_zeros((), dtype=torch.bool), input, 0.0)
    if group < 0:
        raise RuntimeError(f"Feature dropout requires at least 2 dimensions in the input, but got {input.dim()}")
    seed = DRAW if generator is None else new_seed(input.device, generator)
    return run(input, seed, keep_of(p), group, inplace)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.dropout`: zeroes each element with probability p and scales the others.

    Args:
        input: float32, bfloat16, float16 or float64, any shape and strides. (Complex input and DTensors are
            torch's own.)
        p: rounded to a multiple of 1/65536; what is kept is divided by the keep probability that results, so the mean
            of the result is exactly `input`. 0 returns `input` itself and draws nothing; 1 gives zeros.
        training: False returns `input` itself.
        inplace: overwrite `input`.
        generator: where the seed is drawn, on the device of `input`; default: torch's own.

    Returns:
        A tensor of `input`'s shape, dtype and memory format. Which elements are zero depends on the seed and on their
        row-major index alone: not on dtype, strides, device, back end or threads. Nothing is kept for backward but the
        seed. A dropped infinity or NaN is zero.

    Raises:
        ValueError: p outside [0, 1].
        RuntimeError: an integer input, or in place on memory that overlaps itself.
    """
    return _dropout(input, p, training, inplace, 1, generator)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.dropout1d`: whole channels of (N, C, L) or (C, L). See :func:`dropout`.

    Raises:
        RuntimeError: an input of other than 2 or 3 dimensions.
    """
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            "Note that dropout1d exists to do channel-wise dropout on inputs with 1 spatial dimension, a channel "
            "dimension, and an optional batch dimension (i.e. 2D or 3D inputs)."
        )
    return _dropout(input, p, training, inplace, input.shape[-1], generator)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.dropout2d`: whole channels of (N, C, H, W). See :func:`dropout`.

    As in torch, a 3-D input is (N, C, L), with a warning.
    """
    if input.dim() not in (3, 4):
        warnings.warn(
            f"dropout2d: Received a {input.dim()}-D input to dropout2d, which is deprecated and will result in an "
            "error in a future release. To retain the behavior and silence this warning, please use dropout instead. "
            "Note that dropout2d exists to provide channel-wise dropout on inputs with 2 spatial dimensions, a channel "
            "dimension, and an optional batch dimension (i.e. 3D or 4D inputs).",
            stacklevel=2,
        )
    elif input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
            "desired - input is interpreted as shape (N, C, L), where C is the channel dim. This behavior will change "
            "in a future release to interpret the input as one without a batch dimension, i.e. shape (C, H, W). To "
            "maintain the 1D channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=2,
        )
    return _dropout(input, p, training, inplace, _channel(input), generator)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W)."""
    if input.dim() not in (4, 5):
        warnings.warn(
            f"dropout3d: Received a {input.dim()}-D input to dropout3d, which is deprecated and will result in an "
            "error in a future release. To retain the behavior and silence this warning, please use dropout instead. "
            "Note that dropout3d exists to provide channel-wise dropout on inputs with 3 spatial dimensions, a channel "
            "dimension, and an optional batch dimension (i.e. 4D or 5D inputs).",
            stacklevel=2,
        )
    group = math.prod(input.shape[1:]) if input.dim() == 4 else _channel(input)
    return _dropout(input, p, training, inplace, group, generator)


def _channel(input: Tensor) -> int:
    """Elements of one channel of (N, C, ...); negative where there are no channels, which dropping refuses."""
    return math.prod(input.shape[2:]) if input.dim() > 1 else -1


class Dropout(torch.nn.Dropout):
    """Drop-in for :class:`torch.nn.Dropout`. See :func:`dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """Drop-in for :class:`torch.nn.Dropout1d`. See :func:`dropout1d`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """Drop-in for :class:`torch.nn.Dropout2d`. See :func:`dropout2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """Drop-in for :class:`torch.nn.Dropout3d`. See :func:`dropout3d`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return dropout3d(input, self.p, self.training, self.inplace)
