"""Triton kernels of distillation. Which runs when: distillation.py. Formulas: fusedtricks/ops/distillation.py.

The forward reads every logit of both models once: each lane keeps the running maxima and the sums below them, and lanes
are joined at the end of the row. A row may be shared by SPLITS programs, whose parts `join` combines in a fixed order.
The backward is elementwise: rows x blocks of classes.

A sparse teacher's entries, (R, K) classes and values, are read where a row is done: the forward meets the student at
them in the caches, and the backward stores their classes a second time, as a whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_entropy_kernels import at, of_labels, targets

# ---- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def finite_or_zero(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def shrunk(total, fall):
    """A sum of exponentials once the maximum below which they are taken has risen by -fall."""
    return tl.where(total == 0, 0.0, total * tl.exp(fall))


@triton.jit
def shrunk_cross(cross, total, fall, student_fall, over):
    """The same of the sum of e (v - z), e = exp(v over), where v and z are below maxima that rise by -fall and
    -student_fall. What the teacher gives no probability is left out by selection."""
    shrink = tl.exp(fall * over)
    return tl.where((total == 0) | (shrink == 0), 0.0, shrink * (cross + total * (fall - student_fall)))


@triton.jit
def entries(t, indices, index, live, block, K, C, KNOWN: tl.constexpr):
    """(class, value, is it a class, mask) of a block of a sparse teacher's entries. No class counts as class 0."""
    at_entry = block * KNOWN + tl.arange(0, KNOWN)
    mask = live[:, None] & (at_entry < K)[None, :]
    place = index[:, None] * K + at_entry[None, :]
    c = tl.load(indices + place, mask=mask, other=0).to(tl.int64)
    inside = (c >= 0) & (c < C)
    v = tl.load(t + place, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.where(inside, c, 0), v, inside, mask


@triton.jit
def known_sums(
    x, x_at, x_step, t, indices, index, live, K, C, top, over, ROWS: tl.constexpr, KNOWN: tl.constexpr
):  # fmt: skip
    """(maximum, sum of e, sum of e (v - z), is every index a class) of the entries of rows, e = exp(v over)."""
    t_top = tl.full([ROWS, KNOWN], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, KNOWN], tl.float32)
    cross = tl.zeros([ROWS, KNOWN], tl.float32)
    wrong = tl.zeros([ROWS, KNOWN], tl.int32)
    for block in range(0, tl.cdiv(K, KNOWN)):
        c, v, inside, mask = entries(t, indices, index, live, block, K, C, KNOWN)
        wrong += tl.where(inside, 0, 1)
        z = tl.load(x + (x_at[:, None] + c * x_step), mask=mask, other=0.0).to(tl.float32) - top[:, None]
        most = tl.maximum(t_top, v)
        base = finite_or_zero(most)
        cross = shrunk_cross(cross, total, t_top - base, 0.0, over)
        total = shrunk(total, (t_top - base) * over)
        e = tl.exp((v - base) * over)
        total += e
        cross += tl.where(e != 0, e * (v - base - z), 0.0)
        t_top = most
    row_top = tl.max(t_top, 1)
    fall = t_top - row_top[:, None]
    cross = shrunk_cross(cross, total, fall, 0.0, over)
    total = shrunk(total, fall * over)
    return row_top, tl.sum(total, 1), tl.sum(cross, 1), tl.max(wrong, 1) == 0


@triton.jit
def of_student(
    z, wide, w, u_slope, slope, off, a, at_a, b, at_b, alive, over, HARD: tl.constexpr, BOTH: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """The gradient at the classes `wide`, but for what the teacher takes away."""
    e = tl.exp(z * over)
    value = u_slope[:, None] * e
    if HARD:
        gq = off[:, None] * w + tl.where(wide == a[:, None], at_a[:, None], 0.0)
        if PAIR:
            gq += tl.where(wide == b[:, None], at_b[:, None], 0.0)
        if BOTH:
            e = tl.exp(z)
        value += tl.where(alive[:, None], slope[:, None] * e - gq, 0.0)
    return value


@triton.jit
def reference_logit(x, x_at, live):
    """Any number near the logits: their sum is taken around it, lest a shift of the logits cost digits."""
    first_z = tl.load(x + x_at, mask=live, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first_z) < float("inf"), first_z, 0.0)


