"""shake_shake with alpha and beta given. A shape is (size, whether each sample has its own)."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case, Shape
from fusedtricks.ops import _mixing, shake_shake


def inputs(size: tuple[int, ...], per_sample: bool, same: bool = False) -> tuple[Tensor, ...]:
    weights = [torch.rand(size[0] if per_sample else 1, dtype=torch.float32).double() for _ in range(2)]
    weights = [weights[0], weights[0]] if same else weights
    return *(torch.randn(size, dtype=torch.float64) for _ in range(2)), *weights


def in_arithmetic(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [w.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous() for w in weights]


class Expected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return (_mixing.per_sample(alpha, x1) * x1 + (1 - _mixing.per_sample(alpha, x1)) * x2).to(x1.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        beta = _mixing.per_sample(ctx.saved_tensors[0], dy)
        return (beta * dy).to(dy.dtype), ((1 - beta) * dy).to(dy.dtype), None, None


def in_one_dtype(fn, x1: Tensor, x2: Tensor, *weights: Tensor) -> Tensor:
    """Branches of different dtypes are an error; the sweep's mixtures are brought to the wider one."""
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    wide = x1.to(dtype)
    return fn(wide, x2.to(dtype), *in_arithmetic(wide, *weights)).to(x1.dtype)


def ours(x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return in_one_dtype(shake_shake.run, x1, x2, alpha, beta)


def expected(x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return in_one_dtype(Expected.apply, x1, x2, alpha, beta)


SHAPES: dict[str, Shape] = {
    "one element": ((1,), False),
    "one dimension": ((9,), True),
    "3-D": ((7, 5, 40), True),
    "images": ((5, 3, 4, 18), True),
    "images, one draw": ((5, 3, 4, 18), False),
    "past a chunk": ((5, 2051), True),
    "no samples": ((0, 8), False),
    "no elements": ((4, 0), True),
}

CASE = Case(
    fn=ours,
    torch_fn=expected,
    names=("x1", "x2", "alpha", "beta"),
    fixed=("alpha", "beta"),
    inputs=inputs,
    call=lambda fn, t, *_: fn(*t),
    shapes=SHAPES,
    shape="3-D",
    layout_shapes=("3-D", "images, one draw", "images"),
    small={"same beta": ((3, 5), True, True)},
    large={"few": ((3, 100_003), True), "many": ((4099, 33), True)},
    growing=(((3, 40), False), ((7, 40), False), ((129, 40), False)),
    gpu={"samples": ((33, 1001), True), "one draw": ((5, 3, 16, 18), False)},
    rowwise=False,
)
