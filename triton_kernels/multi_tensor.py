"""One optimizer step over all parameters of a device: the kernels that the five rules share, and their launcher.

Tensors are reached through the table of addresses that csrc/math/optimizer.h describes. A program takes tiles of TILE
elements; it computes the scalars of its row itself, from the step in memory, so a launch needs nothing from the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _table
from fusedtricks.ops._shard import TILE

from . import common, philox
from .common import Launch

constant = tl.constexpr
NUMEL, GROUP, FLAGS, PARAM, GRAD, STATE = map(
    constant, (_table.NUMEL, _table.GROUP, _table.FLAGS, _table.PARAM, _table.GRAD, _table.STATE)
)
MASTER, EMA, STEP, FACTOR, STREAM, START = map(
    constant, (_table.MASTER, _table.EMA, _table.STEP, _table.FACTOR, _table.STREAM, _table.START)
)
COLUMNS, HYPERS, MAXIMIZE, EMA_DECAY, SEED = map(
    constant, (_table.COLUMNS, _table.HYPERS, _table.MAXIMIZE, _table.EMA_DECAY, _table.SEED)
)
LR, WEIGHT_DECAY, EPS, DECOUPLED, RULE = map(
    constant, (_table.LR, _table.WEIGHT_DECAY, _table.EPS, _table.DECOUPLED, _table.RULE)
)
FIRST_MOMENTUM, STEP_FLOAT64, REMAINDER, STOCHASTIC = map(
    constant, (_table.FIRST_MOMENTUM, _table.STEP_FLOAT64, _table.REMAINDER, _table.STOCHASTIC)
)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK, WARPS, PROGRAMS = 1024, 4, 8  # elements at once, warps, programs a multiprocessor


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def lerp(start, end, weight, rest):
    """start + weight (end - start), from whichever end is nearer; `rest` is 1 - weight."""
    return tl.where(weight < 0.5, start + weight * (end - start), end + rest * (start - end))


@triton.jit
def lerp_squares(start, end, weight, rest):
    """The same for squares, which may have overflowed: infinity stays infinity."""
    return tl.where(start < float("inf"), lerp(start, end, weight, rest), start + end)


@triton.jit
def larger(a, b):
    """NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def power(base, exponent):
    """In double; 0^0 is 1."""
    return tl.where(base > 0, tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def decays(h):
    """Factors of the parameter in the gradient (coupled) and beside the update (decoupled)."""
    decay, decoupled = tl.load(h + WEIGHT_DECAY), tl.load(h + DECOUPLED) != 0
    return tl.where(decoupled, 0.0, decay).to(tl.float32), tl.where(decoupled, tl.load(h + LR) * decay, 0.0).to(
        tl.float32
    )


@triton.jit
def load_scalar(row, column, flags):
    """A 0-dim state, float32 or, where that is the default dtype, float64; 0 where there is none."""
    address = tl.load(row + column)
    wide = (flags & STEP_FLOAT64) != 0
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & ~wide, other=0.0)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & wide, other=0.0)
    return tl.where(wide, double, single.to(tl.float64))


@triton.jit
def store_scalar(row, column, flags, value):
    address = tl.load(row + column)
    wide = (flags & STEP_FLOAT64) != 0
    tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=(address != 0) & ~wide)
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask=(address != 0) & wide)


@triton.jit
def steps_before(row, flags, progress):
    """Steps taken, exact where float32 is not: the count, unless somebody changed what it was written to."""
    counted = tl.load(progress).to(tl.float64)
    stored = load_scalar(row, STEP, flags)
    same = tl.where((flags & STEP_FLOAT64) != 0, counted == stored, counted.to(tl.float32) == stored.to(tl.float32))
    return tl.where((tl.load(row + STEP) == 0) | same, counted, stored)


