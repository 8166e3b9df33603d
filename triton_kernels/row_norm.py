"""Layer and RMS normalization in Triton: which kernel of row_norm_kernels.py runs, and with what arguments.

The launchers of both operators call `forward` and `backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import common
from .common import INTERPRETED, Launch
from .row_norm_kernels import GROUPS, STRIP, bwd_rows, bwd_split, fwd_rows, fwd_split

# ---- choices --------------------------------------------------------------------------------------------------------

# Columns beyond which tiles would spill (bench/aot.py), with vector accesses and without.
FORWARD_COLUMNS = (16384, 8192)
BACKWARD_COLUMNS = (8192, 4096)
# Up to here the weight and the bias stay in registers while a program walks its rows, and the next tile is prefetched.
KEPT_COLUMNS = 8192
VECTOR = 4  # elements of alignment from which on accesses count as vectors
# Warps per multiprocessor: the backward's sums take twice the registers.
FORWARD_WARPS, BACKWARD_WARPS = 32, 16
HELPERS = 32  # programs that share the column sums
STAGES = 2  # tiles in flight per program


def fits(C: int, align: int, columns: tuple[int, int], fused: bool = False) -> bool:
    with_vectors, without = columns
    return (with_vectors if align >= VECTOR else without) // (2 if fused else 1) >= C


class Dropping(NamedTuple):
    """What dropout_add_layer_norm adds to a row norm: forward makes its rows z = dropout(x) + residual; backward adds
    dz to their gradient and drops it. All of these tensors are plain. Nothing of it in a norm alone."""

    seed: Tensor | None = None
    keep: int = 65536
    residual: Tensor | None = None
    z: Tensor | None = None
    dz: Tensor | None = None
    dropped: Tensor | None = None

    def args(self, *tensors: str) -> dict[str, object]:
        given = {name: getattr(self, name) for name in tensors}
        return {**given, "seed": self.seed, "keep": self.keep, "scale": 65536 / max(self.keep, 1)}


ALONE = Dropping()


class Tile(NamedTuple):
    rows: int
    block: int
    warps: int
    programs: int  # per multiprocessor


def register_tile(C: int, align: int, warps: int, fused: bool = False) -> Tile:
    """For so many warps per multiprocessor: at least 4096 elements, several rows where they are short.

    Larger tiles and fewer programs than need be: each program reads the weight once, and in the backward costs one
    partial row. Sixteen elements per thread; eight where each needs its own address, or
    random bits as well.
    """
    block = triton.next_power_of_2(C)
    rows = max(1, 4096 // block)
    mine = min(16, rows * block // (512 if align >= VECTOR and not fused else 256))
    return Tile(rows, block, mine, warps // mine)


class Split(NamedTuple):
    group: int
    rows: int  # at once
    block: int
    warps: int
    ahead: int  # items per multiprocessor between the halves of a group


def forward_split(R: int) -> Split:
    """Items of 4 x 4096 elements, two per multiprocessor: 9 to 17 MB wait in L2 for their writing half."""
    return Split(min(4, triton.next_power_of_2(R)), 1, 4096, 8, 2)


def backward_split(R: int, align: int, itemsize: int) -> Split:
    """A partial row per GROUP rows: many rows and few columns, of as many bytes of x as the forward's items."""
    area = 32768 // itemsize
    group = min(area // 512, triton.next_power_of_2(R))
    block = min(4096, area // group)
    at_once = 2048 if align >= VECTOR else 1024  # elements
    return Split(group, min(group, max(1, at_once // block)), block, 8, 2)


# ---- launches -------------------------------------------------------------------------------------------------------


def describe(tensors: dict[str, Tensor], dims: int) -> dict[str, int] | None:
    """The arguments that tell a kernel where rows lie; None where that takes more than two levels of strides."""
    x = tensors["x"]
    leading = x.shape[: x.dim() - dims]
    strides = [t.stride()[: len(leading)] for t in tensors.values()]
    rows = common.walk_rows(leading, *strides, common.dense_strides(leading))
    if rows is None:
        return None
    C = math.prod(x.shape[len(leading) :])
    align = common.alignment(C, *rows.outer_strides[:-1], *rows.inner_strides[:-1])
    args = {"inner": rows.inner, "R": math.prod(leading), "columns": C // align, "plane": math.prod(leading)}
    args |= {"LEVELS": rows.levels, "ALIGN": align}
    for name, outer, inner in zip(tensors, rows.outer_strides, rows.inner_strides, strict=False):
        args |= {f"{name}_outer": outer // align, f"{name}_inner": inner // align}
    return args | {"stats_outer": rows.outer_strides[-1], "stats_inner": rows.inner_strides[-1]}


def addressable(tensors: dict[str, Tensor], output: str, dims: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What the kernel works on: the tensors themselves where it can address them, dense stand-ins where not.

    A stand-in for the output has to be copied into it afterwards.
    """

    def dense(name: str, t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device) if name == output else t.contiguous()

    def unit(name: str, t: Tensor) -> Tensor:
        if common.unit_columns(t, dims):
            return t
        return dense(name, t) if name == output else common.with_unit_columns(t, dims)

    usable = {name: unit(name, t) for name, t in tensors.items()}
    args = describe(usable, dims)
    if args is None:
        usable = {name: dense(name, t) for name, t in tensors.items()}
        args = describe(usable, dims)
    return usable, args


def row_of(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1).contiguous()


def plan_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    stats: Tensor,
    args: dict[str, int],
    center: bool,
    more: Dropping = ALONE,
) -> Launch:
    R, C, device = args["R"], args["columns"] * args["ALIGN"], x.device
    args = {"x": x, "weight": row_of(weight), "bias": row_of(bias), "y": y, "stats": stats, **args}
    args |= more.args("residual", "z")
    args |= {"eps": eps, "CENTER": center}
    if fits(C, args["ALIGN"], FORWARD_COLUMNS, more.residual is not None):
        tile = register_tile(C, args["ALIGN"], FORWARD_WARPS)
        programs = min(triton.cdiv(R, tile.rows), tile.programs * common.processors(device))
        keep = C <= KEPT_COLUMNS
        args |= {"ROWS": tile.rows, "BLOCK": tile.block, "KEEP": keep, "STAGES": STAGES if keep else 1}
        return Launch(fwd_rows, programs, args, tile.warps, registers=None if keep else 65536 // (32 * tile.warps))
    split = forward_split(R)
    chunks, groups = triton.cdiv(C, split.block), triton.cdiv(R, split.group)
    lag = min(groups, triton.cdiv(split.ahead * common.processors(device), chunks))
    args |= {"partial": torch.empty((4, R, chunks), dtype=torch.float32, device=device)}
    args |= {"used": GROUPS.value + groups, "counters": common.counters(device, GROUPS.value + groups)}
    args |= {"chunks": chunks, "LAG": lag, "GROUP": split.group, "BLOCK": split.block}
    args["LANES"] = common.releasing_lanes(split.warps)
    return Launch(fwd_split, 2 * chunks * (groups + lag), args, split.warps)


def plan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    args: dict[str, int],
    center: bool,
    more: Dropping = ALONE,
) -> Launch:
    R, C, device = args["R"], args["columns"] * args["ALIGN"], x.device
    sums = dweight is not None or dbias is not None
    args = {"dy": dy, "x": x, "weight": row_of(weight), "stats": stats, **args}
    args |= {"dx": dx, "dweight": dweight, "dbias": dbias, **more.args("dz", "dropped")}
    args |= {"dx_outer": args.get("dx_outer", 0), "dx_inner": args.get("dx_inner", 0), "CENTER": center}

    if fits(C, args["ALIGN"], BACKWARD_COLUMNS, more.dropped is not None):
        tile = register_tile(C, args["ALIGN"], BACKWARD_WARPS, more.dropped is not None)
        programs = min(triton.cdiv(R, tile.rows), tile.programs * common.processors(device))
        kernel, warps, parts, groups = bwd_rows, tile.warps, programs, 0
        args |= {"ROWS": tile.rows, "BLOCK": tile.block, "STAGES": STAGES if args["ALIGN"] >= VECTOR else 1}
    else:
        split = backward_split(R, args["ALIGN"], x.element_size())
        halves = 1 if dx is None else 2
        chunks, groups = triton.cdiv(C, split.block), triton.cdiv(R, split.group)
        lag = min(groups, triton.cdiv(split.ahead * common.processors(device), chunks)) if halves == 2 else 0
        programs = halves * chunks * (groups + lag)
        kernel, warps, parts = bwd_split, split.warps, groups
        moments = torch.empty((2, chunks + 1, R), dtype=torch.float32, device=device)
        args |= {"moments": moments, "chunks": chunks, "LAG": lag}
        args |= {"GROUP": split.group, "ROWS": split.rows, "BLOCK": split.block}
    # Waiting programs need running ones beside them. The interpreter runs one program at a time, a device at least one
    # per multiprocessor, of which a slice of a GPU (MIG) has as few as 14.
    most = 1 if INTERPRETED or not sums else min(HELPERS, common.processors(device))
    helpers = max(1, min(triton.cdiv(C, STRIP.value), programs // 4, most))
    used = GROUPS.value + groups
    args |= {"used": used, "helpers": helpers, "LANES": common.releasing_lanes(warps)}
    args["counters"] = common.counters(device, used) if sums or groups else None
    args["partial"] = torch.empty((2, parts, -(-C // 16) * 16), dtype=torch.float32, device=device) if sums else None
    return Launch(kernel, programs, args, warps, registers=65536 // (32 * BACKWARD_WARPS))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    center: bool,
    more: Dropping = ALONE,
) -> tuple[Tensor, Tensor]:
    R = math.prod(x.shape[: x.dim() - dims])
    y = torch.empty_like(x)
    stats = torch.empty((3, R) if center else (R,), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        use, args = addressable({"x": x, "y": y}, "y", dims)
        plan_forward(use["x"], weight, bias, eps, use["y"], stats, args, center, more)(x.device)
        if use["y"] is not y:
            y.copy_(use["y"])
    return y, stats


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dims: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    center: bool,
    more: Dropping = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = x.shape[x.dim() - dims :], stats.dtype if weight is None else weight.dtype
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    make = torch.empty if x.numel() > 0 else torch.zeros  # a sum over no rows is zero
    dweight = make(shape if need_dweight else (0,), dtype=dtype, device=x.device)
    dbias = make(shape if need_dbias else (0,), dtype=dtype, device=x.device)
    if x.numel() > 0 and (need_dx or need_dweight or need_dbias):
        use, args = addressable({"dy": dy, "x": x, **({"dx": dx} if need_dx else {})}, "dx", dims)
        wanted = (t if need else None for t, need in ((dweight, need_dweight), (dbias, need_dbias)))
        launch = plan_backward(
            use["dy"], use["x"], weight, stats.contiguous(), use.get("dx"), *wanted, args, center, more
        )
        launch(x.device)
        if need_dx and use["dx"] is not dx:
            dx.copy_(use["dx"])
    return dx, dweight, dbias


# ---- for bench/aot.py -----------------------------------------------------------------------------------------------

_COLUMNS = {
    64: "many rows per program",
    768: "exact vectors",
    1000: "masked",
    1001: "without vectors",
    4095: "widest backward in registers without vectors",
    8191: "widest forward in registers without vectors",
    8192: "widest backward in registers",
    16384: "widest forward in registers",
    65536: "split rows",
}
_SAME = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
_MIXED = {1000: (torch.bfloat16, torch.float32), 65536: (torch.bfloat16, torch.float32)}


def specialisations(center: bool) -> Iterator[tuple[str, Launch]]:
    """(note, launch) for one shape of each regime and the usual dtypes, planned on meta tensors as on an H100.

    RMS normalization is layer normalization with parts left out: it is listed in bf16 alone.
    """
    for C, note in _COLUMNS.items():
        for dtype, parameter in (*_SAME[not center :], *([_MIXED[C]] if C in _MIXED and center else [])):
            x, y = (torch.empty((4096, C), dtype=dtype, device="meta") for _ in range(2))
            weight = torch.empty(C, dtype=parameter, device="meta")
            stats = torch.empty((3, 4096) if center else (4096,), device="meta")
            bias = torch.empty_like(weight) if center else None
            label = f"{C} {str(dtype)[6:]}/{str(parameter)[6:]}, {note}"
            if "widest backward" not in note:
                args = describe({"x": x, "y": y}, 1)
                yield f"forward {label}", plan_forward(x, weight, bias, 1e-5, y, stats, args, center)
            if "widest forward" not in note:
                args = describe({"dy": y, "x": x, "dx": y}, 1)
                yield f"backward {label}", plan_backward(y, x, weight, stats, y, weight, bias, args, center)
