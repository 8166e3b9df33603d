"""Launchers of RMS normalization; kernels and the choice among them are in row_norm.py."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fusedtricks._op import Op

from . import row_norm
from .common import Launch, supported


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, dims: int) -> tuple[Tensor, Tensor]:
    if not supported("rms_norm_fwd", x, weight):
        return Op.registry["rms_norm_fwd"].implementation("reference")(x, weight, eps, dims)
    return row_norm.forward(x, weight, None, eps, dims, center=False)


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    if not supported("rms_norm_bwd", x, dy, weight, rstd):
        return Op.registry["rms_norm_bwd"].implementation("reference")(dy, x, weight, rstd, dims, need_dx, need_dweight)
    return row_norm.backward(dy, x, weight, rstd, dims, need_dx, need_dweight, False, center=False)[:2]


def specialisations() -> Iterator[tuple[str, Launch]]:
    return row_norm.specialisations(center=False)
