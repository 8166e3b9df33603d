"""Launchers of cutmix; the kernels are in mixing.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedtricks._op import Op

from . import mixing
from .common import Launch, supported


def cutmix_fwd(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    if not x.is_floating_point() or not supported("cutmix_fwd", x):
        return Op.registry["cutmix_fwd"].implementation("reference")(x, perm, box)
    y = torch.empty_like(x)
    mixing.run(x, y, perm, box=box)
    return y


def cutmix_bwd(dy: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    if not supported("cutmix_bwd", dy):
        return Op.registry["cutmix_bwd"].implementation("reference")(dy, perm, box)
    dx = torch.empty_like(dy)
    mixing.run(dy, dx, perm, box=box, backward=True)
    return dx


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for one box and for many, planned on meta tensors as on an H100."""
    for N in (64, 256):
        perm, box = (torch.empty(s, dtype=torch.int64, device="meta") for s in ((N,), (N, 4)))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty((N, 3, 224, 224), dtype=dtype, device="meta")
            for backward in (False, True):
                note = f"{'backward' if backward else 'forward'} {N} samples {str(dtype)[6:]}"
                yield note, mixing.plan(x, x, perm, box=box, backward=backward)
