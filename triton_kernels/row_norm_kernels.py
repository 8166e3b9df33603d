"""Triton kernels of layer and RMS normalization; CENTER tells them apart. Which runs when: row_norm.py. Formulas:
fusedtricks/ops/layer_norm.py and rms_norm.py.

Two regimes, by the number of columns.

Rows that fit in registers (`fwd_rows`, `bwd_rows`): persistent programs walk tiles of ROWS x BLOCK elements, one row or
several, and keep the weight, the bias and the sums for their gradients in registers. The next tile travels to shared
memory meanwhile. Every element is read once.

Wider rows (`fwd_split`, `bwd_split`): a row is split among programs. An item is GROUP rows x BLOCK columns, and has a
measuring half (partial sums) and a writing half, done by different programs. Programs draw tickets, and tickets are
ordered so that the writing half of a group comes LAG groups after its measuring half: late enough that it seldom waits,
early enough that it reads from the L2 cache. A program only ever waits for lower tickets, which are held by programs
that run already and never wait in their measuring half, so no number of resident programs can deadlock.

Column sums (dweight, dbias): every program, or every group of rows, writes one partial row in fp32. The last `helpers`
programs to finish each sum some strips of STRIP columns, always in the same order, so results are reproducible bit by
bit and there is no second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import philox
from .common import arrive, clear, wait

STRIP = tl.constexpr(128)  # columns that one helper sums at a time
DEPTH = tl.constexpr(32)  # partial rows that it loads at once
CHUNKS = tl.constexpr(64)  # partial statistics of a row that are combined at once
OVERFLOW_SCALE = tl.constexpr(2.0**-64)  # rows whose squares overflow are measured again after this exact scaling
# Counters: programs that finished, helpers that finished, tickets drawn, one that stays 0, then one per group of rows.
FINISHED, HELPED, DRAWN, IDLE, GROUPS = (tl.constexpr(i) for i in range(5))

# ---- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def at(row, inner, outer_stride, inner_stride, LEVELS: tl.constexpr):
    """Element offset of each row, see common.Rows, in units of whatever the strides count."""
    row = row.to(tl.int64)
    if LEVELS == 1:
        return row * inner_stride
    else:
        return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0).to(tl.float32)


@triton.jit
def rstd_of(mean_square, eps):
    # max() would turn NaN into 0.
    return 1.0 / tl.sqrt_rn(tl.where(mean_square < 0, 0.0, mean_square) + eps)


@triton.jit
def statistics(x, mask, C, eps, CENTER: tl.constexpr):
    """d = x - mean (0 where masked), mean, rest, rstd of whole rows. A row of variance beyond fp32 is scaled first."""
    if CENTER:
        mean = tl.sum(x, 1) / C
        d = tl.where(mask, x - mean[:, None], 0.0)
        rest = tl.sum(d, 1) / C
    else:
        mean = tl.zeros([x.shape[0]], tl.float32)
        d, rest = x, mean
    square = tl.sum(d * d, 1) / C
    rstd = rstd_of(square - rest * rest, eps)
    finite = square < float("inf")
    if tl.min(finite.to(tl.int32), 0) == 0:
        e = d * OVERFLOW_SCALE
        scaled = tl.sum(e * e, 1) / C - (rest * OVERFLOW_SCALE) * (rest * OVERFLOW_SCALE)
        rstd = tl.where(finite, rstd, rstd_of(scaled, eps * OVERFLOW_SCALE * OVERFLOW_SCALE) * OVERFLOW_SCALE)
    return d, mean, rest, rstd


@triton.jit
def store_statistics(stats, offsets, plane, live, mean, rest, rstd, CENTER: tl.constexpr):
    if CENTER:
        tl.store(stats + offsets, mean, mask=live)
        tl.store(stats + offsets + plane, rest, mask=live)
        tl.store(stats + offsets + plane + plane, rstd, mask=live)
    else:
        tl.store(stats + offsets, rstd, mask=live)


@triton.jit
def load_normalized(x, x_at, mask, stats, stats_at, plane, live, CENTER: tl.constexpr):
    """x^ of a tile, and rstd of its rows."""
    xhat = load(x, x_at, mask)
    if CENTER:
        xhat = xhat - load(stats, stats_at, live)[:, None]
        xhat = xhat - load(stats, stats_at + plane, live)[:, None]
        rstd = load(stats, stats_at + plane + plane, live)
    else:
        rstd = load(stats, stats_at, live)
    return xhat * rstd[:, None], rstd


@triton.jit
def drop(x, seed, row, C, first, keep, scale, ALIGN: tl.constexpr):
    """Dropout of columns first, first + 1, ... of plain rows; all is kept without a seed."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    if seed is not None:
        start = row.to(tl.int64) * C + first
        if ALIGN % 8 == 0 and BLOCK % 8 == 0:
            block = (start // 8)[:, None] + tl.arange(0, BLOCK // 8)[None, :]
            bits = tl.reshape(philox.random16x8(tl.load(seed), block), [ROWS, BLOCK])
        else:
            bits = philox.random16(tl.load(seed), start[:, None] + tl.arange(0, BLOCK)[None, :])
        x = tl.where(bits < keep, x * scale, 0.0)
    return x


@triton.jit
def add_dropped(x, x_at, mask, residual, z, seed, row, C, first, keep, scale, ALIGN: tl.constexpr):
    """z = dropout(x) + residual, stored, and as it was rounded; x itself where there is no residual."""
    if residual is not None:
        total = drop(x, seed, row, C, first, keep, scale, ALIGN) + load(residual, x_at, mask)
        rounded = total.to(z.dtype.element_ty)
        tl.store(z + x_at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def store_gradient(
    value, dx, dx_at, mask, dz, dropped, seed, row, C, first, keep, scale, ALIGN: tl.constexpr
):  # fmt: skip
    """The gradient of a tile; of dropout_add_layer_norm plus dz, and that of what was dropped."""
    if dz is not None:
        value += load(dz, dx_at, mask)
    tl.store(dx + dx_at, value, mask=mask)
    if dropped is not None:
        tl.store(dropped + dx_at, drop(value, seed, row, C, first, keep, scale, ALIGN), mask=mask)


@triton.jit
def affine(xhat, w, b):
    """x^ w + b, w and b one row of columns each, or None."""
    if w is not None:
        xhat = xhat * w[None, :]
    if b is not None:
        xhat = xhat + b[None, :]
    return xhat


@triton.jit
def padded(C):
    """Length of a partial row: a multiple of every vector, whatever C."""
    return tl.cdiv(C, 16) * 16


@triton.jit
def sum_strip(partial, out, count, C, strip):
    """out[strip] = the column sums of `count` partial rows, in fixed order."""
    cols = strip * STRIP + tl.arange(0, STRIP)
    deep = tl.arange(0, DEPTH)
    total = tl.zeros([DEPTH, STRIP], tl.float32)
    for first in range(0, count, DEPTH):
        row = first + deep
        mask = (row < count)[:, None] & (cols < padded(C))[None, :]
        offsets = row.to(tl.int64)[:, None] * padded(C) + cols[None, :]
        # .cg: read where the other programs' stores are, not in this multiprocessor's own cache.
        total += tl.load(partial + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(out + cols, tl.sum(total, 0), mask=cols < C)


@triton.jit
def finish(counters, used, helpers, partial, count, C, dweight, dbias, LANES: tl.constexpr):
    """Count this program out. The last `helpers` to arrive wait for the others and share the column sums.

    Fewer than `helpers` programs are then unfinished; they need room beside the waiting ones, so `helpers` is well
    below what the device runs at once. The last helper leaves all `used` counters at zero.
    """
    programs = tl.num_programs(0)
    helper = arrive(counters + FINISHED, counters + IDLE, LANES) - (programs - helpers)
    if helper >= 0:
        wait(counters + FINISHED, programs)
        for strip in range(helper, tl.cdiv(C, STRIP), helpers):
            if dweight is not None:
                sum_strip(partial, dweight, count, C, strip)
            if dbias is not None:
                sum_strip(partial + tl.cast(count, tl.int64) * padded(C), dbias, count, C, strip)
        if arrive(counters + HELPED, counters + IDLE, LANES) == helpers - 1:
            clear(counters, used)


@triton.jit
def draw(counters, chunks, LAG, HALVES: tl.constexpr):
    """A ticket as (group, chunk, whether this is the writing half); the group may lie outside the tensor."""
    ticket = tl.atomic_add(counters + DRAWN, 1, sem="relaxed", scope="gpu")
    half = ticket % (HALVES * chunks)
    writes = (half >= chunks) | (HALVES == 1)
    group = ticket // (HALVES * chunks) - tl.where(writes, LAG, 0)
    return group, half % chunks, writes


# ---- rows in registers ----------------------------------------------------------------------------------------------

# One compiled kernel serves all sizes and strides; what vector accesses need to know, ALIGN says: `columns` and the
# strides of x, y, dy and dx count ALIGN elements. `stats_inner` is specialised on: it is 1 unless rows are walked in
# another order than they are counted.
SIZES = ["x_outer", "x_inner", "y_outer", "y_inner", "dy_outer", "dy_inner", "dx_outer", "dx_inner", "stats_outer"]
SIZES += ["keep", "scale", "inner", "R", "columns", "plane", "eps", "chunks", "LAG", "used", "helpers"]


@triton.jit(do_not_specialize=SIZES)
def fwd_rows(
    x,
    weight,
    bias,
    y,
    stats,
    residual,
    z,
    seed,
    keep,
    scale,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    stats_outer,
    stats_inner,
    inner,
    R,
    columns,
    plane,
    eps,
    CENTER: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    C = columns * ALIGN
    cols = tl.arange(0, BLOCK)
    within = cols < C
    w = load(weight, cols, within) if KEEP and weight is not None else None
    b = load(bias, cols, within) if KEEP and bias is not None else None
    for tile in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < R
        mask = live[:, None] & within[None, :]
        x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
        value = load(x, x_at, mask)
        value = add_dropped(value, x_at, mask, residual, z, seed, row, C, 0, keep, scale, ALIGN)
        d, mean, rest, rstd = statistics(value, mask, C, eps, CENTER)
        out = affine((d - rest[:, None]) * rstd[:, None], w, b)
        if not KEEP:
            w_again = load(weight, cols, within) if weight is not None else None
            b_again = load(bias, cols, within) if bias is not None else None
            out = affine(out, w_again, b_again)
        y_at = (at(row, inner, y_outer, y_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
        tl.store(y + y_at, out, mask=mask)
        stats_at = at(row, inner, stats_outer, stats_inner, LEVELS)
        store_statistics(stats, stats_at, plane, live, mean, rest, rstd, CENTER)


@triton.jit(do_not_specialize=SIZES)
def bwd_rows(
    dy,
    x,
    weight,
    stats,
    dx,
    dweight,
    dbias,
    partial,
    counters,
    dz,
    dropped,
    seed,
    keep,
    scale,
    dy_outer,
    dy_inner,
    x_outer,
    x_inner,
    dx_outer,
    dx_inner,
    stats_outer,
    stats_inner,
    inner,
    R,
    columns,
    plane,
    used,
    helpers,
    CENTER: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = columns * ALIGN
    cols = tl.arange(0, BLOCK)
    within = cols < C
    w = load(weight, cols, within) if weight is not None else None
    # Summed over rows only at the end: no reduction across warps in the loop.
    sum_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < R
        mask = live[:, None] & within[None, :]
        g = load(dy, (at(row, inner, dy_outer, dy_inner, LEVELS) * ALIGN)[:, None] + cols[None, :], mask)
        x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
        stats_at = at(row, inner, stats_outer, stats_inner, LEVELS)
        xhat, rstd = load_normalized(x, x_at, mask, stats, stats_at, plane, live, CENTER)
        if dweight is not None:
            sum_dw += g * xhat
        if dbias is not None:
            sum_db += g
        if dx is not None:
            g = affine(g, w, None)
            # g is 0 in the columns beyond C, and so is everything summed here.
            out = xhat * (tl.sum(g * xhat, 1) / C)[:, None]
            if CENTER:
                out += (tl.sum(g, 1) / C)[:, None]
            dx_at = (at(row, inner, dx_outer, dx_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
            value = rstd[:, None] * (g - out)
            store_gradient(value, dx, dx_at, mask, dz, dropped, seed, stats_at, C, 0, keep, scale, ALIGN)

    if (dweight is not None) | (dbias is not None):
        programs = tl.num_programs(0)
        mine = tl.program_id(0).to(tl.int64) * padded(C) + cols
        if dweight is not None:
            tl.store(partial + mine, tl.sum(sum_dw, 0), mask=within)
        if dbias is not None:
            tl.store(partial + programs.to(tl.int64) * padded(C) + mine, tl.sum(sum_db, 0), mask=within)
        finish(counters, used, helpers, partial, programs, C, dweight, dbias, LANES)


# ---- rows split among programs --------------------------------------------------------------------------------------


@triton.jit
def combine_chunks(partial, row, live, R, C, chunks, eps, BLOCK: tl.constexpr, CENTER: tl.constexpr):
    """mean, rest, rstd of rows from the mean, rest, sum of squares and scaled sum of squares of their chunks.

    The parallel variance of Chan, Golub, LeVeque (1979) for many parts. Means are taken relative to that of the first
    part, so that nothing is lost when all are large and close.
    """
    ROWS: tl.constexpr = row.shape[0]
    chunk = tl.arange(0, CHUNKS)
    lines = row.to(tl.int64)[:, None] * chunks
    plane = tl.cast(R, tl.int64) * chunks
    shift = tl.zeros([ROWS], tl.float32)
    origin = tl.zeros([ROWS], tl.float32)
    if CENTER:
        origin = tl.load(partial + row.to(tl.int64) * chunks, mask=live, other=0.0, cache_modifier=".cg")
        for first in range(0, chunks, CHUNKS):
            part = partial + lines + (first + chunk)[None, :]
            mask = live[:, None] & (first + chunk < chunks)[None, :]
            size = tl.maximum(tl.minimum(C - (first + chunk) * BLOCK, BLOCK), 0).to(tl.float32)[None, :]
            mean = tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            rest = tl.load(part + plane, mask=mask, other=0.0, cache_modifier=".cg")
            shift += tl.sum(size * ((mean - origin[:, None]) + rest), 1)
        shift = shift / C
    square = tl.zeros([ROWS], tl.float32)
    scaled = tl.zeros([ROWS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        part = partial + lines + (first + chunk)[None, :]
        mask = live[:, None] & (first + chunk < chunks)[None, :]
        inside = tl.load(part + 2 * plane, mask=mask, other=0.0, cache_modifier=".cg")
        inside_scaled = tl.load(part + 3 * plane, mask=mask, other=0.0, cache_modifier=".cg")
        if CENTER:
            size = tl.maximum(tl.minimum(C - (first + chunk) * BLOCK, BLOCK), 0).to(tl.float32)[None, :]
            mean = tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            rest = tl.load(part + plane, mask=mask, other=0.0, cache_modifier=".cg")
            off = tl.where(mask, ((mean - origin[:, None]) + rest) - shift[:, None], 0.0)
            inside += size * off * off
            inside_scaled += size * (off * OVERFLOW_SCALE) * (off * OVERFLOW_SCALE)
        square += tl.sum(inside, 1)
        scaled += tl.sum(inside_scaled, 1)
    mean = origin + shift
    rest = (origin - mean) + shift
    rescued = rstd_of(scaled / C, eps * OVERFLOW_SCALE * OVERFLOW_SCALE) * OVERFLOW_SCALE
    return mean, rest, tl.where(square < float("inf"), rstd_of(square / C, eps), rescued)


@triton.jit(do_not_specialize=SIZES)
def fwd_split(
    x,
    weight,
    bias,
    y,
    stats,
    residual,
    z,
    seed,
    keep,
    scale,
    partial,
    counters,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    stats_outer,
    stats_inner,
    inner,
    R,
    columns,
    plane,
    eps,
    chunks,
    LAG,
    used,
    CENTER: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    C = columns * ALIGN
    group, chunk, writes = draw(counters, chunks, LAG, 2)
    cols = chunk * BLOCK + tl.arange(0, BLOCK)
    within = cols < C
    size = tl.minimum(C - chunk * BLOCK, BLOCK)
    group_rows = group * GROUP + tl.arange(0, GROUP)
    first = tl.maximum(group * GROUP, 0)
    last = tl.minimum(group * GROUP + GROUP, R)
    if writes:
        if first < last:
            wait(counters + GROUPS + group, chunks + 1)
        w = load(weight, cols, within) if weight is not None else None
        b = load(bias, cols, within) if bias is not None else None
        for r in range(first, last):
            row = r + tl.arange(0, 1)
            x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
            stats_at = at(row, inner, stats_outer, stats_inner, LEVELS)
            source = x if z is None else z
            xhat, _ = load_normalized(source, x_at, within[None, :], stats, stats_at, plane, row < R, CENTER)
            y_at = (at(row, inner, y_outer, y_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
            tl.store(y + y_at, affine(xhat, w, b), mask=within[None, :])
    elif first < last:
        lines = tl.cast(R, tl.int64) * chunks
        for r in range(first, last):
            row = r + tl.arange(0, 1)
            x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
            d = load(x, x_at, within[None, :])
            d = add_dropped(
                d, x_at, within[None, :], residual, z, seed, row, C, chunk * BLOCK, keep, scale, ALIGN
            )  # fmt: skip
            part = partial + row.to(tl.int64) * chunks + chunk
            if CENTER:
                mean = tl.sum(d, 1) / size
                d = tl.where(within[None, :], d - mean[:, None], 0.0)
                rest = tl.sum(d, 1) / size
                d = tl.where(within[None, :], d - rest[:, None], 0.0)
                tl.store(part, mean)
                tl.store(part + lines, rest)
            tl.store(part + 2 * lines, tl.sum(d * d, 1))
            d = d * OVERFLOW_SCALE
            tl.store(part + 3 * lines, tl.sum(d * d, 1))
        if arrive(counters + GROUPS + group, counters + IDLE, LANES) == chunks - 1:
            live = group_rows < R
            mean, rest, rstd = combine_chunks(partial, group_rows, live, R, C, chunks, eps, BLOCK, CENTER)
            stats_at = at(group_rows, inner, stats_outer, stats_inner, LEVELS)
            store_statistics(stats, stats_at, plane, live, mean, rest, rstd, CENTER)
            arrive(counters + GROUPS + group, counters + IDLE, LANES)
    finish(counters, used, 1, partial, 0, C, None, None, LANES)


@triton.jit(do_not_specialize=SIZES)
def bwd_split(
    dy,
    x,
    weight,
    stats,
    dx,
    dweight,
    dbias,
    moments,
    partial,
    counters,
    dz,
    dropped,
    seed,
    keep,
    scale,
    dy_outer,
    dy_inner,
    x_outer,
    x_inner,
    dx_outer,
    dx_inner,
    stats_outer,
    stats_inner,
    inner,
    R,
    columns,
    plane,
    chunks,
    LAG,
    used,
    helpers,
    CENTER: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`moments` (2, chunks + 1, R): sums of g x^ and of g over each chunk, then their means over the whole row."""
    C = columns * ALIGN
    HALVES: tl.constexpr = 1 if dx is None else 2
    group, chunk, writes = draw(counters, chunks, LAG, HALVES)
    cols = chunk * BLOCK + tl.arange(0, BLOCK)
    within = cols < C
    first = tl.maximum(group * GROUP, 0)
    last = tl.minimum(group * GROUP + GROUP, R)
    w = load(weight, cols, within) if weight is not None else None
    lines = tl.cast(R, tl.int64) * (chunks + 1)
    sum_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_db = tl.zeros([ROWS, BLOCK], tl.float32)
    if writes & (first < last) & (HALVES == 2):
        wait(counters + GROUPS + group, chunks + 1)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        mask = live[:, None] & within[None, :]
        g = load(dy, (at(row, inner, dy_outer, dy_inner, LEVELS) * ALIGN)[:, None] + cols[None, :], mask)
        x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
        stats_at = at(row, inner, stats_outer, stats_inner, LEVELS)
        xhat, rstd = load_normalized(x, x_at, mask, stats, stats_at, plane, live, CENTER)
        if writes:
            if dweight is not None:
                sum_dw += g * xhat
            if dbias is not None:
                sum_db += g
        if dx is not None:
            g = affine(g, w, None)
            if writes:
                whole = moments + chunks * tl.cast(R, tl.int64) + row
                out = xhat * tl.load(whole, mask=live, other=0.0, cache_modifier=".cg")[:, None]
                if CENTER:
                    out += tl.load(whole + lines, mask=live, other=0.0, cache_modifier=".cg")[:, None]
                dx_at = (at(row, inner, dx_outer, dx_inner, LEVELS) * ALIGN)[:, None] + cols[None, :]
                value = rstd[:, None] * (g - out)
                first_column = chunk * BLOCK
                store_gradient(value, dx, dx_at, mask, dz, dropped, seed, stats_at, C, first_column, keep, scale, ALIGN)
            else:
                part = moments + chunk * tl.cast(R, tl.int64) + row
                tl.store(part, tl.sum(g * xhat, 1), mask=live)
                if CENTER:
                    tl.store(part + lines, tl.sum(g, 1), mask=live)
    if first < last:
        if not writes:
            if arrive(counters + GROUPS + group, counters + IDLE, LANES) == chunks - 1:
                row = first + tl.arange(0, GROUP)
                live = row < last
                mean_gx = tl.zeros([GROUP], tl.float32)
                mean_g = tl.zeros([GROUP], tl.float32)
                for c in range(0, chunks, CHUNKS):
                    at_once = c + tl.arange(0, CHUNKS)
                    part = moments + (at_once.to(tl.int64) * R)[:, None] + row[None, :]
                    mask = (at_once < chunks)[:, None] & live[None, :]
                    mean_gx += tl.sum(tl.load(part, mask=mask, other=0.0, cache_modifier=".cg"), 0)
                    if CENTER:
                        mean_g += tl.sum(tl.load(part + lines, mask=mask, other=0.0, cache_modifier=".cg"), 0)
                whole = moments + chunks * tl.cast(R, tl.int64) + row
                tl.store(whole, mean_gx / C, mask=live)
                if CENTER:
                    tl.store(whole + lines, mean_g / C, mask=live)
                arrive(counters + GROUPS + group, counters + IDLE, LANES)
        else:
            mine = tl.cast(group, tl.int64) * padded(C) + cols
            if dweight is not None:
                tl.store(partial + mine, tl.sum(sum_dw, 0), mask=within)
            if dbias is not None:
                mine += tl.cast(tl.cdiv(R, GROUP), tl.int64) * padded(C)
                tl.store(partial + mine, tl.sum(sum_db, 0), mask=within)
    finish(counters, used, helpers, partial, tl.cdiv(R, GROUP), C, dweight, dbias, LANES)
