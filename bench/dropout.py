"""Dropout: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op

P = 0.1


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, dtype=dtype, device=device).requires_grad_(),)


OPERATION = Function(
    stands_in_for="nn.Dropout",
    ours=lambda x: fusedtricks.functional.dropout(x, P),
    torch=lambda x: torch.nn.functional.dropout(x, P),
    inputs=inputs,
    floors=("2ns", "2ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    # 16 Mi elements; 1 Mi, in the last cache of a CPU; cost of a call
    sizes=((1 << 24,), (1 << 20,), (64,)),
    headline=(1 << 24,),
    random=True,
)


def traffic() -> Iterator[Moved]:
    """Backward is forward on the gradient. By element and by channel."""
    run, seed = Op.registry["dropout_fwd"].implementation("triton"), torch.tensor([1])
    for dtype in (torch.float32, torch.bfloat16):
        for size, group in (((256, 1024), 1), ((16, 16, 32, 33), 1056)):
            x = torch.randn(size).to(dtype)
            call = lambda x=x, group=group: (run(x, seed, 60000, group),)  # noqa: E731
            yield Moved("either way", size, dtype, call, 2 * x.numel() * x.element_size(), 1.02)