@triton.jit
def row_of(table, count, tile, TILE: tl.constexpr):
    """The row that a tile belongs to: the last that starts at or before it."""
    low, high = tl.cast(0, tl.int64), tl.cast(count, tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS + START) <= tile * TILE
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def upper_half(weight):
    """Rounded to 16 bits with ties away from zero, and the 16 bits left over, as int16."""
    bits = tl.where(weight == weight, weight, float("nan")).to(tl.uint32, bitcast=True)
    return ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), bits.to(tl.uint16).to(
        tl.int16, bitcast=True
    )


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def sum_squares(
    table, count, tiles, squares, FIRST: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """A sum for each program; those of the segments before are there already."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = table + row_of(table, count, tl.cast(tile, tl.int64), TILE) * COLUMNS
        begin, n = tl.cast(tile, tl.int64) * TILE - tl.load(row + START), tl.load(row + NUMEL)
        grad = tl.load(row + GRAD).to(tl.pointer_type(P))
        for part in range(0, TILE, BLOCK):
            j = begin + part + tl.arange(0, BLOCK)
            g = tl.load(grad + j, mask=j < n, other=0.0).to(tl.float64)
            total += g * g
    sum = tl.sum(total, 0)
    if not FIRST:
        sum += tl.load(squares + program)
    tl.store(squares + program, sum)


@triton.jit
def pointer(address, T: tl.constexpr, WHOLE: tl.constexpr):
    at = address.to(tl.pointer_type(T))
    return tl.multiple_of(at, 16) if WHOLE else at


@triton.jit
def update_block(
    row,
    flags,
    at,
    n,
    c,
    h,
    t,
    sign,
    unscale,
    factor,
    grad_scale,
    update: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Elements at .. at + BLOCK of a row. WHOLE: they all exist, and all addresses are those of vectors."""
    if WHOLE:
        j = tl.multiple_of(at, 16) + tl.arange(0, BLOCK)
        inside = tl.full([BLOCK], True, tl.int1)
    else:
        j = at + tl.arange(0, BLOCK)
        inside = j < n
    s0, s1, s2 = tl.load(row + STATE), tl.load(row + STATE + 1), tl.load(row + STATE + 2)
    state0, state1, state2 = pointer(s0, S, WHOLE), pointer(s1, S, WHOLE), pointer(s2, S, WHOLE)
    param, grad = pointer(tl.load(row + PARAM), P, WHOLE), pointer(tl.load(row + GRAD), P, WHOLE)
    master, ema = tl.load(row + MASTER), tl.load(row + EMA)
    g = tl.load(grad + j, mask=inside, other=0.0).to(tl.float32)
    m0 = tl.load(state0 + j, mask=inside & (s0 != 0), other=0.0).to(tl.float32)
    m1, m2 = m0, m0
    if STATES > 1:
        m1 = tl.load(state1 + j, mask=inside & (s1 != 0), other=0.0).to(tl.float32)
    if STATES > 2:
        m2 = tl.load(state2 + j, mask=inside & (s2 != 0), other=0.0).to(tl.float32)
    if grad_scale is not None:
        tl.store(grad + j, (g * unscale.to(tl.float32)).to(P), mask=inside)
    g = g * factor.to(tl.float32) * sign
    if tl.float32 == P:
        p = tl.load(param + j, mask=inside, other=0.0)
        u, m0, m1, m2 = update(p, g, m0, m1, m2, c)
        p = p - u
        tl.store(param + j, p, mask=inside)
    else:
        lacking = (flags & REMAINDER) != 0
        whole = (master != 0) & ~lacking
        p = tl.load(param + j, mask=inside & ~whole, other=0.0).to(tl.float32)
        full = tl.load(pointer(master, tl.float32, WHOLE) + j, mask=inside & whole, other=0.0)
        if tl.bfloat16 == P:
            rest = tl.load(pointer(master, tl.uint16, WHOLE) + j, mask=inside & lacking, other=0).to(tl.uint32)
            joined = (p.to(tl.uint32, bitcast=True) - ((rest >> 15) << 16)) | rest
            p = tl.where(lacking, joined.to(tl.float32, bitcast=True), p)
        p = tl.where(whole, full, p)
        u, m0, m1, m2 = update(p, g, m0, m1, m2, c)
        p = p - u
        rounded = p.to(P)
        if tl.bfloat16 == P:
            shown, lower = upper_half(p)
            rounded = tl.where(master != 0, shown, rounded)
            tl.store(pointer(master, tl.int16, WHOLE) + j, lower, mask=inside & lacking)
            if (flags & STOCHASTIC) != 0:
                # Up with the probability of the part that is cut off; neither infinity nor NaN is touched.
                seed = tl.load(h + SEED).to(tl.int64) + t.to(tl.int64)
                random = philox.random16(seed, j, tl.load(row + STREAM).to(tl.uint32))
                bits = p.to(tl.uint32, bitcast=True)
                bits = tl.where((bits & 0x7F800000) != 0x7F800000, bits + random, bits)
                drawn = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
                rounded = tl.where(p == p, drawn, rounded)
        tl.store(param + j, rounded, mask=inside)
        tl.store(pointer(master, tl.float32, WHOLE) + j, p, mask=inside & whole)
    average = pointer(ema, tl.float32, WHOLE) + j
    decay = tl.load(h + EMA_DECAY)
    old = tl.load(average, mask=inside & (ema != 0), other=0.0)
    tl.store(average, lerp(old, p, (1 - decay).to(tl.float32), decay.to(tl.float32)), mask=inside & (ema != 0))
    tl.store(state0 + j, m0.to(S), mask=inside & (s0 != 0))
    if STATES > 1:
        tl.store(state1 + j, m1.to(S), mask=inside & (s1 != 0))
    if STATES > 2:
        tl.store(state2 + j, m2.to(S), mask=inside & (s2 != 0))


@triton.jit
def update_tiles(
    table,
    count,
    tiles,
    progress,
    arrived,
    idle,
    hyper,
    outcome,
    grad_scale,
    found_inf,
    norm,
    squares,
    sums,
    max_norm,
    prepare: tl.constexpr,
    update: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    unscale = tl.cast(1.0, tl.float64)
    if grad_scale is not None:
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    factor = unscale
    if max_norm is not None:
        limit = tl.load(max_norm)
        if norm is not None:
            length = tl.load(norm).to(tl.float64)
        else:
            each = tl.arange(0, SUMS)
            length = tl.sqrt(tl.sum(tl.load(squares + each, mask=each < sums, other=0.0), 0)) * tl.abs(unscale)
        clip = limit / (length + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        factor = factor * tl.where((clip < 1) | (clip != clip), clip, 1.0)
        if program == 0:
            tl.store(outcome, length.to(tl.float32))
    skip = tl.cast(0.0, tl.float32)
    if found_inf is not None:
        found = tl.load(found_inf)
        skip = tl.where(found != 0, 1.0, 0.0)
    if program == 0:
        tl.store(outcome + 1, skip)
    stop = tl.where(skip != 0, 0, tiles)
    for tile in range(program, stop, tl.num_programs(0)):
        index = row_of(table, count, tl.cast(tile, tl.int64), TILE)
        row = table + index * COLUMNS
        flags, n = tl.load(row + FLAGS), tl.load(row + NUMEL)
        h = hyper + tl.load(row + GROUP) * HYPERS
        t = steps_before(row, flags, progress + index) + 1
        first = ((flags & FIRST_MOMENTUM) != 0) & (tl.load(progress + index) == 0)
        c, _ = prepare(h, t, first, load_scalar(row, FACTOR, flags))
        s0, s1, s2 = tl.load(row + STATE), tl.load(row + STATE + 1), tl.load(row + STATE + 2)
        master, ema = tl.load(row + MASTER), tl.load(row + EMA)
        sign = tl.where(tl.load(h + MAXIMIZE) != 0, -1.0, 1.0)
        begin = tl.cast(tile, tl.int64) * TILE - tl.load(row + START)
        addresses = tl.load(row + PARAM) | tl.load(row + GRAD) | s0 | s1 | s2 | master | ema
        aligned = addresses % 16 == 0
        for part in range(0, TILE, BLOCK):
            at = begin + part
            if aligned & (at + BLOCK <= n):
                update_block(
                    row, flags, at, n, c, h, t, sign, unscale, factor, grad_scale, update, P, S, STATES, BLOCK, True
                )
            elif at < n:
                update_block(
                    row, flags, at, n, c, h, t, sign, unscale, factor, grad_scale, update, P, S, STATES, BLOCK, False
                )
    # The last program counts the step: every other has read what it needs.
    if common.arrive(arrived, idle, LANES) == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        taken = tl.where(skip != 0, 0, count)
        for index in range(0, taken):
            row = table + index * COLUMNS
            flags = tl.load(row + FLAGS)
            h = hyper + tl.load(row + GROUP) * HYPERS
            t = steps_before(row, flags, progress + index) + 1
            _, running = prepare(h, t, False, load_scalar(row, FACTOR, flags))
            tl.store(progress + index, t.to(tl.int64))
            store_scalar(row, FACTOR, flags, running)
            store_scalar(row, STEP, flags, t)


# ---- launcher --------------------------------------------------------------------------------------------------------


@functools.cache
def limit(value: float, device: torch.device) -> Tensor:
    """A double on the device: Triton passes Python floats in single precision."""
    return torch.full((1,), value, dtype=torch.float64, device=device)


def launches(
    rule: Any,
    table: Tensor,
    segments: list[list[int]],
    progress: Tensor,
    hyper: Tensor,
    outcome: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> Iterator[Launch]:
    """`rule` has the functions `prepare` and `update` and the number STATES."""
    device = table.device
    most = common.processors(device) * PROGRAMS
    tile = {"TILE": TILE, "BLOCK": BLOCK}
    measure = max_norm is not None and norm is None
    squares = torch.zeros(most, dtype=torch.float64, device=device) if measure else None
    for i, (kind, first, rows, elements) in enumerate(segments if measure else []):
        args = {"table": table[first:], "count": rows, "tiles": elements // TILE, "squares": squares, "FIRST": i == 0}
        P = TYPES[_table.DTYPES[kind % 4]]
        yield Launch(sum_squares, most, {**args, "P": P, **tile}, WARPS)
    for kind, first, rows, elements in segments:
        counter = common.counters(device, 2)
        args = {"table": table[first:], "count": rows, "tiles": elements // TILE, "progress": progress[first:]}
        args |= {"arrived": counter, "idle": counter[1:], "hyper": hyper, "outcome": outcome, "grad_scale": grad_scale}
        args |= {"found_inf": found_inf, "norm": norm, "squares": squares, "sums": most}
        args |= {"max_norm": None if max_norm is None else limit(max_norm, device), **tile}
        args |= {"prepare": rule.prepare, "update": rule.update, "STATES": rule.STATES}
        args |= {"P": TYPES[_table.DTYPES[kind % 4]], "S": TYPES[_table.DTYPES[kind // 4]]}
        args |= {"SUMS": triton.next_power_of_2(most), "LANES": common.releasing_lanes(WARPS)}
        yield Launch(update_tiles, max(min(elements // TILE, most), 1), args, WARPS)


def step(
    name: str,
    rule: Any,
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
    """See fusedtricks/ops/_table.py for the arguments. Segments of float64 are served by the reference."""
    args = (progress, hyper, outcome, grad_scale, found_inf, norm, max_norm)
    kinds = segments.tolist()
    if any(kind % 4 == _table.DTYPES.index(torch.float64) for kind, *_ in kinds):
        Op.registry[name].implementation("reference")(table, segments, *args)
        return
    if table.device.type != "cuda" and not common.INTERPRETED:
        raise RuntimeError(
            f"{name}: the Triton back end needs a GPU tensor, got one on {table.device}; "
            "for CPU tensors set TRITON_INTERPRET=1 before Python starts"
        )
    for launch in launches(rule, table, kinds, *args):
        launch(table.device)


def specialisations(rule: Any) -> Iterator[tuple[str, Launch]]:
    """What bench/aot.py compiles: dtypes of the parameter and of the moments, with all that a step can do."""
    device, one = torch.device("meta"), torch.empty(1, device="meta")
    table = torch.empty(4, _table.COLUMNS, dtype=torch.int64, device=device)
    progress, hyper = (
        torch.empty(5, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.float64, device=device),
    )
    for p, s in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        segments = [[_table.KINDS[p, s], 0, 4, 4 * TILE]]
        args = (table, segments, progress, hyper, one, one, one, None, 1.0)
        for launch in launches(rule, *args):
            if launch.kernel is update_tiles:
                yield f"{str(p)[6:]}/{str(s)[6:]}", launch
