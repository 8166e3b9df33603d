"""Triton kernels of distillation. Which runs when: distillation.py. Formulas: fusedtricks/ops/distillation.py.

The forward reads every logit of both models once: each lane keeps the running maxima and the sums below them, and lanes
are joined at the end of the row. The backward is elementwise: rows x blocks of classes.
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


# ---- kernels --------------------------------------------------------------------------------------------------------

SIZES = ["x_outer", "x_inner", "y_outer", "y_inner", "t_outer", "t_inner", "index_outer", "R", "columns"]
SIZES += ["ignore", "on", "off", "over", "soft", "hard"]


@triton.jit(do_not_specialize=SIZES)
def fwd(
    x, t, target, other, lam, weight, losses, mass, stats,
    x_outer, x_inner, x_step, t_outer, t_inner, t_step, index_outer, index_inner, inner, R, columns,
    weight_sum, ignore, on, off, over,
    HARD: tl.constexpr, BOTH: tl.constexpr, SMOOTH: tl.constexpr, ONE_LAM: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """x: the student, t: the teacher. ONCE: a row is one block. HARD: there is a cross-entropy. BOTH: the student's
    exponentials at the temperature 1 / over do not serve for it."""
    C = columns * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    t_at = at(row, inner, t_outer, t_inner, LEVELS) * ALIGN
    ref = tl.zeros([ROWS], tl.float32)
    if SMOOTH:
        # Any number near the logits: their sum is taken around it, lest a shift of the logits cost digits.
        first_z = tl.load(x + x_at, mask=live, other=0.0).to(tl.float32)
        ref = tl.where(tl.abs(first_z) < float("inf"), first_z, 0.0)
    top = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    t_top = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    u_total = tl.zeros([ROWS, BLOCK], tl.float32)
    t_total = tl.zeros([ROWS, BLOCK], tl.float32)
    cross = tl.zeros([ROWS, BLOCK], tl.float32)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(0, tl.cdiv(C, BLOCK)):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < C)[None, :]
        wide = cols.to(tl.int64)[None, :]
        z = tl.load(x + (x_at[:, None] + wide * x_step), mask=mask, other=float("-inf")).to(tl.float32)
        v = tl.load(t + (t_at[:, None] + wide * t_step), mask=mask, other=float("-inf")).to(tl.float32)
        if ONCE:
            top, t_top = z, v
            z_below = z - finite_or_zero(tl.max(z, 1))[:, None]
            v_below = v - finite_or_zero(tl.max(v, 1))[:, None]
        else:
            most, t_most = tl.maximum(top, z), tl.maximum(t_top, v)
            base, t_base = finite_or_zero(most), finite_or_zero(t_most)
            cross = shrunk_cross(cross, t_total, t_top - t_base, top - base, over)
            t_total = shrunk(t_total, (t_top - t_base) * over)
            u_total = shrunk(u_total, (top - base) * over)
            if BOTH:
                total = shrunk(total, top - base)
            top, t_top, z_below, v_below = most, t_most, z - base, v - t_base
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
        fall, t_fall = top - row_top[:, None], t_top - row_t_top[:, None]
        cross = shrunk_cross(cross, t_total, t_fall, fall, over)
        t_total = shrunk(t_total, t_fall * over)
        u_total = shrunk(u_total, fall * over)
        if BOTH:
            total = shrunk(total, fall)
    nan = float("nan")
    t_sum = tl.where(row_t_top == float("-inf"), nan, tl.sum(t_total, 1))
    u_sum = tl.where(row_top == float("-inf"), nan, tl.sum(u_total, 1))
    kl = over * (tl.sum(cross, 1) / t_sum) + tl.log(u_sum / t_sum)
    row_sum, q = u_sum, tl.zeros([ROWS], tl.float32)
    if BOTH:
        row_sum = tl.where(row_top == float("-inf"), nan, tl.sum(total, 1))
    if HARD:
        weights = tl.load(weight_sum) if weight is not None else tl.cast(C, tl.float32)
        loss, row_mass, q, _share, alive = of_labels(
            x, x_at, x_step, target, other, lam, weight, index, live, C, ref, row_top, tl.log(row_sum),
            tl.sum(rest, 1), weights, ignore, on, off, 1.0, 1.0, False, SMOOTH, ONE_LAM,
        )  # fmt: skip
        tl.store(losses + index, tl.where(alive, loss, 0.0), mask=live)
        tl.store(mass + index, row_mass, mask=live)
    plane = tl.cast(R, tl.int64)
    tl.store(stats + index, row_top, mask=live)
    tl.store(stats + plane + index, row_sum, mask=live)
    tl.store(stats + 2 * plane + index, q, mask=live)
    tl.store(stats + 3 * plane + index, row_t_top, mask=live)
    tl.store(stats + 4 * plane + index, t_sum, mask=live)
    tl.store(stats + 5 * plane + index, u_sum, mask=live)
    tl.store(stats + 6 * plane + index, kl, mask=live)


@triton.jit(do_not_specialize=SIZES)
def bwd(
    dloss, x, t, target, other, lam, weight, stats, total, y,
    x_outer, x_inner, x_step, y_outer, y_inner, y_step, t_outer, t_inner, t_step, index_outer, index_inner, inner,
    R, columns, ignore, on, off, over, soft, hard,
    HARD: tl.constexpr, BOTH: tl.constexpr, ONE_LAM: tl.constexpr, ONE_DLOSS: tl.constexpr, MEAN: tl.constexpr,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """soft, hard: what dloss is multiplied by in the two terms. MEAN: the cross-entropy is divided by `total`."""
    C = columns * ALIGN
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < C)[None, :]
    wide = cols.to(tl.int64)[None, :]
    x_at = (at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + wide * x_step
    t_at = (at(row, inner, t_outer, t_inner, LEVELS) * ALIGN)[:, None] + wide * t_step
    plane = tl.cast(R, tl.int64)
    top = tl.load(stats + index, mask=live, other=0.0)
    t_top = tl.load(stats + 3 * plane + index, mask=live, other=0.0)
    t_sum = tl.load(stats + 4 * plane + index, mask=live, other=1.0)
    u_sum = tl.load(stats + 5 * plane + index, mask=live, other=1.0)
    g = tl.zeros([ROWS], tl.float32) + tl.load(dloss + (index * 0 if ONE_DLOSS else index), mask=live, other=0.0)
    z = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32) - top[:, None]
    v = tl.load(t + t_at, mask=mask, other=0.0).to(tl.float32) - t_top[:, None]
    e = tl.exp(z * over)
    value = (g * soft / u_sum)[:, None] * e - (g * soft / t_sum)[:, None] * tl.exp(v * over)
    if HARD:
        row_sum = tl.load(stats + plane + index, mask=live, other=1.0)
        q_sum = tl.load(stats + 2 * plane + index, mask=live, other=0.0)
        g = g * hard
        if MEAN:
            g = g / tl.load(total)
        w = tl.full([BLOCK], 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + cols, mask=cols < C, other=0.0)
        a, b, mass_a, mass_b, share, alive = targets(target, other, lam, weight, index, live, ignore, C, ONE_LAM)
        gq = (g * off * share)[:, None] * w[None, :]
        gq += tl.where(wide == a[:, None], (g * on * mass_a)[:, None], 0.0)
        if other is not None:
            gq += tl.where(wide == b[:, None], (g * on * mass_b)[:, None], 0.0)
        if BOTH:
            e = tl.exp(z)
        value += tl.where(alive[:, None], (g * q_sum / row_sum)[:, None] * e - gq, 0.0)
    y_at = (at(row, inner, y_outer, y_inner, LEVELS) * ALIGN)[:, None] + wide * y_step
    tl.store(y + y_at, value, mask=mask)
