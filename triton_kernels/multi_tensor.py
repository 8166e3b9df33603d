"""One optimizer step over all parameters: kernels, and what the launchers of the optimizers share.

Tensors are reached through the addresses in the table (fusedtricks/ops/_table.py), laid end to end and cut into equal
tiles, a program a tile. Everything that may change between steps is read from the device, so that captured graphs obey
later changes. Clipping takes a launch before, which leaves sums of squares that every program adds in the same order.
A rule is some device functions, `prepare` for the scalars of a step and `update` for its elements, as in csrc/math.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _table

from . import philox
from .common import Launch, supported

TILE = 8192  # elements
NORM_PROGRAMS = 256  # on any device, so that the norm has the same bits
NORM_BLOCK = 2048
WARPS, NORM_WARPS = 4, 8
TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)  # as _table.DTYPES

NUMEL, GROUP, FLAGS = (tl.constexpr(c) for c in (_table.NUMEL, _table.GROUP, _table.FLAGS))
PARAM, GRAD, STATE = (tl.constexpr(c) for c in (_table.PARAM, _table.GRAD, _table.STATE))
MASTER, EMA, STEP = (tl.constexpr(c) for c in (_table.MASTER, _table.EMA, _table.STEP))
FACTOR, STREAM, START = (tl.constexpr(c) for c in (_table.FACTOR, _table.STREAM, _table.START))
COLUMNS, HYPERS = tl.constexpr(_table.COLUMNS), tl.constexpr(_table.HYPERS)
LR, WEIGHT_DECAY, EPS = (tl.constexpr(c) for c in (_table.LR, _table.WEIGHT_DECAY, _table.EPS))
MAXIMIZE, DECOUPLED, RULE0 = (tl.constexpr(c) for c in (_table.MAXIMIZE, _table.DECOUPLED, _table.RULE))
EMA_DECAY, SEED = tl.constexpr(_table.EMA_DECAY), tl.constexpr(_table.SEED)
FIRST_MOMENTUM, STEP_FLOAT64 = tl.constexpr(_table.FIRST_MOMENTUM), tl.constexpr(_table.STEP_FLOAT64)
REMAINDER, STOCHASTIC = tl.constexpr(_table.REMAINDER), tl.constexpr(_table.STOCHASTIC)

# While a kernel runs, the upper bits of a row's progress count the programs that have read its step; the last one to
# read advances it. Between launches they are zero.
READ = tl.constexpr(1 << 40)


# ---- arithmetic that rules share -------------------------------------------------------------------------------------


@triton.jit
def power(base, exponent):
    """base^exponent for 0 <= base, in float64."""
    return tl.where(base > 0, tl.exp2(exponent * tl.log2(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def decays(h):
    """Factors of the parameter in the gradient (coupled) and beside the update (decoupled)."""
    decay = tl.load(h + WEIGHT_DECAY)
    decoupled = tl.load(h + DECOUPLED) != 0
    return tl.where(decoupled, 0.0, decay).to(tl.float32), tl.where(decoupled, tl.load(h + LR) * decay, 0.0).to(
        tl.float32
    )


@triton.jit
def lerp(start, end, weight, rest):
    """start + weight (end - start), from whichever end is nearer; `rest` is 1 - weight."""
    return tl.where(weight < 0.5, start + weight * (end - start), end + rest * (start - end))


@triton.jit
def lerp_squares(start, g, weight, rest):
    """The same from an average of squares to g^2. Where that overflows, its share may not; infinity stays infinity."""
    average = lerp(start, g * g, weight, rest)
    return tl.where(average < float("inf"), average, rest * start + weight * g * g)


@triton.jit
def with_decay(u, p, decay):
    """`u` and what decoupled weight decay takes from p: nothing from infinite weights, which stay."""
    return tl.where(tl.abs(p) < float("inf"), u + decay * p, u)


@triton.jit
def larger(a, b):
    """NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


# ---- weights of more bits than the parameter -------------------------------------------------------------------------


