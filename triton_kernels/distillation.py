"""Launchers of distillation: which kernel of distillation_kernels.py runs, and with what arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fusedtricks.ops.distillation import Options

from .common import Launch, processors, supported
from .cross_entropy import SPLIT_BELOW, addressable, common_args, lay_out, pick, reference, split_rows
from .distillation_kernels import bwd, fwd, join

# Elements of a tile and of a block of a row: 8 a thread, of each of which the forward keeps up to seven numbers.
TILE, BLOCK, WARPS = 2048, 2048, 8
ROWS = 64  # at most: of more, the numbers that each row has need registers that sm_100 does not have


def shape_of_tile(C: int, strided: bool) -> tuple[int, int]:
    """(rows, classes). Where positions are adjacent they fill a warp."""
    block = min(BLOCK, triton.next_power_of_2(C))
    if strided:
        block = min(block, 32)
    return max(1, min(TILE // block, ROWS)), block


def sparse_args(t: Tensor, indices: Tensor | None, rows: int) -> dict[str, Any]:
    """Those of a teacher, of whose entries, if it is sparse, `rows` rows take KNOWN at once."""
    if indices is None:
        return {"t": t, "indices": None, "K": 0, "KNOWN": 0}
    known = min(triton.next_power_of_2(t.shape[1]), max(TILE // rows, 1))
    return {"t": t.contiguous(), "indices": indices.contiguous(), "K": t.shape[1], "KNOWN": known}


def arguments(
    target: Tensor | None, other: Tensor | None, lam: Tensor | None, weight: Tensor | None, C: int, o: Options
) -> dict[str, Any]:
    if target is None or o.alpha == 1:
        names = ("target", "other", "lam", "weight")
        labels = dict.fromkeys(names) | {"ignore": 0, "on": 0.0, "off": 0.0, "ONE_LAM": False, "HARD": False}
    else:
        labels = common_args(target, other, lam, weight, C, o.hard) | {"HARD": True}
    return labels | {"over": 1 / o.temperature, "BOTH": labels["HARD"] and o.temperature != 1}


def plan_forward(
    x: Tensor,
    t: Tensor,
    indices: Tensor | None,
    args: dict[str, Any],
    losses: Tensor,
    mass: Tensor,
    stats: Tensor,
) -> list[Launch]:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block = shape_of_tile(C, args["x_step"] != 1)
    tiles = triton.cdiv(R, rows)
    splits, length = split_rows(x.device, tiles, C, block)
    partial = torch.empty((7, R, splits), dtype=torch.float32, device=x.device) if splits > 1 else None
    args = args | {"x": x, "losses": losses, "mass": mass, "stats": stats} | sparse_args(t, indices, rows)
    args |= {"SMOOTH": args["off"] != 0, "ROWS": rows, "BLOCK": block, "ONCE": block >= C}
    args |= {"partial": partial, "SPLITS": splits, "length": length}
    launches = [Launch(fwd, tiles * splits, pick(args, fwd), WARPS, registers=65536 // (32 * 2 * WARPS))]
    if splits > 1:
        parts = triton.next_power_of_2(splits)
        args |= {"ROWS": max(1, 256 // parts), "PARTS": parts}
        args |= sparse_args(t, indices, args["ROWS"])
        launches.append(Launch(join, triton.cdiv(R, args["ROWS"]), pick(args, join), 4))
    return launches


def plan_backward(
    dloss: Tensor,
    x: Tensor,
    t: Tensor,
    indices: Tensor | None,
    y: Tensor,
    args: dict[str, Any],
    stats: Tensor,
    total: Tensor,
    o: Options,
) -> Launch:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block = shape_of_tile(C, args["x_step"] != 1)
    blocks, tiles, length = triton.cdiv(C, block), triton.cdiv(R, rows), 1
    # A program reads all entries of its rows, so it has much of them, while there are programs enough.
    enough = SPLIT_BELOW * processors(x.device)
    while indices is not None and length < blocks and tiles * triton.cdiv(blocks, 2 * length) >= enough:
        length *= 2
    blocks = triton.cdiv(blocks, length)
    args = args | {"dloss": dloss, "x": x, "y": y, "stats": stats, "total": total} | sparse_args(t, indices, rows)
    args |= {"soft": o.alpha * o.temperature / (R if o.reduction == 1 else 1), "hard": 1 - o.alpha}
    args |= {"ONE_DLOSS": o.reduction != 0, "MEAN": o.reduction == 1, "ROWS": rows, "BLOCK": block, "BLOCKS": blocks}
    args["LENGTH"] = length
    return Launch(bwd, tiles * blocks, pick(args, bwd), WARPS)


def distillation_fwd(
    student: Tensor, teacher: Tensor, indices: Tensor | None, target: Tensor | None, other: Tensor | None,
    lam: Tensor | None, weight: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *options, need_dstudent = rest
    o, labels = Options(*options), (target, other, lam, weight)
    if not supported("distillation_fwd", student, teacher, lam, weight):
        return reference("distillation_fwd", student, teacher, indices, *labels, *rest)
    lead, C = student.shape[:-1], student.shape[-1]
    R = math.prod(lead)
    losses, mass = (torch.empty(lead, dtype=torch.float32, device=student.device) for _ in range(2))
    stats = torch.empty((7, R), dtype=torch.float32, device=student.device)
    args = arguments(*labels, C, o)
    if R > 0:
        x, _, t, where = addressable(student, None, teacher if indices is None else student)
        args |= where | {"weight_sum": None if args["weight"] is None else weight.sum()}
        for launch in plan_forward(x, t if indices is None else teacher, indices, args, losses, mass, stats):
            launch(student.device)
    total = mass.sum() if args["HARD"] else torch.ones((), dtype=torch.float32, device=student.device)
    kl, share = stats[6].reshape(lead), o.alpha * o.temperature**2
    loss = share * (kl if o.reduction == 0 else kl.sum() if o.reduction == 2 else kl.mean())
    if args["HARD"]:
        row = losses if o.reduction == 0 else losses.sum() / total if o.reduction == 1 else losses.sum()
        loss = loss + (1 - o.alpha) * row
    dstudent = student.new_empty(0)
    if need_dstudent:
        dstudent = distillation_bwd(torch.ones_like(loss), student, teacher, indices, *labels, stats, total, *o)
    return loss, stats, total, dstudent


def distillation_bwd(
    dloss: Tensor, student: Tensor, teacher: Tensor, indices: Tensor | None, target: Tensor | None,
    other: Tensor | None, lam: Tensor | None, weight: Tensor | None, stats: Tensor, total: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    labels = (target, other, lam, weight)
    if not supported("distillation_bwd", student, teacher, dloss, lam, weight, stats, total):
        return reference("distillation_bwd", dloss, student, teacher, indices, *labels, stats, total, *options)
    o, y = Options(*options), torch.empty_like(student)
    if y.numel() > 0:
        x, out, t, where = addressable(student, y, teacher if indices is None else student)
        args = arguments(*labels, student.shape[-1], o) | where
        t = t if indices is None else teacher
        plan_backward(dloss.contiguous(), x, t, indices, out, args, stats.contiguous(), total, o)(student.device)
        if out is not y:
            y.copy_(out)
    return y


# ---- for bench/aot.py -----------------------------------------------------------------------------------------------

# (rows, classes, dtype, temperature, classes that a sparse teacher knows or 0, note), one of each regime.
_REGIMES = (
    (8192, 10, torch.float32, 2.0, 0, "many rows per program, without vectors"),
    (8192, 1000, torch.float32, 2.0, 0, "several rows"),
    (8192, 1000, torch.bfloat16, 2.0, 0, "several rows"),
    (8192, 1001, torch.bfloat16, 2.0, 0, "without vectors"),
    (8192, 32000, torch.float32, 2.0, 0, "loop"),
    (8192, 32000, torch.bfloat16, 2.0, 0, "loop"),
    (8192, 32000, torch.bfloat16, 1.0, 0, "loop"),
    (8192, 1000, torch.float32, 2.0, 64, "several rows"),
    (8192, 32000, torch.bfloat16, 2.0, 64, "loop"),
    (16, 128256, torch.bfloat16, 2.0, 0, "split rows"),
    (16, 128256, torch.float32, 2.0, 64, "split rows"),
)


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch), planned on meta tensors as on an H100."""
    for rows, C, dtype, temperature, known, note in _REGIMES:
        o = Options(-100, 0.9, 1e-4, temperature, 0.5, 1)
        x = torch.empty((rows, C), dtype=dtype, device="meta")
        t = torch.empty((rows, known), dtype=dtype, device="meta") if known else x
        indices = torch.empty((rows, known), dtype=torch.int64, device="meta") if known else None
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        losses, total = torch.empty(rows, device="meta"), torch.empty((), device="meta")
        stats = torch.empty((7, rows), device="meta")
        args = arguments(labels, labels, losses, None, C, o) | lay_out(x, x, x) | {"weight_sum": None}
        label = f"{C} {str(dtype)[6:]} T={temperature:.0f}{f' k={known}' if known else ''}, {note}"
        first, *rest = plan_forward(x, t, indices, args, losses, losses, stats)
        yield f"forward {label}, stores statistics", first
        for launch in rest:
            yield f"join {label}, without vectors", launch
        yield f"backward {label}", plan_backward(total, x, t, indices, x, args, stats, total, o)
