"""Dropout: sizes, inputs, bytes. Sizes of four dimensions are NCHW and dropped by channel, those of five
channels_last_3d (NDHWC)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op

P = 0.1


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device)
    if len(size) == 5:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return (x.requires_grad_(),)


def dropping(functional: Any) -> Callable[[Tensor], Tensor]:
    of = {4: functional.dropout2d, 5: functional.dropout3d}
    return lambda x: of.get(x.dim(), functional.dropout)(x, P)


OPERATION = Function(
    stands_in_for="nn.Dropout",
    ours=dropping(fusedtricks.functional),
    torch=dropping(torch.nn.functional),
    inputs=inputs,
    floors=("2ns", "2ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    # 16 Mi elements; 1 Mi, in the last cache of a CPU; by channel, outermost and innermost; cost of a call
    sizes=((1 << 24,), (1 << 20,), (128, 256, 14, 14), (32, 64, 1, 56, 56), (64,)),
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