@triton.jit
def finish(
    x, x_at, x_step, t, indices, target, other, lam, weight, losses, mass, stats, index, live, R, C, K, ref, top,
    u_sum, hard_sum, rest, t_top, t_sum, cross, weight_sum, ignore, on, off, over,
    HARD: tl.constexpr, BOTH: tl.constexpr, SMOOTH: tl.constexpr, ONE_LAM: tl.constexpr, ROWS: tl.constexpr,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """Loss, mass and statistics of whole rows from their sums, see `fwd`."""
    sound = live
    if KNOWN > 0:
        t_top, t_sum, cross, sound = known_sums(
            x, x_at, x_step, t, indices, index, live, K, C, finite_or_zero(top), over, ROWS, KNOWN
        )
    nan = float("nan")
    t_sum = tl.where(t_top == float("-inf"), nan, t_sum)
    # What is NaN of a teacher is NaN in the whole row, also where the teacher does not know the class.
    finite = sound & (top != float("-inf")) & (t_sum == t_sum)
    u_sum = tl.where(finite, u_sum, nan)
    kl = over * (cross / t_sum) + tl.log(u_sum / t_sum)
    row_sum, q = u_sum, tl.zeros([ROWS], tl.float32)
    if BOTH:
        row_sum = tl.where(finite, hard_sum, nan)
    if HARD:
        weights = tl.load(weight_sum) if weight is not None else tl.cast(C, tl.float32)
        loss, row_mass, q, _share, alive = of_labels(
            x, x_at, x_step, target, other, lam, weight, index, live, C, ref, top, tl.log(row_sum), rest, weights,
            ignore, on, off, 1.0, 1.0, False, SMOOTH, ONE_LAM,
        )  # fmt: skip
        tl.store(losses + index, tl.where(alive, loss, 0.0), mask=live)
        tl.store(mass + index, row_mass, mask=live)
    plane = tl.cast(R, tl.int64)
    tl.store(stats + index, top, mask=live)
    tl.store(stats + plane + index, row_sum, mask=live)
    tl.store(stats + 2 * plane + index, q, mask=live)
    tl.store(stats + 3 * plane + index, t_top, mask=live)
    tl.store(stats + 4 * plane + index, t_sum, mask=live)
    tl.store(stats + 5 * plane + index, u_sum, mask=live)
    tl.store(stats + 6 * plane + index, kl, mask=live)


# ---- kernels --------------------------------------------------------------------------------------------------------

SIZES = ["x_outer", "x_inner", "y_outer", "y_inner", "t_outer", "t_inner", "index_outer", "R", "columns"]
SIZES += ["ignore", "on", "off", "over", "soft", "hard", "K", "length"]


@triton.jit(do_not_specialize=SIZES)
def fwd(
    x, t, indices, target, other, lam, weight, losses, mass, stats, partial,
    x_outer, x_inner, x_step, t_outer, t_inner, t_step, index_outer, index_inner, inner, R, columns, K, length,
    weight_sum, ignore, on, off, over,
    HARD: tl.constexpr, BOTH: tl.constexpr, SMOOTH: tl.constexpr, ONE_LAM: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ONCE: tl.constexpr,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """x: the student, t: the teacher. `length` blocks of a row for each of SPLITS programs. ONCE: a row is one block.
    HARD: there is a cross-entropy. BOTH: the student's exponentials at the temperature 1 / over do not serve for it.
    KNOWN: a sparse teacher's entries at once, else 0."""
    C = columns * ALIGN
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    t_at = at(row, inner, t_outer, t_inner, LEVELS) * ALIGN
    ref = tl.zeros([ROWS], tl.float32)
    if SMOOTH:
        ref = reference_logit(x, x_at, live)
    top = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    t_top = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    u_total = tl.zeros([ROWS, BLOCK], tl.float32)
    t_total = tl.zeros([ROWS, BLOCK], tl.float32)
    cross = tl.zeros([ROWS, BLOCK], tl.float32)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(split * length, tl.minimum(split * length + length, tl.cdiv(C, BLOCK))):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < C)[None, :]
        wide = cols.to(tl.int64)[None, :]
        z = tl.load(x + (x_at[:, None] + wide * x_step), mask=mask, other=float("-inf")).to(tl.float32)
        if KNOWN == 0:
            v = tl.load(t + (t_at[:, None] + wide * t_step), mask=mask, other=float("-inf")).to(tl.float32)
        if ONCE:
            top = z
            z_below = z - finite_or_zero(tl.max(z, 1))[:, None]
            if KNOWN == 0:
                t_top = v
                v_below = v - finite_or_zero(tl.max(v, 1))[:, None]
        else:
            most = tl.maximum(top, z)
            base = finite_or_zero(most)
            if KNOWN == 0:
                t_most = tl.maximum(t_top, v)
                t_base = finite_or_zero(t_most)
                cross = shrunk_cross(cross, t_total, t_top - t_base, top - base, over)
                t_total = shrunk(t_total, (t_top - t_base) * over)
                t_top, v_below = t_most, v - t_base
            u_total = shrunk(u_total, (top - base) * over)
            if BOTH:
                total = shrunk(total, top - base)
            top, z_below = most, z - base
        if KNOWN == 0:
            e = tl.exp(v_below * over)
            t_total += e
            cross += tl.where(e != 0, e * (v_below - z_below), 0.0)
        u_total += tl.exp(z_below * over)
        if BOTH:
            total += tl.exp(z_below)
        if SMOOTH:
            w = tl.full([BLOCK], 1.0, tl.float32)
            if weight is not None:
                w = tl.load(weight + cols, mask=cols < C, other=0.0)
            rest += tl.where(mask & (w != 0)[None, :], w[None, :] * (z - ref[:, None]), 0.0)
    row_top, row_t_top = tl.max(top, 1), tl.max(t_top, 1)
    if not ONCE:
        fall = top - row_top[:, None]
        u_total = shrunk(u_total, fall * over)
        if BOTH:
            total = shrunk(total, fall)
        if KNOWN == 0:
            t_fall = t_top - row_t_top[:, None]
            cross = shrunk_cross(cross, t_total, t_fall, fall, over)
            t_total = shrunk(t_total, t_fall * over)
    u_sum, hard_sum, row_rest = tl.sum(u_total, 1), tl.sum(total, 1), tl.sum(rest, 1)
    t_sum, row_cross = tl.sum(t_total, 1), tl.sum(cross, 1)
    if SPLITS == 1:
        finish(
            x, x_at, x_step, t, indices, target, other, lam, weight, losses, mass, stats, index, live, R, C, K, ref,
            row_top, u_sum, hard_sum, row_rest, row_t_top, t_sum, row_cross, weight_sum, ignore, on, off, over,
            HARD, BOTH, SMOOTH, ONE_LAM, ROWS, KNOWN,
        )  # fmt: skip
    else:
        part = partial + row.to(tl.int64) * SPLITS + split
        plane = tl.cast(R, tl.int64) * SPLITS
        tl.store(part, row_top, mask=live)
        tl.store(part + plane, u_sum, mask=live)
        if BOTH:
            tl.store(part + 2 * plane, hard_sum, mask=live)
        if SMOOTH:
            tl.store(part + 3 * plane, row_rest, mask=live)
        if KNOWN == 0:
            tl.store(part + 4 * plane, row_t_top, mask=live)
            tl.store(part + 5 * plane, t_sum, mask=live)
            tl.store(part + 6 * plane, row_cross, mask=live)


@triton.jit(do_not_specialize=SIZES)
def join(
    x, t, indices, target, other, lam, weight, losses, mass, stats, partial,
    x_outer, x_inner, x_step, index_outer, index_inner, inner, R, columns, K, weight_sum, ignore, on, off, over,
    HARD: tl.constexpr, BOTH: tl.constexpr, SMOOTH: tl.constexpr, ONE_LAM: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The rows from their SPLITS parts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    ref = tl.zeros([ROWS], tl.float32)
    if SMOOTH:
        ref = reference_logit(x, x_at, live)
    parts = tl.arange(0, PARTS)
    mask = live[:, None] & (parts < SPLITS)[None, :]
    part = partial + row.to(tl.int64)[:, None] * SPLITS + parts[None, :]
    plane = tl.cast(R, tl.int64) * SPLITS
    top = tl.load(part, mask=mask, other=float("-inf"))
    row_top = tl.max(top, 1)
    fall = top - row_top[:, None]
    u_sum = tl.sum(shrunk(tl.load(part + plane, mask=mask, other=0.0), fall * over), 1)
    hard_sum, rest, t_top, t_sum, cross = u_sum, u_sum, u_sum, u_sum, u_sum
    if BOTH:
        hard_sum = tl.sum(shrunk(tl.load(part + 2 * plane, mask=mask, other=0.0), fall), 1)
    if SMOOTH:
        rest = tl.sum(tl.load(part + 3 * plane, mask=mask, other=0.0), 1)
    if KNOWN == 0:
        t_tops = tl.load(part + 4 * plane, mask=mask, other=float("-inf"))
        t_sums = tl.load(part + 5 * plane, mask=mask, other=0.0)
        crosses = tl.load(part + 6 * plane, mask=mask, other=0.0)
        t_top = tl.max(t_tops, 1)
        t_fall = t_tops - t_top[:, None]
        t_sum = tl.sum(shrunk(t_sums, t_fall * over), 1)
        cross = tl.sum(shrunk_cross(crosses, t_sums, t_fall, fall, over), 1)
    finish(
        x, x_at, x_step, t, indices, target, other, lam, weight, losses, mass, stats, index, live, R, columns * ALIGN,
        K, ref, row_top, u_sum, hard_sum, rest, t_top, t_sum, cross, weight_sum, ignore, on, off, over,
        HARD, BOTH, SMOOTH, ONE_LAM, ROWS, KNOWN,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def bwd(
    dloss, x, t, indices, target, other, lam, weight, stats, total, y,
    x_outer, x_inner, x_step, y_outer, y_inner, y_step, t_outer, t_inner, t_step, index_outer, index_inner, inner,
    R, columns, K, ignore, on, off, over, soft, hard,
    HARD: tl.constexpr, BOTH: tl.constexpr, ONE_LAM: tl.constexpr, ONE_DLOSS: tl.constexpr, MEAN: tl.constexpr,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    LENGTH: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """soft, hard: what dloss is multiplied by in the two terms. MEAN: the cross-entropy is divided by `total`. LENGTH
    blocks of classes for each of BLOCKS programs. KNOWN: a sparse teacher's entries at once, else 0."""
    C = columns * ALIGN
    tile, part = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    y_at = at(row, inner, y_outer, y_inner, LEVELS) * ALIGN
    t_at = at(row, inner, t_outer, t_inner, LEVELS) * ALIGN
    plane = tl.cast(R, tl.int64)
    top = tl.load(stats + index, mask=live, other=0.0)
    t_top = tl.load(stats + 3 * plane + index, mask=live, other=0.0)
    t_sum = tl.load(stats + 4 * plane + index, mask=live, other=1.0)
    u_sum = tl.load(stats + 5 * plane + index, mask=live, other=1.0)
    g = tl.zeros([ROWS], tl.float32) + tl.load(dloss + (index * 0 if ONE_DLOSS else index), mask=live, other=0.0)
    u_slope, t_slope = g * soft / u_sum, g * soft / t_sum
    a, b, at_a, at_b, slope, g_off, alive = index, index, g, g, g, g, live
    if HARD:
        row_sum = tl.load(stats + plane + index, mask=live, other=1.0)
        q_sum = tl.load(stats + 2 * plane + index, mask=live, other=0.0)
        g = g * hard
        if MEAN:
            g = g / tl.load(total)
        a, b, mass_a, mass_b, share, alive = targets(target, other, lam, weight, index, live, ignore, C, ONE_LAM)
        at_a, at_b, slope, g_off = g * on * mass_a, g * on * mass_b, g * q_sum / row_sum, g * off * share
    PAIR: tl.constexpr = other is not None
    for i in range(0, LENGTH):
        cols = (part * LENGTH + i) * BLOCK + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < C)[None, :]
        wide = cols.to(tl.int64)[None, :]
        z = tl.load(x + (x_at[:, None] + wide * x_step), mask=mask, other=0.0).to(tl.float32) - top[:, None]
        w = tl.full([BLOCK], 1.0, tl.float32)
        if HARD and weight is not None:
            w = tl.load(weight + cols, mask=(cols < C) & (off != 0), other=0.0)
        value = of_student(
            z, wide, w[None, :], u_slope, slope, g_off, a, at_a, b, at_b, alive, over, HARD, BOTH, PAIR
        )  # fmt: skip
        if KNOWN == 0:
            v = tl.load(t + (t_at[:, None] + wide * t_step), mask=mask, other=0.0).to(tl.float32) - t_top[:, None]
            value -= t_slope[:, None] * tl.exp(v * over)
        tl.store(y + (y_at[:, None] + wide * y_step), value, mask=mask)
    if KNOWN > 0:
        # What follows is stored over what other threads of the program have stored.
        tl.debug_barrier()
        first = part * LENGTH * BLOCK
        for block in range(0, tl.cdiv(K, KNOWN)):
            c, _v, _inside, mask = entries(t, indices, index, live, block, K, C, KNOWN)
            mask = mask & (c >= first) & (c < first + LENGTH * BLOCK)
            # All entries of a class store the same.
            e = tl.zeros([ROWS, KNOWN], tl.float32)
            for k in range(0, K):
                other_c = tl.load(indices + (index * K + k), mask=live, other=0).to(tl.int64)
                other_v = tl.load(t + (index * K + k), mask=live, other=0.0).to(tl.float32)
                e += tl.where(c == other_c[:, None], tl.exp((other_v - t_top) * over)[:, None], 0.0)
            z = tl.load(x + (x_at[:, None] + c * x_step), mask=mask, other=0.0).to(tl.float32) - top[:, None]
            w = tl.full([ROWS, KNOWN], 1.0, tl.float32)
            if HARD and weight is not None:
                w = tl.load(weight + c, mask=mask & (off != 0), other=0.0)
            value = of_student(z, c, w, u_slope, slope, g_off, a, at_a, b, at_b, alive, over, HARD, BOTH, PAIR)
            tl.store(y + (y_at[:, None] + c * y_step), value - t_slope[:, None] * e, mask=mask)
