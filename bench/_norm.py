"""Bytes of the row norms, forward and backward, in rows that fit registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import Moved
from fusedtricks._op import Op

# The interpreter plans for a device of four multiprocessors, so these stand for the share of each that 16384 rows have
# on a large GPU.
ROWS = 512
COLUMNS = (1024, 4096, 8192)
FORWARD, BACKWARD = 1.05, 1.10


def traffic(stem: str, parameters: int) -> Iterator[Moved]:
    """Parameters of the dtype of x, all gradients wanted; RMS normalization, the same code, at the outermost sizes."""
    fwd, bwd = (Op.registry[f"{stem}_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    reference = Op.registry[f"{stem}_fwd"].implementation("reference")
    need = (True,) * (1 + parameters)
    for C in COLUMNS if parameters == 2 else COLUMNS[::2]:
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = (torch.randn(ROWS, C).to(dtype) for _ in range(2))
            given, n = [torch.randn(C).to(dtype) for _ in range(parameters)], x.numel() * x.element_size()
            forward = lambda x=x, given=given: fwd(x, *given, 1e-5, 1)  # noqa: E731
            yield Moved("forward", (ROWS, C), dtype, forward, 2 * n, FORWARD)
            stats = reference(x, *given, 1e-5, 1)[1]
            backward = lambda x=x, dy=dy, w=given[0], stats=stats: bwd(dy, x, w, stats, 1, *need)  # noqa: E731
            yield Moved("backward", (ROWS, C), dtype, backward, 3 * n, BACKWARD)
