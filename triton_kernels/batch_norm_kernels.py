"""Triton kernels of batch normalization. Which runs when: batch_norm.py. Formulas: fusedtricks/ops/batch_norm.py.

A dense tensor (N, C, *) is seen as lines of contiguous elements, in one of two ways. PLANES: a line is one channel's
run, `runs` of them for each of C channels. Else rows: a line is a whole number of periods of C x inner elements, so
column j belongs to channel j // inner % C; `length` is then a multiple of a vector whatever C is, where that is
possible. The last row may be short (TAIL).

A group is what has its statistics in common: one channel, a strip of columns, or everything where a channel's columns
lie in several strips. Two regimes:

One program holds a group in registers (`fwd_whole`, `bwd_whole`): every element is read once.

A group is split among programs (`fwd_split`, `bwd_split`). Its chunks are measured, what was found is combined in fp64
in fixed order, and the chunks are written, in reverse, LAG groups later: late enough that the wait is short, early
enough that x comes from the L2 cache. Programs draw tickets in that order and wait only for lower tickets, which are
held by programs that run already, so no number of resident programs can deadlock.

Statistics: each chunk sums d = x - shift and d^2, its shift the mean of its first tile. A subset of a fraction f has
its mean within sqrt(1/f - 1) standard deviations of the whole, so few digits are lost whatever the values are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import arrive, clear, wait

IDENTITY, RELU, LEAKY_RELU, SILU, GELU = (tl.constexpr(i) for i in range(5))  # as in ops/_batch_norm.py
FITTED = tl.constexpr(2.0**-80)  # exact scaling of what would overflow when squared
# Counters: tickets drawn, programs that finished, one that stays 0, then one per group.
DRAWN, FINISHED, IDLE, GROUPS = (tl.constexpr(i) for i in range(4))

# One compiled kernel serves all sizes. `units` counts ALIGN elements of a line: what vector accesses may rely on.
SIZES = ["runs", "units", "C", "inner", "total", "samples", "across", "down", "along", "chunks", "helpers", "LAG"]
SIZES += ["used", "eps", "momentum", "slope"]


@triton.constexpr_function
def depth(channels):
    """Chunks whose sums are combined at once, for so many channels."""
    return min(256, 1024 // channels)


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def over(t, PLANES: tl.constexpr):
    """Sums over the samples of a tile: (1, 1) for planes, one per column for rows."""
    if PLANES:
        return tl.sum(tl.sum(t, 1, keep_dims=True), 0, keep_dims=True)
    else:
        return tl.sum(t, 0, keep_dims=True)


@triton.jit
def corner(group, item, across, down, along, PLANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """First run and first column of a chunk: `across` chunks side by side, of down x along tiles."""
    run = (item // across) * (down * ROWS)
    if PLANES:
        return run, (item % across) * along * BLOCK
    else:
        return run, (group * across + item % across) * BLOCK


@triton.jit
def place(
    group,
    run,
    column,
    runs,
    units,
    C,
    total,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Element offsets of a tile, the same for bytes of the mask, and which of both exist."""
    length = units * ALIGN
    r = (run + tl.arange(0, ROWS))[:, None]
    j = (column + tl.arange(0, BLOCK))[None, :]
    b = (column // 8 + tl.arange(0, BLOCK // 8))[None, :]
    line = r.to(tl.int64)
    if PLANES:
        line = line * C + group
    at = line * units * ALIGN + j
    live = (r < runs) & (j < length)
    byte = line * tl.cdiv(length, 8) + b
    live_byte = (r < runs) & (b * 8 < length)
    if TAIL:
        live = live & (at < total)
        live_byte = live_byte & (line * length + b * 8 < total)
    return at, live, byte, live_byte


@triton.jit
def channels_of(group, column, units, C, inner, PLANES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """The channel of each column of a tile, and whether there is one."""
    if PLANES:
        channel = group + tl.zeros([1, 1], tl.int32)
        return channel, channel < C
    else:
        j = (column + tl.arange(0, BLOCK))[None, :]
        return j // inner % C, j < units * ALIGN


@triton.jit
def load(pointer, at, live):
    return tl.load(pointer + at, mask=live, other=0).to(tl.float32)


@triton.jit
def load_last(pointer, at, live):
    """What is not read again leaves the caches first."""
    return tl.load(pointer + at, mask=live, other=0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def shared(pointer, at, live):
    """What other programs of this launch wrote: not from this multiprocessor's own cache."""
    return tl.load(pointer + at, mask=live, other=0, cache_modifier=".cg")


@triton.jit
def optional(pointer, at, live, otherwise):
    if pointer is None:
        return tl.full(at.shape, otherwise, tl.float32)
    else:
        return load(pointer, at, live)


# ---- activations ----------------------------------------------------------------------------------------------------


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """z above 0, and for NaN."""
    if ACTIVATION == RELU:
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z < 0, z * slope, z)
    elif ACTIVATION == SILU:
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == GELU:
        return z * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)))
    else:
        return z


