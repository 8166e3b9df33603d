"""shake_shake in Triton. Formulas: fusedtricks/ops/shake_shake.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedtricks._op import Op

from . import common
from .common import Launch, supported
from .mixing import dense_samples

COLUMNS = 2048  # of a program


# One compiled kernel serves every size; `D_of` counts ALIGN elements, for vector accesses. Under one draw for the whole
# batch, D is the whole tensor: more than an int32 counts.
@triton.jit(do_not_specialize=["D_of", "chunks"])
def shake(x1, x2, y, alpha, D_of, chunks, ONE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    D = tl.cast(D_of, tl.int64) * ALIGN
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask, at = column < D, sample * D + column
    weight = tl.load(alpha if ONE else alpha + sample)
    a, b = tl.load(x1 + at, mask=mask).to(tl.float32), tl.load(x2 + at, mask=mask).to(tl.float32)
    tl.store(y + at, weight * a + (1 - weight) * b, mask=mask)


@triton.jit(do_not_specialize=["D_of", "chunks"])
def shake_backward(dy, dx1, dx2, beta, D_of, chunks, ONE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    D = tl.cast(D_of, tl.int64) * ALIGN
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask, at = column < D, sample * D + column
    weight = tl.load(beta if ONE else beta + sample)
    g = tl.load(dy + at, mask=mask).to(tl.float32)
    tl.store(dx1 + at, weight * g, mask=mask)
    tl.store(dx2 + at, (1 - weight) * g, mask=mask)


def plan(kernel: triton.JITFunction, tensors: dict[str, Tensor]) -> Launch:
    """For dense samples; the last of `tensors` are the weights."""
    x, weights = next(iter(tensors.values())), list(tensors.values())[-1]
    one = weights.shape[0] == 1
    samples = 1 if one else x.shape[0]
    D = x.numel() // samples
    align, chunks = common.alignment(D), triton.cdiv(D, COLUMNS)
    args = {**tensors, "D_of": D // align, "chunks": chunks, "ONE": one, "ALIGN": align, "COLUMNS": COLUMNS}
    return Launch(kernel, samples * chunks, args, 4)


def shake_shake_fwd(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    if not supported("shake_shake_fwd", x1, x2, alpha):
        return Op.registry["shake_shake_fwd"].implementation("reference")(x1, x2, alpha)
    y = torch.empty_like(x1)
    if x1.numel() == 0:
        return y
    out = y
    if not (dense_samples(x1, x2) and dense_samples(x1, y)):
        x1, x2 = x1.contiguous(), x2.contiguous()
        out = torch.empty(x1.shape, dtype=x1.dtype, device=x1.device)
    plan(shake, {"x1": x1, "x2": x2, "y": out, "alpha": alpha})(x1.device)
    return y if out is y else y.copy_(out)


def shake_shake_bwd(dy: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    if not supported("shake_shake_bwd", dy, beta):
        return Op.registry["shake_shake_bwd"].implementation("reference")(dy, beta)
    dx1, dx2 = torch.empty_like(dy), torch.empty_like(dy)
    if dy.numel() == 0:
        return dx1, dx2
    if dense_samples(dy, dx1):
        plan(shake_backward, {"dy": dy, "dx1": dx1, "dx2": dx2, "beta": beta})(dy.device)
        return dx1, dx2
    plain = dy.contiguous()
    one, two = torch.empty_like(plain), torch.empty_like(plain)
    plan(shake_backward, {"dy": plain, "dx1": one, "dx2": two, "beta": beta})(dy.device)
    return dx1.copy_(one), dx2.copy_(two)


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch), planned on meta tensors as on an H100."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, note in (((64, 64, 56, 56), ""), ((64, 4095), ", without vectors")):
            x, w = torch.empty(size, dtype=dtype, device="meta"), torch.empty(64, device="meta")
            name = f"{str(dtype)[6:]}{note}"
            yield f"forward {name}", plan(shake, {"x1": x, "x2": x, "y": x, "alpha": w})
            yield f"backward {name}", plan(shake_backward, {"dy": x, "dx1": x, "dx2": x, "beta": w})
