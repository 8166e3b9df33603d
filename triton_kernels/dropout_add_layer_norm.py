"""Launchers of dropout_add_layer_norm; the kernels are those of the row norms, with what `row_norm.Dropping` adds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedtricks._op import Op

from . import row_norm
from .common import Launch, supported
from .row_norm import Dropping


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    keep: int,
    eps: float,
    dims: int,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not supported("dropout_add_layer_norm_fwd", x, residual, weight, bias):
        reference = Op.registry["dropout_add_layer_norm_fwd"].implementation("reference")
        return reference(x, residual, weight, bias, seed, keep, eps, dims, center)
    z = torch.empty_like(x)
    more = Dropping(seed, keep, residual=residual, z=z)
    y, stats = row_norm.forward(x, weight, bias if center else None, eps, dims, center, more)
    return y, z, stats


def dropout_add_layer_norm_bwd(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    keep: int,
    dims: int,
    center: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_dx, need_dresidual, need_dweight, need_dbias)
    if not supported("dropout_add_layer_norm_bwd", z, dy, dz, weight, stats):
        reference = Op.registry["dropout_add_layer_norm_bwd"].implementation("reference")
        return reference(dy, dz, z, weight, stats, seed, keep, dims, center, *need)
    dx = torch.empty_like(z) if need_dx else z.new_empty(0)
    more = Dropping(seed, keep, dz=dz, dropped=dx if need_dx else None)
    through = need_dx or need_dresidual
    total, dweight, dbias = row_norm.backward(
        dy, z, weight, stats, dims, through, need_dweight, need_dbias and center, center, more
    )
    return dx, total if need_dresidual else z.new_empty(0), dweight, dbias


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for one shape of each regime, planned on meta tensors as on an H100."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for C, note in ((768, ""), (1001, ", without vectors"), (4096, ""), (8192, ""), (65536, "")):
        for dtype in (torch.float32, torch.bfloat16):
            x, y, z, dz = (torch.empty((4096, C), dtype=dtype, device="meta") for _ in range(4))
            weight, bias = (torch.empty(C, dtype=dtype, device="meta") for _ in range(2))
            stats = torch.empty((3, 4096), device="meta")
            args = row_norm.describe({"x": x, "y": y}, 1)
            more = Dropping(seed, 60000, residual=z, z=z)
            name = f"{C} {str(dtype)[6:]}{note}"
            yield f"forward {name}", row_norm.plan_forward(x, weight, bias, 1e-5, y, stats, args, True, more)
            args = row_norm.describe({"dy": y, "x": x, "dx": y}, 1)
            more = Dropping(seed, 60000, dz=dz, dropped=dz)
            yield (
                f"backward {name}",
                row_norm.plan_backward(y, x, weight, stats, y, weight, bias, args, True, more),
            )
