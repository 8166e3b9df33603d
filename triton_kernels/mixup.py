"""Launchers of mixup; the kernels are in mixing.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedtricks._op import Op

from . import mixing
from .common import FLOATS, Launch, supported


def mixup_fwd(
    x: Tensor, lam: Tensor, perm: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    images = x.dtype == torch.uint8
    if not supported("mixup_fwd", lam if images else x, lam) or dtype not in FLOATS:
        return Op.registry["mixup_fwd"].implementation("reference")(x, lam, perm, scale, shift, dtype)
    y = torch.empty_like(x, dtype=dtype)
    mixing.run(x, y, perm, lam=lam.reshape(-1), scale=scale, shift=shift)
    return y


def mixup_fwd_(x: Tensor, lam: Tensor, perm: Tensor) -> None:
    if not supported("mixup_fwd_", x, lam):
        return Op.registry["mixup_fwd_"].implementation("reference")(x, lam, perm)
    mixing.run(x, x, perm, lam=lam.reshape(-1))


def mixup_bwd(dy: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
    if not supported("mixup_bwd", dy, lam):
        return Op.registry["mixup_bwd"].implementation("reference")(dy, lam, perm)
    dx = torch.empty_like(dy)
    mixing.run(dy, dx, perm, lam=lam.reshape(-1), backward=True)
    return dx


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for small and large batches, planned on meta tensors as on an H100."""
    for N, size in ((64, (3, 224, 224)), (256, (3, 224, 224)), (512, (65536,)), (4096, (512,))):
        perm, lam = (torch.empty(N, dtype=d, device="meta") for d in (torch.int64, torch.float32))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty((N, *size), dtype=dtype, device="meta")
            for backward in (False, True):
                note = f"{'backward' if backward else 'forward'} {N} samples {str(dtype)[6:]}"
                yield note, mixing.plan(x, x, perm, lam=lam, backward=backward)
    x, y = (torch.empty((64, 3, 224, 224), dtype=d, device="meta") for d in (torch.uint8, torch.bfloat16))
    scale, perm, lam = (torch.empty(n, device="meta") for n in (3, 64, 64))
    yield "images", mixing.plan(x, y, perm.long(), lam=lam, scale=scale, shift=scale)
