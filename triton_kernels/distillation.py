"""Launchers of distillation: which kernel of distillation_kernels.py runs, and with what arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fusedtricks.ops.distillation import Options

from .common import Launch, supported
from .cross_entropy import addressable, common_args, lay_out, pick, reference
from .distillation_kernels import bwd, fwd

# Elements of a tile and of a block of a row: 8 a thread, of each of which the forward keeps up to seven numbers.
TILE, BLOCK, WARPS = 2048, 2048, 8
ROWS = 64  # at most: of more, the numbers that each row has need registers that sm_100 does not have


def shape_of_tile(C: int, strided: bool) -> tuple[int, int]:
    """(rows, classes). Where positions are adjacent they fill a warp."""
    block = min(BLOCK, triton.next_power_of_2(C))
    if strided:
        block = min(block, 32)
    return max(1, min(TILE // block, ROWS)), block


def arguments(
    target: Tensor | None, other: Tensor | None, lam: Tensor | None, weight: Tensor | None, C: int, o: Options
) -> dict[str, Any]:
    if target is None or o.alpha == 1:
        names = ("target", "other", "lam", "weight")
        labels = dict.fromkeys(names) | {"ignore": 0, "on": 0.0, "off": 0.0, "ONE_LAM": False, "HARD": False}
    else:
        labels = common_args(target, other, lam, weight, C, o.hard) | {"HARD": True}
    return labels | {"over": 1 / o.temperature, "BOTH": labels["HARD"] and o.temperature != 1}


def plan_forward(x: Tensor, t: Tensor, args: dict[str, Any], losses: Tensor, mass: Tensor, stats: Tensor) -> Launch:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block = shape_of_tile(C, args["x_step"] != 1)
    args = args | {"x": x, "t": t, "losses": losses, "mass": mass, "stats": stats}
    args |= {"SMOOTH": args["off"] != 0, "ROWS": rows, "BLOCK": block, "ONCE": block >= C}
    return Launch(fwd, triton.cdiv(R, rows), pick(args, fwd), WARPS, registers=65536 // (32 * 2 * WARPS))


def plan_backward(
    dloss: Tensor, x: Tensor, t: Tensor, y: Tensor, args: dict[str, Any], stats: Tensor, total: Tensor, o: Options
) -> Launch:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block = shape_of_tile(C, args["x_step"] != 1)
    blocks = triton.cdiv(C, block)
    args = args | {"dloss": dloss, "x": x, "t": t, "y": y, "stats": stats, "total": total}
    args |= {"soft": o.alpha * o.temperature / (R if o.reduction == 1 else 1), "hard": 1 - o.alpha}
    args |= {"ONE_DLOSS": o.reduction != 0, "MEAN": o.reduction == 1, "ROWS": rows, "BLOCK": block, "BLOCKS": blocks}
    return Launch(bwd, triton.cdiv(R, rows) * blocks, pick(args, bwd), WARPS)


def distillation_fwd(
    student: Tensor, teacher: Tensor, target: Tensor | None, other: Tensor | None, lam: Tensor | None,
    weight: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *options, need_dstudent = rest
    o, labels = Options(*options), (target, other, lam, weight)
    if not supported("distillation_fwd", student, teacher, lam, weight):
        return reference("distillation_fwd", student, teacher, *labels, *rest)
    lead, C = student.shape[:-1], student.shape[-1]
    R = math.prod(lead)
    losses, mass = (torch.empty(lead, dtype=torch.float32, device=student.device) for _ in range(2))
    stats = torch.empty((7, R), dtype=torch.float32, device=student.device)
    args = arguments(*labels, C, o)
    if R > 0:
        x, _, t, where = addressable(student, None, teacher)
        args |= where | {"weight_sum": None if args["weight"] is None else weight.sum()}
        plan_forward(x, t, args, losses, mass, stats)(student.device)
    total = mass.sum() if args["HARD"] else torch.ones((), dtype=torch.float32, device=student.device)
    kl, share = stats[6].reshape(lead), o.alpha * o.temperature**2
    loss = share * (kl if o.reduction == 0 else kl.sum() if o.reduction == 2 else kl.mean())
    if args["HARD"]:
        row = losses if o.reduction == 0 else losses.sum() / total if o.reduction == 1 else losses.sum()
        loss = loss + (1 - o.alpha) * row
    dstudent = student.new_empty(0)
    if need_dstudent:
        dstudent = distillation_bwd(torch.ones_like(loss), student, teacher, *labels, stats, total, *o)
    return loss, stats, total, dstudent


def distillation_bwd(
    dloss: Tensor, student: Tensor, teacher: Tensor, target: Tensor | None, other: Tensor | None, lam: Tensor | None,
    weight: Tensor | None, stats: Tensor, total: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    labels = (target, other, lam, weight)
    if not supported("distillation_bwd", student, teacher, dloss, lam, weight, stats, total):
        return reference("distillation_bwd", dloss, student, teacher, *labels, stats, total, *options)
    o, y = Options(*options), torch.empty_like(student)
    if y.numel() > 0:
        x, out, t, where = addressable(student, y, teacher)
        args = arguments(*labels, student.shape[-1], o) | where
        plan_backward(dloss.contiguous(), x, t, out, args, stats.contiguous(), total, o)(student.device)
        if out is not y:
            y.copy_(out)
    return y


# ---- for bench/aot.py -----------------------------------------------------------------------------------------------

# (classes, dtype, temperature, note), one of each regime.
_REGIMES = (
    (10, torch.float32, 2.0, "many rows per program, without vectors"),
    (1000, torch.float32, 2.0, "several rows"),
    (1000, torch.bfloat16, 2.0, "several rows"),
    (1001, torch.bfloat16, 2.0, "without vectors"),
    (32000, torch.float32, 2.0, "loop"),
    (32000, torch.bfloat16, 2.0, "loop"),
    (32000, torch.bfloat16, 1.0, "loop"),
)


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch), planned on meta tensors as on an H100."""
    rows = 8192
    for C, dtype, temperature, note in _REGIMES:
        o = Options(-100, 0.9, 1e-4, temperature, 0.5, 1)
        x = torch.empty((rows, C), dtype=dtype, device="meta")
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        losses, total = torch.empty(rows, device="meta"), torch.empty((), device="meta")
        stats = torch.empty((7, rows), device="meta")
        args = arguments(labels, labels, losses, None, C, o) | lay_out(x, x, x) | {"weight_sum": None}
        label = f"{C} {str(dtype)[6:]} T={temperature:.0f}, {note}"
        yield f"forward {label}, stores statistics", plan_forward(x, x, args, losses, losses, stats)
        yield f"backward {label}", plan_backward(total, x, x, x, args, stats, total, o)