@triton.jit
def below(g, slope, ACTIVATION: tl.constexpr):
    return g * slope if ACTIVATION == LEAKY_RELU else tl.zeros_like(g)


@triton.jit
def activate_backward(g, z, slope, ACTIVATION: tl.constexpr):
    """The derivative at 0 is that of below."""
    if ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        return g * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == GELU:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return g * (cdf + z * (tl.exp(z * z * -0.5) * 0.3989422804014327))
    else:
        return tl.where(z <= 0, below(g, slope, ACTIVATION), g)


# ---- one tile, forward ----------------------------------------------------------------------------------------------


@triton.jit
def forward_of(mean, rest, rstd, weight, bias, channel, live):
    """scale and shift of z = (x - mean) scale + shift."""
    scale = rstd * optional(weight, channel, live, 1.0)
    return scale, optional(bias, channel, live, 0.0) - rest * scale


@triton.jit
def write_forward(
    x, residual, y, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION: tl.constexpr
):
    z = (x - mean) * scale + shift
    if residual is not None:
        z += load_last(residual, at, live)
    if signs is not None:
        bits = tl.reshape((z > 0) | (z != z), [at.shape[0], at.shape[1] // 8, 8]) & tl.reshape(
            live, [at.shape[0], at.shape[1] // 8, 8]
        )
        packed = tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, None, :], 2)
        tl.store(signs + byte, packed.to(tl.uint8), mask=live_byte)
    tl.store(y + at, activate(z, slope, ACTIVATION), mask=live)


@triton.jit
def store_channels(
    channel, live, mean, rest, rstd, var, samples, stats, running_mean, running_var, tracked, momentum, C
):
    """Statistics of channels, and their running averages; `momentum` of the new, or the plain average where None."""
    tl.store(stats + channel, mean, mask=live)
    tl.store(stats + C + channel, rest, mask=live)
    tl.store(stats + 2 * C + channel, rstd, mask=live)
    tl.store(stats + 3 * C + channel, var, mask=live)
    if running_mean is not None:
        factor = 1.0 / tl.load(tracked).to(tl.float32) if momentum is None else momentum
        old = load(running_mean, channel, live)
        tl.store(running_mean + channel, old * (1.0 - factor) + (mean + rest) * factor, mask=live)
        n = tl.cast(samples, tl.float32)
        unbiased = var * (n / tl.maximum(n - 1.0, 1.0))
        old = load(running_var, channel, live)
        tl.store(running_var + channel, old * (1.0 - factor) + unbiased * factor, mask=live)


@triton.jit
def count_batch(first, tracked, momentum):
    """One program counts; where the average depends on the counter, the launcher has counted."""
    if tracked is not None and momentum is not None and first:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit(do_not_specialize=SIZES)