@triton.jit
def bits_of(v):
    return tl.where(v == v, v.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def shown(v):
    """fp32 as bfloat16, rounded with ties away from zero."""
    return ((bits_of(v) + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def with_remainder(upper, lower):
    """fp32 from what `shown` gave and the 16 bits that it lacks, whose sign tells which way it was rounded."""
    low = lower.to(tl.uint32) & 0xFFFF
    return ((upper.to(tl.float32).to(tl.uint32, bitcast=True) - ((low >> 15) << 16)) | low).to(tl.float32, bitcast=True)


@triton.jit
def round_stochastically(v, seed, stream, first, BLOCK: tl.constexpr):
    """fp32 to bfloat16, up with the probability of what is cut off. `first` is a multiple of 8."""
    random = tl.reshape(philox.random16x8(seed, first // 8 + tl.arange(0, BLOCK // 8), stream), [BLOCK])
    bits = v.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, (bits + random) & 0xFFFF0000, bits_of(v))
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


# ---- the table -------------------------------------------------------------------------------------------------------


@triton.jit
def find(table, rows, element):
    """The last row that starts before this element, or the first row."""
    low, high = tl.cast(0, tl.int64), tl.cast(rows, tl.int64)
    base = tl.load(table + START)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS + START) - base < element
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def tiles_of(table, row, tiles, TILE: tl.constexpr):
    """First element and number of elements of a row, and the first and last tile it is in, empty or not."""
    start = tl.load(table + row * COLUMNS + START) - tl.load(table + START)
    n = tl.load(table + row * COLUMNS + NUMEL)
    first = tl.minimum(start // TILE, tiles - 1)
    return start, n, first, tl.maximum((start + n - 1) // TILE, first)


@triton.jit
def address(row, column):
    return tl.load(row + column)


@triton.jit
def pointer(at, first, T: tl.constexpr, ALIGNED: tl.constexpr):
    """To element `first` of a tensor of T; ALIGNED: to 16 bytes."""
    p = at.to(tl.pointer_type(T)) + first
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def inside(first, begin, end, BLOCK: tl.constexpr):
    """Which of the elements from `first` on are in begin .. end."""
    at = tl.arange(0, BLOCK)
    return (at >= tl.maximum(begin - first, 0).to(tl.int32)) & (at < tl.minimum(end - first, BLOCK).to(tl.int32))


# ---- clipping --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_row", "rows", "tiles", "programs"])
def square_gradients(
    table, sums, first_row, rows, tiles, programs, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Program i leaves the sum of squares of tiles i, i + programs, ..."""
    table += first_row * COLUMNS
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(tl.program_id(0), tiles, programs):
        row = find(table, rows, tl.cast(tile, tl.int64) * TILE)
        going = True
        while going:
            start, n, first, _last = tiles_of(table, row, tiles, TILE)
            going = first <= tile
            if going:
                begin = tl.maximum(tl.cast(tile, tl.int64) * TILE - start, 0)
                end = tl.minimum((tl.cast(tile, tl.int64) + 1) * TILE - start, n)
                grad = tl.load(table + row * COLUMNS + GRAD)
                aligned = grad % 16 == 0
                for block in range(begin // 8 * 8, end, BLOCK):
                    at = tl.multiple_of(tl.cast(block, tl.int64), 8)
                    if aligned & (at >= begin) & (at + BLOCK <= end):
                        g = tl.load(pointer(grad, at, P, True) + tl.arange(0, BLOCK)).to(tl.float64)
                    else:
                        mask = inside(at, begin, end, BLOCK)
                        g = tl.load(pointer(grad, at, P, False) + tl.arange(0, BLOCK), mask=mask, other=0)
                        g = g.to(tl.float64)
                    total += g * g
                row += 1
                going = row < rows
    tl.store(sums + tl.program_id(0), tl.sum(total))


# ---- the step --------------------------------------------------------------------------------------------------------


@triton.jit
def read_scalar(at, wide):
    """A 0-dim state in float32, or in float64, or 0 where there is none.

    An atomic, because one thread does it and hands the value to all: no other reads it after this program has counted.
    """
    narrow = tl.atomic_add(at.to(tl.pointer_type(tl.float32)), 0.0, mask=(at != 0) & (wide == 0), sem="relaxed")
    double = tl.atomic_add(
        at.to(tl.pointer_type(tl.float64)), tl.cast(0.0, tl.float64), mask=(at != 0) & (wide != 0), sem="relaxed"
    )
    return tl.where(at == 0, 0.0, tl.where(wide != 0, double, narrow.to(tl.float64)))


@triton.jit
def write_scalar(at, wide, value, last):
    tl.store(at.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=last & (at != 0) & (wide == 0))
    tl.store(at.to(tl.pointer_type(tl.float64)), value, mask=last & (at != 0) & (wide != 0))


@triton.jit
def elements(
    row, h, c, used, first, begin, end, write, unscale, factor, t,
    UPDATE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a row from `first` on. FULL: all of them exist, at addresses of a multiple of 16 bytes."""
    p_at, g_at, m_at, e_at = address(row, PARAM), address(row, GRAD), address(row, MASTER), address(row, EMA)
    s0_at, s1_at, s2_at = address(row, STATE), address(row, STATE + 1), address(row, STATE + 2)
    flags = tl.load(row + FLAGS)
    at = tl.arange(0, BLOCK)
    here = first >= 0 if FULL else inside(first, begin, end, BLOCK)
    has0, has1, has2 = here & ((used & 1) != 0), here & ((used & 2) != 0), here & ((used & 4) != 0)
    has_ema = here & (e_at != 0)
    param, grad = pointer(p_at, first, P, FULL) + at, pointer(g_at, first, P, FULL) + at
    state0, state1 = pointer(s0_at, first, S, FULL) + at, pointer(s1_at, first, S, FULL) + at
    state2, ema = pointer(s2_at, first, S, FULL) + at, pointer(e_at, first, tl.float32, FULL) + at

    stored = tl.load(grad, mask=here, other=0).to(tl.float32)
    s0 = tl.load(state0, mask=has0, other=0).to(tl.float32)
    s1 = tl.load(state1, mask=has1, other=0).to(tl.float32)
    s2 = tl.load(state2, mask=has2, other=0).to(tl.float32)
    if tl.float32 == P:
        weight = tl.load(param, mask=here, other=0)
    else:
        is_remainder = (flags & REMAINDER) != 0
        has_master, has_rest = here & (m_at != 0) & (is_remainder == 0), here & is_remainder
        master, rest = pointer(m_at, first, tl.float32, FULL) + at, pointer(m_at, first, tl.int16, FULL) + at
        narrow = tl.load(param, mask=here & (has_master == 0), other=0)
        weight = tl.where(has_master, tl.load(master, mask=has_master, other=0), narrow.to(tl.float32))
        if tl.bfloat16 == P:
            lower = tl.load(rest, mask=has_rest, other=0)
            weight = tl.where(has_rest, with_remainder(narrow, lower), weight)
    average = tl.load(ema, mask=has_ema, other=0)

    g = stored * factor
    g = tl.where(tl.load(h + MAXIMIZE) != 0, -g, g)
    u, s0, s1, s2 = UPDATE(weight, g, s0, s1, s2, c)
    weight = weight - u

    if write:
        tl.store(grad, (stored * unscale).to(P), mask=here)
    tl.store(state0, s0.to(S), mask=has0)
    tl.store(state1, s1.to(S), mask=has1)
    tl.store(state2, s2.to(S), mask=has2)
    decay = tl.load(h + EMA_DECAY)
    tl.store(ema, lerp(average, weight, (1 - decay).to(tl.float32), decay.to(tl.float32)), mask=has_ema)
    if tl.float32 == P:
        tl.store(param, weight, mask=here)
    else:
        rounded = weight.to(P)
        tl.store(master, weight, mask=has_master)
        if tl.bfloat16 == P:
            tl.store(rest, bits_of(weight).to(tl.uint16).to(tl.int16, bitcast=True), mask=has_rest)
            rounded = tl.where(has_rest | has_master, shown(weight), rounded)
            if (flags & STOCHASTIC) != 0:
                seed = tl.load(h + SEED).to(tl.int64) + t.to(tl.int64)
                random = round_stochastically(weight, seed, tl.load(row + STREAM), first, BLOCK)
                rounded = tl.where(m_at == 0, random, rounded)
        tl.store(param, rounded, mask=here)


@triton.jit(do_not_specialize=["first_row", "rows", "tiles", "report", "parts", "max_high", "max_low"])
def update_tensors(
    table, progress, hyper, outcome, grad_scale, found_inf, norm, sums, parts, max_high, max_low,
    first_row, rows, tiles, report,
    PREPARE: tl.constexpr, UPDATE: tl.constexpr, USES: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    CLIP: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    unscale = tl.cast(1.0, tl.float64)
    if grad_scale is not None:
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    factor, total = unscale, tl.cast(0.0, tl.float64)
    if CLIP:
        if norm is not None:
            total = tl.load(norm).to(tl.float64)
        else:
            part = tl.arange(0, PARTS)
            total = tl.sqrt(tl.sum(tl.load(sums + part, mask=part < parts, other=0))) * tl.abs(unscale)
        # As torch.nn.utils.clip_grad_norm_. Arguments are float32, so the maximum comes in two of them.
        clip = (tl.cast(max_high, tl.float64) + tl.cast(max_low, tl.float64)) / (total + 1e-6)
        factor *= tl.where((clip < 1) | (clip != clip), clip, 1.0)
    skip = False
    if found_inf is not None:
        skip = tl.load(found_inf) != 0
    reports = (tile == 0) & (report != 0)
    if CLIP:
        tl.store(outcome, total.to(tl.float32), mask=reports)
    tl.store(outcome + 1, tl.where(skip, 1.0, 0.0), mask=reports)

    table += first_row * COLUMNS
    progress += first_row
    row = find(table, rows, tl.cast(tile, tl.int64) * TILE)
    going = tl.cast(skip, tl.int1) == 0
    while going:
        start, n, first_tile, last_tile = tiles_of(table, row, tiles, TILE)
        going = first_tile <= tile
        if going:
            if tile <= last_tile:
                cells = table + row * COLUMNS
                h = hyper + tl.load(cells + GROUP) * HYPERS
                flags = tl.load(cells + FLAGS)
                wide = flags & STEP_FLOAT64
                step_at, factor_at = address(cells, STEP), address(cells, FACTOR)
                written = read_scalar(step_at, wide)
                product = tl.where(factor_at != 0, read_scalar(factor_at, wide), 1.0)
                before = tl.atomic_add(progress + row, READ, sem="acq_rel")
                is_last = before // READ == last_tile - first_tile
                counted = (before % READ).to(tl.float64)
                same = tl.where(wide != 0, counted == written, counted.to(tl.float32).to(tl.float64) == written)
                t = tl.where((step_at == 0) | same, counted, written) + 1
                c, product = PREPARE(h, t, ((flags & FIRST_MOMENTUM) != 0) & (counted == 0), product)
                tl.store(progress + row, tl.maximum(t, 0).to(tl.int64), mask=is_last)
                write_scalar(step_at, wide, t, is_last)
                write_scalar(factor_at, wide, product, is_last)

                used = USES(h)
                begin = tl.maximum(tl.cast(tile, tl.int64) * TILE - start, 0)
                end = tl.minimum((tl.cast(tile, tl.int64) + 1) * TILE - start, n)
                together = address(cells, PARAM) | address(cells, GRAD) | address(cells, MASTER) | address(cells, EMA)
                together |= address(cells, STATE) | address(cells, STATE + 1) | address(cells, STATE + 2)
                aligned = together % 16 == 0
                write: tl.constexpr = grad_scale is not None
                narrow_unscale, narrow_factor = unscale.to(tl.float32), factor.to(tl.float32)
                for block in range(begin // 8 * 8, end, BLOCK):
                    at = tl.multiple_of(tl.cast(block, tl.int64), 8)
                    if aligned & (at >= begin) & (at + BLOCK <= end):
                        elements(cells, h, c, used, at, begin, end, write, narrow_unscale, narrow_factor, t,
                                 UPDATE, P, S, BLOCK, True)  # fmt: skip
                    else:
                        elements(cells, h, c, used, at, begin, end, write, narrow_unscale, narrow_factor, t,
                                 UPDATE, P, S, BLOCK, False)  # fmt: skip
            row += 1
            going = row < rows


# ---- launchers -------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Device functions: prepare(h, t, first, factor), update(p, g, s0, s1, s2, scalars), uses(h) as bits of states."""

    prepare: Any
    update: Any
    uses: Any


class Segment(NamedTuple):
    """Rows of one kind."""

    kind: int
    first: int
    rows: int
    elements: int

    @property
    def tiles(self) -> int:
        return max(triton.cdiv(self.elements, TILE), 1)

    @property
    def block(self) -> int:
        """Elements at once: what gives every thread one vector of each tensor of the parameter's dtype."""
        return 32 * WARPS * (4 if self.dtypes[0] == tl.float32 else 8)

    @property
    def dtypes(self) -> tuple[Any, Any]:
        return TYPES[self.kind % 4], TYPES[self.kind // 4]


def plan_norm(segment: Segment, table: Tensor, sums: Tensor) -> Launch:
    programs = min(segment.tiles, NORM_PROGRAMS)
    args = {"table": table, "sums": sums, "first_row": segment.first, "rows": segment.rows, "tiles": segment.tiles}
    args |= {"programs": programs, "P": segment.dtypes[0], "TILE": TILE, "BLOCK": NORM_BLOCK}
    return Launch(square_gradients, programs, args, NORM_WARPS)


def plan(
    rule: Rule,
    segment: Segment,
    table: Tensor,
    progress: Tensor,
    hyper: Tensor,
    outcome: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    norm: Tensor | None = None,
    max_norm: float | None = None,
    sums: Tensor | None = None,
    report: bool = True,
) -> Launch:
    high = torch.tensor(max_norm or 0.0, dtype=torch.float64).float().item()
    parts = 0 if sums is None else sums.numel()
    P, S = segment.dtypes
    args = {"table": table, "progress": progress, "hyper": hyper, "outcome": outcome, "grad_scale": grad_scale}
    args |= {"found_inf": found_inf, "norm": norm, "sums": sums, "parts": parts, "max_high": high}
    args |= {"max_low": (max_norm or 0.0) - high if high < float("inf") else 0.0}
    args |= {"first_row": segment.first, "rows": segment.rows, "tiles": segment.tiles, "report": int(report)}
    args |= {"PREPARE": rule.prepare, "UPDATE": rule.update, "USES": rule.uses, "P": P, "S": S}
    args |= {"CLIP": max_norm is not None, "PARTS": triton.next_power_of_2(max(parts, NORM_PROGRAMS))}
    args |= {"TILE": TILE, "BLOCK": segment.block}
    # All of them: left to itself, ptxas spills a few to fit one more program.
    return Launch(update_tensors, segment.tiles, args, WARPS, registers=255)


def launcher(name: str, rule: Rule) -> Callable[..., None]:
    """The operator of a rule."""

    def step(
        table: Tensor,
        segments: Tensor,
        progress: Tensor,
        hyper: Tensor,
        outcome: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: Tensor | None,
        max_norm: float | None,
    ) -> None:
        given = (table, segments, progress, hyper, outcome, grad_scale, found_inf, norm, max_norm)
        runs = [Segment(*cells) for cells in segments.tolist()]
        if not supported(name, outcome) or any(tl.float64 in run.dtypes for run in runs) or not runs:
            return Op.registry[name].implementation("reference")(*given)
        device, sums = table.device, None
        if max_norm is not None and norm is None:
            programs = [min(run.tiles, NORM_PROGRAMS) for run in runs]
            sums = torch.empty(sum(programs), dtype=torch.float64, device=device)
            for run, part in zip(runs, sums.split(programs), strict=True):
                plan_norm(run, table, part)(device)
        for i, run in enumerate(runs):
            rest = (grad_scale, found_inf, norm, max_norm, sums, i == 0)
            plan(rule, run, table, progress, hyper, outcome, *rest)(device)
        return None

    step.__name__ = name
    return step


def specialisations(rule: Rule, *, with_norm: bool = False) -> Iterator[tuple[str, Launch]]:
    """(note, launch) for the usual kinds, planned on meta tensors."""
    meta = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    table, progress = meta(160, _table.COLUMNS, dtype=torch.int64), meta(160, dtype=torch.int64)
    hyper, outcome = meta(2, _table.HYPERS, dtype=torch.float64), meta(2, dtype=torch.float32)
    one, sums = meta(1, dtype=torch.float32), meta(256, dtype=torch.float64)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for dtype, moments in ((fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp32)):
        segment = Segment(_table.KINDS[dtype, moments], 0, 160, 10**8)
        name = f"{str(dtype)[6:]}, moments {str(moments)[6:]}"
        full = {"grad_scale": one, "found_inf": one, "max_norm": 1.0, "sums": sums} if dtype == bf16 else {}
        yield name, plan(rule, segment, table, progress, hyper, outcome, **full)
        if with_norm and moments == fp32:
            yield f"norm of {str(dtype)[6:]} gradients, stores statistics", plan_norm(segment, table, sums)
