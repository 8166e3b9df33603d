"""Bytes of batch normalization, alone and with residual add and ReLU, where x is read twice and where once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import Moved
from fusedtricks._op import Op
from fusedtricks.ops import _batch_norm as bn

# The interpreter plans for a device of four multiprocessors. Layouts: planes, rows, narrow rows; then two that one
# program holds for each group of channels.
STREAMING = (((20, 4, 28, 28), False), ((32, 32, 16, 16), True), ((8, 3, 128, 128), True))
RESIDENT = (((8, 8, 16, 16), False), ((256, 32), False))
BUDGET = 1.10


def _calls(x: Tensor, residual: Tensor | None, activation: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    fwd, bwd = (Op.registry[f"batch_norm_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    C, masked = x.shape[1], residual is not None
    weight, bias, mean, var = torch.randn(4, C).unbind()
    dy, tracked = torch.randn_like(x), torch.zeros((), dtype=torch.int64)

    def forward() -> tuple[Tensor, ...]:
        return fwd(x, residual, weight, bias, mean, var, tracked, 0.1, 1e-5, activation, 0.0, True, masked)

    _, stats, mask = forward()
    saved = (stats, mask) if masked else (stats, None)

    def backward() -> tuple[Tensor, ...]:
        return bwd(dy, x, None, weight, bias, *saved, None, True, activation, 0.0, True, masked, True, True)

    return forward, backward


def traffic() -> Iterator[Moved]:
    """Floors: DESIGN.md, section 4."""
    for shapes, reads in ((STREAMING, 2), (RESIDENT, 1)):
        for shape, last in shapes:
            narrow = shape[1] == 3
            for dtype in (torch.float32, torch.bfloat16)[narrow:]:
                x = torch.randn(shape).to(dtype)
                x = x.to(memory_format=torch.channels_last) if last else x
                n, ns = x.numel(), x.numel() * x.element_size()
                forward, backward = _calls(x, None, bn.RELU)
                yield Moved("forward", shape, dtype, forward, (reads + 1) * ns, BUDGET)
                yield Moved("backward", shape, dtype, backward, (2 * reads + 1) * ns, BUDGET)
                if narrow:
                    continue
                forward, backward = _calls(x, torch.randn_like(x), bn.RELU)
                yield Moved("added forward", shape, dtype, forward, (reads + 2) * ns + n // 8, BUDGET)
                yield Moved("added backward", shape, dtype, backward, 2 * (reads + 1) * ns + reads * n // 8, BUDGET)
