"""Launchers of layer normalization; kernels and the choice among them are in row_norm.py."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fusedtricks._op import Op

from . import row_norm
from .common import Launch, supported


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int
) -> tuple[Tensor, Tensor]:
    if not supported("layer_norm_fwd", x, weight, bias):
        return Op.registry["layer_norm_fwd"].implementation("reference")(x, weight, bias, eps, dims)
    return row_norm.forward(x, weight, bias, eps, dims, center=True)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dims: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_dx, need_dweight, need_dbias)
    if not supported("layer_norm_bwd", x, dy, weight, stats):
        return Op.registry["layer_norm_bwd"].implementation("reference")(dy, x, weight, stats, dims, *need)
    return row_norm.backward(dy, x, weight, stats, dims, *need, center=True)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return row_norm.specialisations(center=True)