def fwd_whole(
    x,
    residual,
    weight,
    bias,
    y,
    signs,
    stats,
    running_mean,
    running_var,
    tracked,
    momentum,
    eps,
    slope,
    runs,
    units,
    C,
    inner,
    total,
    samples,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    column = 0 if PLANES else group * BLOCK
    channel, mine = channels_of(group, column, units, C, inner, PLANES, ALIGN, BLOCK)
    at, live, byte, live_byte = place(group, 0, column, runs, units, C, total, PLANES, ALIGN, TAIL, ROWS, BLOCK)
    values = load_last(x, at, live)
    n = tl.cast(samples, tl.float32)
    mean = over(values, PLANES) / n
    d = tl.where(live, values - mean, 0.0)
    rest = over(d, PLANES) / n
    var = over(d * d, PLANES) / n - rest * rest
    var = tl.where(var < 0, 0.0, var)
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    finite = var < float("inf")
    if tl.min(finite.to(tl.int32)) == 0:
        e = d * FITTED
        fitted = over(e * e, PLANES) / n - (rest * FITTED) * (rest * FITTED)
        rstd = tl.where(finite, rstd, FITTED / tl.sqrt_rn(fitted))
    store_channels(
        channel, mine, mean, rest, rstd, var, samples, stats, running_mean, running_var, tracked, momentum, C
    )
    count_batch(group == 0, tracked, momentum)
    if y is not None:
        scale, shift = forward_of(mean, rest, rstd, weight, bias, channel, mine)
        write_forward(values, residual, y, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def apply(
    x,
    residual,
    weight,
    bias,
    mean,
    rest,
    var,
    y,
    signs,
    stats,
    eps,
    slope,
    runs,
    units,
    C,
    inner,
    total,
    across,
    down,
    along,
    chunks,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y from statistics that are known."""
    group, item = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    run, column = corner(group, item, across, down, along, PLANES, ROWS, BLOCK)
    channel, mine = channels_of(group, column, units, C, inner, PLANES, ALIGN, BLOCK)
    m, v = load(mean, channel, mine), load(var, channel, mine)
    r = optional(rest, channel, mine, 0.0)
    rstd = 1.0 / tl.sqrt_rn(v + eps)
    # Which of the programs of a channel writes its statistics does not matter: they write the same.
    if item // across == 0:
        tl.store(stats + channel, m, mask=mine)
        tl.store(stats + C + channel, r, mask=mine)
        tl.store(stats + 2 * C + channel, rstd, mask=mine)
        tl.store(stats + 3 * C + channel, v, mask=mine)
    scale, shift = forward_of(m, r, rstd, weight, bias, channel, mine)
    for t in range(0, down * along):
        at, live, byte, live_byte = place(
            group,
            run + t // along * ROWS,
            column + t % along * BLOCK,
            runs,
            units,
            C,
            total,
            PLANES,
            ALIGN,
            TAIL,
            ROWS,
            BLOCK,
        )
        values = load_last(x, at, live)
        write_forward(values, residual, y, signs, at, live, byte, live_byte, m, scale, shift, slope, ACTIVATION)


# ---- tickets --------------------------------------------------------------------------------------------------------


@triton.jit
def draw(counters, chunks, helpers, LAG, PHASES: tl.constexpr):
    """A ticket as (group, item, phase): 0 measures, 1 combines, 2 writes. The group may lie outside the tensor."""
    ticket = tl.atomic_add(counters + DRAWN, 1, sem="relaxed", scope="gpu")
    size = chunks * (PHASES - 1) + helpers
    step, item = ticket // size, ticket % size
    phase = (item >= chunks).to(tl.int32) + (item >= chunks + helpers).to(tl.int32)
    item = tl.where(phase == 0, item, tl.where(phase == 1, item - chunks, size - 1 - item))
    return tl.where(phase == 2, step - LAG, step), item, phase


@triton.jit
def finish(counters, used, LANES: tl.constexpr):
    """The last program leaves the counters at zero."""
    if arrive(counters + FINISHED, counters + IDLE, LANES) == tl.num_programs(0) - 1:
        clear(counters, used)


@triton.jit
def contributor(
    first,
    channel,
    runs,
    units,
    C,
    inner,
    total,
    across,
    down,
    along,
    chunks,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the partial sums of channels are, DEPTH of them from number `first` on, and whether they exist; then how
    many samples each is of."""
    length = units * ALIGN
    DEPTH: tl.constexpr = depth(channel.shape[1])
    q = (first + tl.arange(0, DEPTH))[:, None]
    if PLANES:
        chunk, j = q, channel
        long = tl.minimum(runs - chunk // across * (down * ROWS), down * ROWS)
        count = long * tl.minimum(length - chunk % across * along * BLOCK, along * BLOCK)
        exists = (q < chunks) & (channel < C)
        width = C
    else:
        copies = length // C  # columns of a channel
        chunk = q // copies
        j = q % copies // inner * (C * inner) + channel * inner + q % inner
        height = ((tl.cast(total, tl.int64) - j + length - 1) // length).to(tl.int32)
        count = tl.minimum(tl.maximum(height - chunk * (down * ROWS), 0), down * ROWS)
        exists = (q < chunks // across * copies) & (channel < C)
        width = length
    return chunk.to(tl.int64) * width + j, exists, tl.where(exists, count, 0)


@triton.jit
def contributors(units, C, chunks, across, PLANES: tl.constexpr, ALIGN: tl.constexpr):
    return chunks if PLANES else chunks // across * (units * ALIGN // C)


@triton.jit
def partial_at(group, item, column, units, C, across, PLANES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Where a chunk leaves its sums, and whether they exist."""
    if PLANES:
        channel = group + tl.zeros([1, 1], tl.int32)
        return channel + item * tl.cast(C, tl.int64), channel < C
    else:
        j = (column + tl.arange(0, BLOCK))[None, :]
        return j + (item // across) * tl.cast(units * ALIGN, tl.int64), j < units * ALIGN


@triton.jit
def plane_of(units, C, chunks, across, PLANES: tl.constexpr, ALIGN: tl.constexpr):
    """Elements from one kind of partial sum to the next."""
    if PLANES:
        return chunks * tl.cast(C, tl.int64)
    else:
        return chunks // across * tl.cast(units * ALIGN, tl.int64)


# ---- a group split among programs, forward --------------------------------------------------------------------------


@triton.jit
def combine(
    partial,
    channel,
    runs,
    units,
    C,
    inner,
    total,
    samples,
    across,
    down,
    along,
    chunks,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and variance of channels in fp64 (Chan, Golub, LeVeque 1979), see part_sum in csrc/math/batch_norm.h."""
    kinds = plane_of(units, C, chunks, across, PLANES, ALIGN)
    many = contributors(units, C, chunks, across, PLANES, ALIGN)
    n = tl.cast(samples, tl.float64)
    mean = tl.zeros([1, channel.shape[1]], tl.float64)
    for first in range(0, many, depth(channel.shape[1])):
        at, exists, count = contributor(
            first, channel, runs, units, C, inner, total, across, down, along, chunks, PLANES, ALIGN, ROWS, BLOCK
        )
        shift = shared(partial, at, exists).to(tl.float64)
        d = shared(partial + kinds, at, exists).to(tl.float64)
        unscale = shared(partial + 3 * kinds, at, exists).to(tl.float64)
        mean += tl.sum(count.to(tl.float64) * shift + d * unscale, 0, keep_dims=True)
    mean = mean / n
    square = tl.zeros([1, channel.shape[1]], tl.float64)
    for first in range(0, many, depth(channel.shape[1])):
        at, exists, count = contributor(
            first, channel, runs, units, C, inner, total, across, down, along, chunks, PLANES, ALIGN, ROWS, BLOCK
        )
        off = shared(partial, at, exists).to(tl.float64) - mean
        unscale = shared(partial + 3 * kinds, at, exists).to(tl.float64)
        d = shared(partial + kinds, at, exists).to(tl.float64) * unscale
        d2 = shared(partial + 2 * kinds, at, exists).to(tl.float64) * unscale * unscale
        square += tl.sum(tl.where(exists, d2 + (2 * d + count.to(tl.float64) * off) * off, 0.0), 0, keep_dims=True)
    var = square / n
    return mean, tl.where(var < 0, 0.0, var)


@triton.jit(do_not_specialize=SIZES)
def fwd_split(
    x,
    residual,
    weight,
    bias,
    y,
    signs,
    stats,
    running_mean,
    running_var,
    tracked,
    partial,
    counters,
    momentum,
    eps,
    slope,
    runs,
    units,
    C,
    inner,
    total,
    samples,
    across,
    down,
    along,
    chunks,
    helpers,
    LAG,
    used,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HELPED: tl.constexpr,
):
    """`partial` (4, chunks, columns): shift, sums of d and d^2, unscale; a column is a channel for planes."""
    PHASES: tl.constexpr = 2 if y is None else 3
    groups = used - GROUPS
    group, item, phase = draw(counters, chunks, helpers, LAG, PHASES)
    counter = counters + GROUPS + group
    if (group >= 0) & (group < groups):
        run, column = corner(group, item, across, down, along, PLANES, ROWS, BLOCK)
        channel, mine = channels_of(group, column, units, C, inner, PLANES, ALIGN, BLOCK)
        if phase == 0:
            at, live, _, _ = place(group, run, column, runs, units, C, total, PLANES, ALIGN, TAIL, ROWS, BLOCK)
            values = load(x, at, live)
            n = tl.maximum(over(live.to(tl.float32), PLANES), 1.0)
            center = over(values, PLANES) / n
            # Trailing zeros make x - shift exact for nearly every x: see coarse in csrc/math/batch_norm.h.
            grid = over(tl.where(live, tl.abs(values - center), 0.0), PLANES) / n * 131072.0
            shift = tl.where(grid < float("inf"), (center + grid) - grid, center)
            scale = tl.full(shift.shape, 1.0, tl.float32)
            sum_d = tl.zeros(shift.shape, tl.float32)
            sum_d2 = tl.zeros(shift.shape, tl.float32)
            again = 1
            while again > 0:
                d = tl.where(live, (values - shift) * scale, 0.0)
                all_d = d
                all_d2 = d * d
                for t in range(1, down * along):
                    at, here, _, _ = place(
                        group,
                        run + t // along * ROWS,
                        column + t % along * BLOCK,
                        runs,
                        units,
                        C,
                        total,
                        PLANES,
                        ALIGN,
                        TAIL,
                        ROWS,
                        BLOCK,
                    )
                    d = tl.where(here, (load(x, at, here) - shift) * scale, 0.0)
                    all_d += d
                    all_d2 += d * d
                sum_d = over(all_d, PLANES)
                sum_d2 = over(all_d2, PLANES)
                overflowed = (sum_d2 == float("inf")) & (scale == 1.0)
                again = tl.max(overflowed.to(tl.int32))
                scale = tl.where(overflowed, FITTED, scale)
            into, exists = partial_at(group, item, column, units, C, across, PLANES, ALIGN, BLOCK)
            kinds = plane_of(units, C, chunks, across, PLANES, ALIGN)
            tl.store(partial + into, shift, mask=exists)
            tl.store(partial + kinds + into, sum_d, mask=exists)
            tl.store(partial + 2 * kinds + into, sum_d2, mask=exists)
            tl.store(partial + 3 * kinds + into, 1.0 / scale, mask=exists)
            arrive(counter, counters + IDLE, LANES)
        elif phase == 1:
            wait(counter, chunks)
            c = (group * helpers + item) * HELPED + tl.arange(0, HELPED)[None, :]
            wide, wide_var = combine(
                partial,
                c,
                runs,
                units,
                C,
                inner,
                total,
                samples,
                across,
                down,
                along,
                chunks,
                PLANES,
                ALIGN,
                ROWS,
                BLOCK,
            )
            near = wide.to(tl.float32)
            off = (wide - near.to(tl.float64)).to(tl.float32)
            inverse = (1.0 / tl.sqrt(wide_var + eps)).to(tl.float32)
            spread = wide_var.to(tl.float32)
            store_channels(
                c, c < C, near, off, inverse, spread, samples, stats, running_mean, running_var, tracked, momentum, C
            )
            count_batch((group == 0) & (item == 0), tracked, momentum)
            arrive(counter, counters + IDLE, LANES)
        elif y is not None:
            wait(counter, chunks + helpers)
            mean = shared(stats, channel, mine)
            rest = shared(stats + C, channel, mine)
            rstd = shared(stats + 2 * C, channel, mine)
            scale, shift = forward_of(mean, rest, rstd, weight, bias, channel, mine)
            for t in range(down * along - 1, -1, -1):
                at, live, byte, live_byte = place(
                    group,
                    run + t // along * ROWS,
                    column + t % along * BLOCK,
                    runs,
                    units,
                    C,
                    total,
                    PLANES,
                    ALIGN,
                    TAIL,
                    ROWS,
                    BLOCK,
                )
                values = load_last(x, at, live)
                write_forward(
                    values, residual, y, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION
                )
    finish(counters, used, LANES)


# ---- one tile, backward ---------------------------------------------------------------------------------------------


@triton.jit
def gradient(dy, x, residual, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION: tl.constexpr):
    """g = dy activation'(z) of a tile, from the signs of z where these were kept, else from z made again."""
    g = load_last(dy, at, live)
    if signs is not None:
        bytes = tl.load(signs + byte, mask=live_byte, other=0).to(tl.int32)
        bits = (bytes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.where(tl.reshape(bits, [at.shape[0], at.shape[1]]) != 0, g, below(g, slope, ACTIVATION))
    elif ACTIVATION != IDENTITY:
        z = (x - mean) * scale + shift
        if residual is not None:
            z += load_last(residual, at, live)
        g = tl.where(live, activate_backward(g, z, slope, ACTIVATION), 0.0)
    return g


@triton.jit
def write_backward(g, x, dx, dresidual, at, live, mean, scale, offset, incline, TRAINING: tl.constexpr):
    if dresidual is not None:
        tl.store(dresidual + at, g, mask=live)
    if dx is not None:
        if TRAINING:
            tl.store(dx + at, scale * ((g - offset) - (x - mean) * incline), mask=live)
        else:
            tl.store(dx + at, scale * g, mask=live)


@triton.jit
def load_backward(stats, weight, bias, channel, mine, C):
    """mean, rest, rstd, and scale and shift of the forward."""
    mean, rest = load(stats, channel, mine), load(stats + C, channel, mine)
    rstd = load(stats + 2 * C, channel, mine)
    scale, shift = forward_of(mean, rest, rstd, weight, bias, channel, mine)
    return mean, rest, rstd, scale, shift


@triton.jit(do_not_specialize=SIZES)
def bwd_whole(
    dy,
    x,
    residual,
    weight,
    bias,
    stats,
    signs,
    given,
    dx,
    dresidual,
    dweight,
    dbias,
    slope,
    runs,
    units,
    C,
    inner,
    total,
    samples,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    column = 0 if PLANES else group * BLOCK
    channel, mine = channels_of(group, column, units, C, inner, PLANES, ALIGN, BLOCK)
    at, live, byte, live_byte = place(group, 0, column, runs, units, C, total, PLANES, ALIGN, TAIL, ROWS, BLOCK)
    mean, rest, rstd, scale, shift = load_backward(stats, weight, bias, channel, mine, C)
    values = load_last(x, at, live)
    g = gradient(dy, values, residual, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION)
    sum_g = over(g, PLANES)
    sum_gx = rstd * (over(g * (values - mean), PLANES) - rest * sum_g)
    if dbias is not None:
        tl.store(dbias + channel, sum_g, mask=mine)
    if dweight is not None:
        tl.store(dweight + channel, sum_gx, mask=mine)
    mean_g, mean_gx = sum_g / samples, sum_gx / samples
    if given is not None:
        mean_g, mean_gx = load(given, channel, mine), load(given + C, channel, mine)
    offset, incline = mean_g - rest * rstd * mean_gx, rstd * mean_gx
    write_backward(g, values, dx, dresidual, at, live, mean, scale, offset, incline, TRAINING)


# ---- a group split among programs, backward -------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def bwd_split(
    dy,
    x,
    residual,
    weight,
    bias,
    stats,
    signs,
    given,
    dx,
    dresidual,
    dweight,
    dbias,
    means,
    partial,
    counters,
    slope,
    runs,
    units,
    C,
    inner,
    total,
    samples,
    across,
    down,
    along,
    chunks,
    helpers,
    LAG,
    used,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    SUMS: tl.constexpr,
    LATER: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HELPED: tl.constexpr,
):
    """`partial` (2, chunks, columns): sums of g and g x^; `means` (2, C): those over whole channels, divided.

    SUMS: they are wanted. LATER: dx depends on them, so it takes a second pass over x and dy; else one pass does all.
    """
    if SUMS:
        groups = used - GROUPS
        group, item, phase = draw(counters, chunks, helpers, LAG, 3 if LATER else 2)
    else:
        group, item, phase = tl.program_id(0) // chunks, tl.program_id(0) % chunks, 0
        groups = tl.num_programs(0) // chunks
    if (group >= 0) & (group < groups):
        if phase == 1:
            if SUMS:
                wait(counters + GROUPS + group, chunks)
                c = (group * helpers + item) * HELPED + tl.arange(0, HELPED)[None, :]
                kinds = plane_of(units, C, chunks, across, PLANES, ALIGN)
                sum_g = tl.zeros([1, HELPED], tl.float64)
                sum_gx = tl.zeros([1, HELPED], tl.float64)
                for first in range(0, contributors(units, C, chunks, across, PLANES, ALIGN), depth(HELPED)):
                    at, exists, _ = contributor(
                        first, c, runs, units, C, inner, total, across, down, along, chunks, PLANES, ALIGN, ROWS, BLOCK
                    )
                    sum_g += tl.sum(shared(partial, at, exists).to(tl.float64), 0, keep_dims=True)
                    sum_gx += tl.sum(shared(partial + kinds, at, exists).to(tl.float64), 0, keep_dims=True)
                if dbias is not None:
                    tl.store(dbias + c, sum_g.to(tl.float32), mask=c < C)
                if dweight is not None:
                    tl.store(dweight + c, sum_gx.to(tl.float32), mask=c < C)
                if LATER:
                    tl.store(means + c, (sum_g / samples).to(tl.float32), mask=c < C)
                    tl.store(means + C + c, (sum_gx / samples).to(tl.float32), mask=c < C)
                    arrive(counters + GROUPS + group, counters + IDLE, LANES)
        else:
            run, column = corner(group, item, across, down, along, PLANES, ROWS, BLOCK)
            channel, mine = channels_of(group, column, units, C, inner, PLANES, ALIGN, BLOCK)
            mean, rest, rstd, scale, shift = load_backward(stats, weight, bias, channel, mine, C)
            offset = tl.zeros(mean.shape, tl.float32)
            incline = tl.zeros(mean.shape, tl.float32)
            if given is not None:
                mean_gx = load(given + C, channel, mine)
                offset, incline = load(given, channel, mine) - rest * rstd * mean_gx, rstd * mean_gx
            if LATER and phase == 2:
                wait(counters + GROUPS + group, chunks + helpers)
                mean_gx = shared(means + C, channel, mine)
                offset, incline = shared(means, channel, mine) - rest * rstd * mean_gx, rstd * mean_gx
            all_g = tl.zeros([ROWS, BLOCK], tl.float32)
            all_gx = tl.zeros([ROWS, BLOCK], tl.float32)
            tiles = down * along
            for step in range(0, tiles):
                t = tl.where(phase == 2, tiles - 1 - step, step)
                at, live, byte, live_byte = place(
                    group,
                    run + t // along * ROWS,
                    column + t % along * BLOCK,
                    runs,
                    units,
                    C,
                    total,
                    PLANES,
                    ALIGN,
                    TAIL,
                    ROWS,
                    BLOCK,
                )
                values = load(x, at, live)
                g = gradient(
                    dy, values, residual, signs, at, live, byte, live_byte, mean, scale, shift, slope, ACTIVATION
                )
                if SUMS:
                    all_g += g
                    all_gx += g * (values - mean)
                if LATER:
                    if phase == 2:
                        write_backward(g, values, dx, dresidual, at, live, mean, scale, offset, incline, TRAINING)
                else:
                    write_backward(g, values, dx, dresidual, at, live, mean, scale, offset, incline, TRAINING)
            if SUMS and phase == 0:
                into, exists = partial_at(group, item, column, units, C, across, PLANES, ALIGN, BLOCK)
                kinds = plane_of(units, C, chunks, across, PLANES, ALIGN)
                found = over(all_g, PLANES)
                tl.store(partial + into, found, mask=exists)
                tl.store(partial + kinds + into, rstd * (over(all_gx, PLANES) - rest * found), mask=exists)
                arrive(counters + GROUPS + group, counters + IDLE, LANES)
    if SUMS:
        finish(counters, used, LANES)
