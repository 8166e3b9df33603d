"""Launchers of cross-entropy: which kernel of cross_entropy_kernels.py runs, and with what arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _loss

from . import common
from .common import Launch, supported
from .cross_entropy_kernels import bwd, fwd, join

LABELS = (torch.int64, torch.int32, torch.uint8)
# Elements of a tile, and of a block of a row: 8 to 16 a thread. Programs that a device is given at least, per
# multiprocessor, before rows are left whole.
TILE, BLOCK, LANES = 4096, 4096, 512
SPLIT_BELOW, MOST_SPLITS = 4, 64


def reference(name: str, *args: Any) -> Any:
    return Op.registry[name].implementation("reference")(*args)


def lay_out(x: Tensor, y: Tensor, t: Tensor) -> dict[str, Any] | None:
    """The arguments that tell a kernel where rows and classes lie; None where that takes more than two levels."""
    lead, C = x.shape[:-1], x.shape[-1]
    tensors = {"x": x, "y": y, "t": t}
    strides = [s.stride()[:-1] for s in tensors.values()]
    rows = common.walk_rows(lead, *strides, common.dense_strides(lead))
    if rows is None:
        return None
    steps = [s.stride(-1) if C > 1 else 1 for s in tensors.values()]
    align = 1
    if all(step == 1 for step in steps):
        align = common.alignment(C, *rows.outer_strides[:3], *rows.inner_strides[:3])
    args: dict[str, Any] = {"inner": rows.inner, "R": math.prod(lead), "columns": C // align}
    args |= {"LEVELS": rows.levels, "ALIGN": align}
    each = zip(tensors, steps, rows.outer_strides, rows.inner_strides, strict=False)
    for name, step, outer, inner in each:
        args |= {f"{name}_outer": outer // align, f"{name}_inner": inner // align, f"{name}_step": step}
    return args | {"index_outer": rows.outer_strides[-1], "index_inner": rows.inner_strides[-1]}


def shape_of_tile(C: int, strided: bool) -> tuple[int, int, int]:
    """(rows, classes, warps of 32 threads). Where positions are adjacent they fill a warp."""
    block = min(BLOCK, triton.next_power_of_2(C))
    if strided:
        block = min(block, 32)
    return max(1, TILE // block), block, 8


def common_args(
    t: Tensor, other: Tensor | None, lam: Tensor | None, weight: Tensor | None, C: int, o: _loss.Options
) -> dict[str, Any]:
    soft = t.is_floating_point()
    return {
        "target": t if soft else t.contiguous(),
        "other": None if other is None else other.contiguous(),
        "lam": None if lam is None else lam.contiguous(),
        "weight": None if weight is None else weight.contiguous(),
        "ignore": o.ignore_index,
        "on": o.on,
        "off": o.off,
        "z_loss": o.z_loss,
        "softcap": o.softcap or 1.0,
        "scale": o.scale,
        "CAP": o.softcap != 0,
        "SOFT": soft,
        "ONE_LAM": lam is not None and lam.dim() == 0,
    }  # fmt: skip


def pick(launch_args: dict[str, Any], kernel: Any) -> dict[str, Any]:
    return {name: launch_args[name] for name in kernel.arg_names}


def split_rows(device: torch.device, tiles: int, C: int, block: int) -> tuple[int, int]:
    """(programs that share a row, blocks that each has of it)"""
    splits = 1
    while tiles * splits < SPLIT_BELOW * common.processors(device) and 2 * splits * block < C and splits < MOST_SPLITS:
        splits *= 2
    length = triton.cdiv(triton.cdiv(C, splits), block)
    return triton.cdiv(C, length * block), length


def contractible(o: _loss.Options) -> bool:
    """Else z - top would not be 0 at the maximum, but what scale x was rounded by: see csrc/math/cross_entropy.h."""
    return o.scale == 1


def plan_forward(
    x: Tensor, args: dict[str, Any], losses: Tensor, mass: Tensor, stats: Tensor, o: _loss.Options
) -> list[Launch]:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block, warps = shape_of_tile(C, args["x_step"] != 1)
    tiles = triton.cdiv(R, rows)
    splits, length = split_rows(x.device, tiles, C, block)
    partial = torch.empty((4, R, splits), dtype=torch.float32, device=x.device) if splits > 1 else None
    args = args | {"x": x, "losses": losses, "mass": mass, "stats": stats, "partial": partial, "length": length}
    args |= {"SMOOTH": o.off != 0, "ROWS": rows, "BLOCK": block, "SPLITS": splits, "ONCE": block >= C}
    contract = contractible(o)
    launches = [Launch(fwd, tiles * splits, pick(args, fwd), warps, 65536 // (32 * 2 * warps), contract)]
    if splits > 1:
        parts = triton.next_power_of_2(splits)
        args |= {"ROWS": max(1, 256 // parts), "PARTS": parts}
        launches.append(Launch(join, triton.cdiv(R, args["ROWS"]), pick(args, join), 4, contract=contract))
    return launches


def plan_backward(
    dloss: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    y: Tensor,
    args: dict[str, Any],
    stats: Tensor,
    total: Tensor,
    o: _loss.Options,
) -> Launch:
    R, C = args["R"], args["columns"] * args["ALIGN"]
    rows, block, warps = shape_of_tile(C, args["x_step"] != 1)
    blocks = triton.cdiv(C, block)
    args = args | {"dloss": dloss, "dlse": dlse, "x": x, "y": y, "stats": stats, "total": total}
    args |= {"ONE_DLOSS": o.reduction != 0, "MEAN": o.reduction == 1, "ROWS": rows, "BLOCK": block, "BLOCKS": blocks}
    return Launch(bwd, triton.cdiv(R, rows) * blocks, pick(args, bwd), warps, contract=contractible(o))


def addressable(x: Tensor, y: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """What the kernel works on: the tensors themselves, or dense copies; a dense `y` has to be copied back."""
    soft = t.is_floating_point()
    args = lay_out(x, x if y is None else y, t if soft else x)
    if args is not None:
        return x, y, t, args
    x = x.contiguous()
    y = None if y is None else torch.empty_like(x)
    t = t.contiguous()
    return x, y, t, lay_out(x, x if y is None else y, t if soft else x)


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, other: Tensor | None, lam: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, need_dlogits, need_rank = rest
    o, floats = _loss.Options(*options), [t for t in (target, lam, weight) if t is not None and t.is_floating_point()]
    if not supported("cross_entropy_fwd", logits, *floats):
        return reference("cross_entropy_fwd", logits, target, other, lam, weight, *rest)
    lead, C, R = logits.shape[:-1], logits.shape[-1], math.prod(logits.shape[:-1])
    losses = torch.empty(lead, dtype=torch.float32, device=logits.device)
    mass = torch.empty(R, dtype=torch.float32, device=logits.device)
    stats = torch.empty((3, R), dtype=torch.float32, device=logits.device)
    if R > 0:
        x, _, t, args = addressable(logits, None, target)
        args |= common_args(t, other, lam, weight, C, o)
        args["weight_sum"] = None if weight is None else weight.sum()
        for launch in plan_forward(x, args, losses, mass, stats, o):
            launch(logits.device)
    total = mass.sum()
    loss = losses if o.reduction == 0 else losses.sum() / total if o.reduction == 1 else losses.sum()
    dlogits, rank = logits.new_empty(0), logits.new_empty(0, dtype=torch.int32)
    if need_dlogits:
        ones = torch.ones_like(loss)
        dlogits = cross_entropy_bwd(ones, None, logits, target, other, lam, weight, stats, total, *o)
    if need_rank:
        from fusedtricks.ops.cross_entropy import ranks

        rank = ranks(logits, _loss.Target(target, other, lam), o)
    return loss, stats, total, dlogits, rank


def into(
    y: Tensor, dloss: Tensor, dlse: Tensor | None, logits: Tensor, target: Tensor, other: Tensor | None,
    lam: Tensor | None, weight: Tensor | None, stats: Tensor, total: Tensor, *options: Any,
) -> None:  # fmt: skip
    if logits.numel() == 0:
        return
    o = _loss.Options(*options)
    x, out, t, args = addressable(logits, y, target)
    args |= common_args(t, other, lam, weight, logits.shape[-1], o)
    dlse = None if dlse is None else dlse.contiguous()
    plan_backward(dloss.contiguous(), dlse, x, out, args, stats.contiguous(), total, o)(logits.device)
    if out is not y:
        y.copy_(out)


def cross_entropy_bwd(dloss: Tensor, dlse: Tensor | None, logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    floats = [t for t in (dloss, target, dlse, *rest[1:5]) if t is not None and t.is_floating_point()]
    if not supported("cross_entropy_bwd", logits, *floats):
        return reference("cross_entropy_bwd", dloss, dlse, logits, target, *rest)
    y = torch.empty_like(logits)
    into(y, dloss, dlse, logits, target, *rest)
    return y


def cross_entropy_bwd_(dloss: Tensor, dlse: Tensor | None, logits: Tensor, target: Tensor, *rest: Any) -> None:
    floats = [t for t in (dloss, target, dlse, *rest[1:5]) if t is not None and t.is_floating_point()]
    if not supported("cross_entropy_bwd_", logits, *floats):
        return reference("cross_entropy_bwd_", dloss, dlse, logits, target, *rest)
    into(logits, dloss, dlse, logits, target, *rest)


# ---- for bench/aot.py -----------------------------------------------------------------------------------------------

_CLASSES = {10: "many rows per program, without vectors", 1000: "several rows", 1001: "without vectors", 32000: "loop"}
_WIDE = {128256: "split rows"}


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for one shape of each regime, planned on meta tensors as on an H100."""
    mixed = _loss.Options(-100, 0.9, 1e-4, 0.0, 0.0, 1.0, 1)
    for rows, classes in ((8192, _CLASSES), (16, _WIDE)):
        for C, note in classes.items():
            for dtype in (torch.float32, torch.bfloat16):
                for pair in (False, True) if C == 1000 else (True,):
                    x = torch.empty((rows, C), dtype=dtype, device="meta")
                    labels = torch.empty(rows, dtype=torch.int64, device="meta")
                    losses = torch.empty(rows, device="meta")
                    stats, total = torch.empty((3, rows), device="meta"), torch.empty((), device="meta")
                    other, lam = (labels, losses) if pair else (None, None)
                    args = lay_out(x, x, x) | common_args(labels, other, lam, None, C, mixed) | {"weight_sum": None}
                    label = f"{C} {str(dtype)[6:]} {'pair' if pair else 'hard'}, {note}"
                    first, *rest = plan_forward(x, args, losses, losses, stats, mixed)
                    yield f"forward {label}, stores statistics", first
                    for launch in rest[:1] if dtype == torch.float32 else ():
                        yield f"join {label}, without vectors", launch
                    yield f"backward {label}", plan_backward(total, None, x, x, args, stats, total, mixed)
