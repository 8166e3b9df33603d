"""Batch normalization in Triton: launchers, and which kernel of batch_norm_kernels.py runs with what arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _batch_norm as bn

from . import common
from .batch_norm_kernels import GROUPS, apply, bwd_split, bwd_whole, fwd_split, fwd_whole
from .common import Launch, supported

# ---- choices --------------------------------------------------------------------------------------------------------

TILE = 4096  # elements that a program of a split group works on at once
# Elements of a group that one program holds in registers, and how many it may hold where there are few groups.
FORWARD_WHOLE, BACKWARD_WHOLE, FEW_WHOLE = 16384, 8192, 4096
PLANE_TILES, ROW_TILES = 4, 8  # tiles in a chunk; per column of a chunk of rows, four sums go through memory
STRIP, WIDE_STRIP = 64, 128  # columns: of one group, and of one of the strips that make up a group
HELPED = 16  # channels that one program combines, where they are not a strip
SHORT = 128  # planes up to here are walked as rows where they are not aligned
VECTOR = 4  # elements of alignment from which on accesses count as vectors
AHEAD = 2  # chunks per multiprocessor between the halves of a group


class Layout(NamedTuple):
    """A dense tensor is (outer, channels, inner)."""

    outer: int
    channels: int
    inner: int

    @property
    def total(self) -> int:
        return self.outer * self.channels * self.inner

    @property
    def samples(self) -> int:
        return self.outer * self.inner


def layout(y: Tensor) -> Layout:
    """A single channel has nothing outside."""
    outer = inner = 1
    for d, size in enumerate(y.shape):
        if d == 1 or size == 1:
            continue
        if y.shape[1] > 1 and y.stride(d) > y.stride(1):
            outer *= size
        else:
            inner *= size
    return Layout(outer, y.shape[1], inner)


class Lines(NamedTuple):
    """`runs` lines of `length` elements, for each channel where PLANES; see batch_norm_kernels.py."""

    planes: bool
    runs: int
    length: int
    tail: bool
    periods: int  # of channels x inner elements in a row

    @property
    def align(self) -> int:
        return common.alignment(self.length)


def as_planes(x: Layout) -> Lines:
    return Lines(True, x.outer, x.inner, False, 1)


def as_rows(x: Layout, masked: bool) -> Lines:
    """Rows of as many periods as make them a multiple of a vector, if that divides the tensor.

    The bytes of a mask do not care for rows, so these must end with one, even if the last is then shorter.
    """
    period, periods = x.channels * x.inner, 1
    while common.alignment(period * periods) < 16 and x.outer % (2 * periods) == 0:
        periods *= 2
    if masked and period * periods % 8:
        periods = 8 // math.gcd(8, period)
    return Lines(False, -(-x.outer // periods), period * periods, x.outer % periods != 0, periods)


def power(n: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(n))


class Whole(NamedTuple):
    lines: Lines
    rows: int
    block: int
    groups: int


def whole_groups(x: Layout, masked: bool, flat: bool, most: int, device: torch.device) -> Whole | None:
    """The tile of a group that one program holds, where there is one and enough of them fill the device."""
    if not flat and (x.inner >= 8 or (masked and x.inner > 1)):
        lines, rows, block, groups = as_planes(x), power(x.outer), power(x.inner, 8), x.channels
    elif x.inner == 1 and not (masked and x.channels % 8):
        rows = power(x.outer)
        block = min(power(x.channels, 8), max(16, FEW_WHOLE // rows))
        lines, groups = Lines(False, x.outer, x.channels, False, 1), triton.cdiv(x.channels, block)
    else:
        return None
    held = rows * block
    enough = held <= FEW_WHOLE or groups >= common.processors(device)
    return Whole(lines, rows, block, groups) if held <= most and enough else None


class Cut(NamedTuple):
    """Chunks of down x along tiles of rows x block elements, `across` of them side by side in a group."""

    lines: Lines
    rows: int
    block: int
    down: int
    along: int
    across: int
    chunks: int  # per group
    groups: int
    helpers: int
    helped: int


def cut_planes(x: Layout, device: torch.device) -> Cut:
    """Tiles as wide as leaves few of their lanes idle."""
    block = min(TILE, power(x.inner, 8))
    while block > 128 and triton.cdiv(x.inner, block) * block > 1.15 * x.inner:
        block //= 2
    rows = min(TILE // block, power(x.outer))
    beside, below = triton.cdiv(x.inner, block), triton.cdiv(x.outer, rows)
    tiles = max(1, min(PLANE_TILES, beside * below * x.channels // (8 * common.processors(device))))
    along = min(tiles, beside)
    down = min(tiles // along, below) if along == beside else 1
    across = triton.cdiv(beside, along)
    return Cut(as_planes(x), rows, block, down, along, across, triton.cdiv(below, down) * across, x.channels, 1, 1)


def cut_rows(x: Layout, masked: bool, tile: int, device: torch.device) -> Cut:
    lines = as_rows(x, masked)
    apart = lines.periods == 1 and x.inner == 1  # a strip of columns has its channels for itself
    block = min(STRIP if apart else WIDE_STRIP, power(lines.length, 8))
    rows, strips = min(tile // block, power(lines.runs)), triton.cdiv(lines.length, block)
    below = triton.cdiv(lines.runs, rows)
    down = max(1, min(ROW_TILES * TILE // tile, below, below * strips * tile // (8 * TILE * common.processors(device))))
    across = 1 if apart else strips
    helped = block if apart else HELPED
    helpers = 1 if apart else triton.cdiv(x.channels, helped)
    return Cut(
        lines, rows, block, down, 1, across, triton.cdiv(below, down) * across, strips // across, helpers, helped
    )


def cut(x: Layout, masked: bool, flat: bool, device: torch.device, row_tile: int = TILE) -> Cut:
    short = not masked and 1 < x.inner <= SHORT and common.alignment(x.inner) < VECTOR and x.channels > 1
    return cut_rows(x, masked, row_tile, device) if flat or x.inner == 1 or short else cut_planes(x, device)


def is_flat(x: Layout, masked: bool, y: Tensor) -> bool:
    """Do the bits of the mask run through the whole tensor, rather than start anew in each plane?"""
    return masked and bn.mask_rows(y)[1] != x.inner


# ---- launches -------------------------------------------------------------------------------------------------------


def sizes(x: Layout, lines: Lines, rows: int, block: int) -> dict[str, Any]:
    args = {"runs": lines.runs, "units": lines.length // lines.align, "C": x.channels, "inner": x.inner}
    args |= {"total": x.total, "PLANES": lines.planes, "ALIGN": lines.align}
    return args | {"TAIL": lines.tail, "ROWS": rows, "BLOCK": block}


def chunking(c: Cut) -> dict[str, int]:
    return {"across": c.across, "down": c.down, "along": c.along, "chunks": c.chunks}


def tickets(c: Cut, passes: int, device: torch.device) -> tuple[int, dict[str, Any]]:
    """Programs, and the arguments that order them."""
    lag = min(c.groups, triton.cdiv(AHEAD * common.processors(device), c.chunks)) if c.groups > 1 and passes > 1 else 0
    used = GROUPS.value + c.groups
    args = {"helpers": c.helpers, "HELPED": c.helped, "LAG": lag, "used": used}
    args |= {"counters": common.counters(device, used), "LANES": common.releasing_lanes(WARPS)}
    return (passes * c.chunks + c.helpers) * (c.groups + lag), args


WARPS, REGISTERS = 8, 128  # per program, per thread: two programs a multiprocessor


def warps(whole: Whole, passes: int) -> int:
    """Of a program that holds a whole group: 32 elements a thread; 16 where each needs its own address."""
    elements = passes * whole.rows * whole.block
    return max(4, min(16, elements // (1024 if whole.lines.align >= VECTOR else 512)))


def columns(c: Cut, x: Layout) -> int:
    """Elements of one kind of partial sums."""
    return c.chunks * x.channels if c.lines.planes else c.chunks // c.across * c.lines.length


def plan_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    y: Tensor | None,
    signs: Tensor | None,
    stats: Tensor,
) -> Launch:
    shape, masked, device = layout(x), signs is not None, x.device
    flat = is_flat(shape, masked, x)
    args = {"x": x, "residual": residual, "weight": weight, "bias": bias, "y": y, "signs": signs, "stats": stats}
    args |= dict(zip(("running_mean", "running_var", "tracked"), running, strict=True))
    args |= {"momentum": momentum, "eps": eps, "slope": slope, "ACTIVATION": activation, "samples": shape.samples}
    if whole := whole_groups(shape, masked, flat, FORWARD_WHOLE, device):
        args |= sizes(shape, *whole[:3])
        return Launch(fwd_whole, whole.groups, args, warps(whole, 1))
    c = cut(shape, masked, flat, device)
    programs, order = tickets(c, 1 if y is None else 2, device)
    args |= sizes(shape, *c[:3]) | chunking(c) | order
    args["partial"] = torch.empty((4, columns(c, shape)), dtype=torch.float32, device=device)
    return Launch(fwd_split, programs, args, WARPS, REGISTERS)


def plan_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rest: Tensor | None,
    var: Tensor,
    eps: float,
    activation: int,
    slope: float,
    y: Tensor,
    signs: Tensor | None,
    stats: Tensor,
) -> Launch:
    shape, masked = layout(x), signs is not None
    c = cut(shape, masked, is_flat(shape, masked, x), x.device)
    args = {"x": x, "residual": residual, "weight": weight, "bias": bias, "mean": mean, "rest": rest, "var": var}
    args |= {"y": y, "signs": signs, "stats": stats, "eps": eps, "slope": slope, "ACTIVATION": activation}
    return Launch(apply, c.groups * c.chunks, args | sizes(shape, *c[:3]) | chunking(c), WARPS)


def plan_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    signs: Tensor | None,
    given: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Launch:
    shape, masked, device = layout(x), signs is not None, x.device
    flat = is_flat(shape, masked, x)
    later = training and dx is not None and given is None
    sums = later or dweight is not None or dbias is not None
    args = {"dy": dy, "x": x, "residual": residual, "weight": weight, "bias": bias, "stats": stats, "signs": signs}
    args |= {"given": given, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias, "slope": slope}
    args |= {"ACTIVATION": activation, "TRAINING": training, "samples": shape.samples}
    whole = whole_groups(shape, masked, flat, BACKWARD_WHOLE, device)
    if sums and whole:
        args |= sizes(shape, *whole[:3])
        return Launch(bwd_whole, whole.groups, args, warps(whole, 2))
    c = cut(shape, masked, flat, device, TILE // 4 * x.element_size())  # registers: sums and a vector per column
    programs, order = (
        c.groups * c.chunks,
        {"counters": None, "helpers": 0, "HELPED": 1, "LAG": 0, "used": 0, "LANES": 0},
    )
    if sums:
        programs, order = tickets(c, 2 if later else 1, device)
    args |= sizes(shape, *c[:3]) | chunking(c) | order | {"SUMS": sums, "LATER": later}
    args["means"] = torch.empty((2, shape.channels), dtype=torch.float32, device=device) if later else None
    args["partial"] = torch.empty((2, columns(c, shape)), dtype=torch.float32, device=device) if sums else None
    return Launch(bwd_split, programs, args, WARPS, REGISTERS)


# ---- launchers ------------------------------------------------------------------------------------------------------


def dense(t: Tensor | None, like: Tensor) -> Tensor | None:
    """`t` with the strides of `like`, copied only if need be."""
    if t is None or all(a == b or size == 1 for a, b, size in zip(t.stride(), like.stride(), t.shape, strict=True)):
        return t
    return torch.empty_like(like).copy_(t)


def countable(x: Tensor) -> bool:
    """Has x elements, and lines of a length that 32 bits count? A single channel may be longer than that."""
    n = x.numel()
    return n > 0 and (n < 2**30 or layout(torch.empty_like(x, device="meta")).inner < 2**30)


def unit(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def mask_like(y: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return y.new_empty(0, dtype=torch.uint8)
    rows, columns = bn.mask_rows(y)
    return y.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)


def batch_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    need_y: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    served = supported("batch_norm_fwd", x, residual, weight, bias, running_mean, running_var)
    if not served or not countable(x):
        return Op.registry["batch_norm_fwd"].implementation("reference")(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            activation,
            slope,
            need_y,
            need_mask,
        )
    y = torch.empty_like(x)
    stats = torch.empty((4, x.shape[1]), dtype=torch.float32, device=x.device)
    signs = mask_like(y, need_y and need_mask)
    averages = tuple(unit(t) for t in (running_mean, running_var))
    if momentum is None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    plan_forward(
        dense(x, y),
        dense(residual, y) if need_y else None,
        unit(weight),
        unit(bias),
        (*averages, num_batches_tracked),
        momentum,
        eps,
        activation,
        slope,
        y if need_y else None,
        signs if signs.numel() else None,
        stats,
    )(x.device)
    for given, used in zip((running_mean, running_var), averages, strict=True):
        if used is not given:
            given.copy_(used)
    return y if need_y else x.new_empty(0), stats, signs


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rest: Tensor | None,
    var: Tensor,
    eps: float,
    activation: int,
    slope: float,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not supported("batch_norm_apply", x, residual, weight, bias, mean, rest, var) or not countable(x):
        return Op.registry["batch_norm_apply"].implementation("reference")(
            x, residual, weight, bias, mean, rest, var, eps, activation, slope, need_mask
        )
    y = torch.empty_like(x)
    stats = torch.empty((4, x.shape[1]), dtype=torch.float32, device=x.device)
    signs = mask_like(y, need_mask)
    plan_apply(
        dense(x, y),
        dense(residual, y),
        *(unit(t) for t in (weight, bias, mean, rest, var)),
        eps,
        activation,
        slope,
        y,
        signs if need_mask else None,
        stats,
    )(x.device)
    return y, stats, signs


def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    sums: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_dx, need_dresidual, need_dweight, need_dbias)
    if not supported("batch_norm_bwd", x, dy, residual, weight, bias, stats, sums) or not countable(x):
        return Op.registry["batch_norm_bwd"].implementation("reference")(
            dy, x, residual, weight, bias, stats, mask, sums, training, activation, slope, *need
        )
    like, dtype = torch.empty_like(x), stats.dtype if weight is None else weight.dtype
    dx = like if need_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dweight, dbias = (x.new_empty(x.shape[1] if n else 0, dtype=dtype) for n in need[2:])
    if any(need):
        again = mask is None and activation != bn.IDENTITY
        plan_backward(
            dense(dy, like),
            dense(x, like),
            dense(residual, like) if again else None,
            unit(weight),
            unit(bias) if again else None,
            unit(stats),
            unit(mask),
            unit(sums),
            training,
            activation,
            slope,
            *(t if n else None for t, n in zip((dx, dresidual, dweight, dbias), need, strict=True)),
        )(x.device)
    return dx, dresidual, dweight, dbias


# ---- for bench/aot.py -----------------------------------------------------------------------------------------------

_BOTH = (torch.float32, torch.bfloat16)
_SHAPES = {
    (64, 256, 56, 56): "planes",
    (64, 256, 16, 16): "planes, one program each",
    (64, 2048, 7, 7): "planes, one program each, without vectors",
    (1024, 512, 7, 7): "planes as rows",
    (200704, 64): "rows",
    (512, 4096): "rows, one program each",
    (401408, 3): "narrow rows",
}


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for one shape of each regime and the usual dtypes, planned on meta tensors as on an H100."""
    none = (None, None, None)
    for shape, note in _SHAPES.items():
        for dtype in _BOTH if note in ("planes", "rows") else _BOTH[1:]:
            x = torch.empty(shape, dtype=dtype, device="meta")
            weight, mean, var = torch.empty((3, shape[1]), device="meta").unbind()
            stats, tracked = (
                torch.empty((4, shape[1]), device="meta"),
                torch.empty((), dtype=torch.int64, device="meta"),
            )
            label = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}, {note}"
            running = (mean, var, tracked)
            yield (
                f"forward {label}",
                plan_forward(x, None, weight, weight, running, 0.1, 1e-5, bn.RELU, 0.0, x, None, stats),
            )
            yield (
                f"backward {label}",
                plan_backward(
                    x, x, None, weight, weight, stats, None, None, True, bn.RELU, 0.0, x, None, weight, weight
                ),
            )
            if note not in ("planes", "rows") or dtype == torch.float32:
                continue
            signs = mask_like(x, True)
            yield (
                f"forward {label}, added",
                plan_forward(x, x, weight, weight, none, None, 1e-5, bn.RELU, 0.0, x, signs, stats),
            )
            yield (
                f"backward {label}, added",
                plan_backward(x, x, None, weight, None, stats, signs, None, True, bn.RELU, 0.0, x, x, weight, weight),
            )
            yield (
                f"backward {label}, gelu",
                plan_backward(x, x, x, weight, weight, stats, None, None, True, bn.GELU, 0.0, x, x, weight, weight),
            )
            yield (
                f"evaluation {label}",
                plan_apply(x, None, weight, weight, mean, None, var, 1e-5, bn.RELU, 0.0, x, None, stats),
            )
