"""shake_shake: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op


class Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor) -> Tensor:
        alpha = torch.rand(x1.shape[0], *(1,) * (x1.dim() - 1), dtype=x1.dtype, device=x1.device)
        return alpha * x1 + (1 - alpha) * x2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.rand(dy.shape[0], *(1,) * (dy.dim() - 1), dtype=dy.dtype, device=dy.device)
        return beta * dy, (1 - beta) * dy


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, dtype=dtype, device=device).requires_grad_() for _ in range(2))


OPERATION = Function(
    stands_in_for="alpha x1 + (1 - alpha) x2",
    ours=fusedtricks.functional.shake_shake,
    torch=Eager.apply,
    inputs=inputs,
    floors=("3ns", "3ns"),
    forward_bytes=lambda n, s: 3 * n * s,
    backward_bytes=lambda n, s: 3 * n * s,
    # feature maps of two depths, cost of a call
    sizes=((64, 256, 28, 28), (128, 96, 16, 16), (4, 16)),
    headline=(64, 256, 28, 28),
    random=True,
)


def traffic() -> Iterator[Moved]:
    fwd, bwd = (Op.registry[f"shake_shake_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    for dtype in (torch.float32, torch.bfloat16):
        x1, x2 = (torch.randn(32, 8192).to(dtype) for _ in range(2))
        weights, floor = torch.rand(32), 3 * x1.numel() * x1.element_size()
        forward = lambda x1=x1, x2=x2, w=weights: (fwd(x1, x2, w),)  # noqa: E731
        yield Moved("forward", (32, 8192), dtype, forward, floor, 1.02)
        yield Moved("backward", (32, 8192), dtype, lambda x1=x1, w=weights: bwd(x1, w), floor, 1.02)
