"""Triton kernels of cross-entropy. Which runs when: cross_entropy.py. Formulas: fusedtricks/ops/cross_entropy.py.

The forward reads every logit once, whatever the number of classes: each lane keeps a running maximum and the sum of
exponentials below it, and lanes are joined at the end of the row. A row may be shared by SPLITS programs, whose parts
`join` combines in a fixed order. The backward is elementwise: rows x blocks of classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def tanh(x):
    square = x * x
    p = 0.00229274481618
    p = p * square - 0.00834394551584
    p = p * square + 0.021768918651
    p = p * square - 0.0539592594772
    p = p * square + 0.133333035569
    p = p * square - 0.333333331721
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * square * p, tl.where(x < 0, -far, far))


@triton.jit
def scaled(x, softcap, scale, CAP: tl.constexpr):
    if CAP:
        x = softcap * tanh(x / softcap)
    return x * scale


@triton.jit
def half(labels, index, live, m, weight, ignore, C):
    """(label, m where kept, m w[label] where kept). A label that is no class has a weight of NaN."""
    label = tl.load(labels + index, mask=live, other=0).to(tl.int64)
    kept = live & (label != ignore)
    inside = (label >= 0) & (label < C)
    safe = tl.where(inside, label, 0)
    w = tl.full(safe.shape, 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + safe, mask=kept, other=0.0)
    w = tl.where(inside, w, float("nan"))
    share = tl.where(kept, m, 0.0)
    return safe, share, tl.where(kept, share * w, 0.0)


@triton.jit
def targets(target, other, lam, weight, index, live, ignore, C, ONE_LAM: tl.constexpr):
    """(a, b, mass of a, mass of b, share) of the rows."""
    m = tl.full(index.shape, 1.0, tl.float32)
    if lam is not None:
        m = m * tl.load(lam + (index * 0 if ONE_LAM else index), mask=live, other=0.0)
    a, share_a, mass_a = half(target, index, live, m, weight, ignore, C)
    if other is None:
        return a, a, mass_a, tl.zeros(index.shape, tl.float32), share_a, share_a != 0
    else:
        b, share_b, mass_b = half(other, index, live, 1.0 - m, weight, ignore, C)
        return a, b, mass_a, mass_b, share_a + share_b, (share_a != 0) | (share_b != 0)


@triton.jit
def of_labels(
    x, x_at, x_step, target, other, lam, weight, index, live, C, ref, top, logsum, rest, weights, ignore, on, off,
    softcap, scale, CAP: tl.constexpr, SMOOTH: tl.constexpr, ONE_LAM: tl.constexpr,
):  # fmt: skip
    """(loss, mass, Q, share, alive) of rows whose targets are labels. weights: the sum of w over the classes."""
    a, b, mass_a, mass_b, share, alive = targets(target, other, lam, weight, index, live, ignore, C, ONE_LAM)
    mass = mass_a + mass_b
    q = on * mass + tl.where(off * share != 0, off * share * weights, 0.0)  # weights need not be finite
    za = scaled(tl.load(x + x_at + a * x_step, mask=live, other=0.0).to(tl.float32), softcap, scale, CAP) - top
    inner = tl.where(on * mass_a != 0, on * mass_a * za, 0.0)
    if other is not None:
        zb = scaled(tl.load(x + x_at + b * x_step, mask=live, other=0.0).to(tl.float32), softcap, scale, CAP) - top
        inner += tl.where(on * mass_b != 0, on * mass_b * zb, 0.0)
    if SMOOTH:
        inner += tl.where(share != 0, off * share * (rest - weights * (top - ref)), 0.0)
    return q * logsum - inner, mass, q, share, alive


@triton.jit
def finish(
    x, x_at, x_step, target, other, lam, weight, losses, mass, stats, index, live, R, C, ref, top, total, rest, q,
    weight_sum, ignore, on, off, z_loss, softcap, scale, CAP: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr,
    ONE_LAM: tl.constexpr,
):  # fmt: skip
    """Loss, mass and statistics of whole rows. rest: sum of w (z - ref), or of q (z - ref)."""
    weights = tl.load(weight_sum) if weight is not None else tl.cast(C, tl.float32)
    total = tl.where(top == float("-inf"), float("nan"), total)
    logsum = tl.log(total)
    lse = top + logsum
    if SOFT:
        loss = q * logsum - (rest - tl.where(q != 0, q * (top - ref), 0.0))
        loss += tl.where(z_loss != 0, z_loss * lse * lse, 0.0)
        row_mass = tl.full(index.shape, 1.0, tl.float32)
    else:
        loss, row_mass, q, share, alive = of_labels(
            x, x_at, x_step, target, other, lam, weight, index, live, C, ref, top, logsum, rest, weights, ignore, on,
            off, softcap, scale, CAP, SMOOTH, ONE_LAM,
        )  # fmt: skip
        loss += tl.where(z_loss != 0, z_loss * share * lse * lse, 0.0)
        loss = tl.where(alive, loss, 0.0)
    tl.store(losses + index, loss, mask=live)
    tl.store(mass + index, row_mass, mask=live)
    tl.store(stats + index, top, mask=live)
    plane = tl.cast(R, tl.int64)
    tl.store(stats + plane + index, total, mask=live)
    tl.store(stats + 2 * plane + index, q, mask=live)


# ---- kernels --------------------------------------------------------------------------------------------------------

SIZES = ["x_outer", "x_inner", "y_outer", "y_inner", "t_outer", "t_inner", "index_outer", "R", "columns", "length"]
SIZES += ["ignore", "on", "off", "z_loss", "softcap", "scale"]


@triton.jit(do_not_specialize=SIZES)
def fwd(
    x, target, other, lam, weight, losses, mass, stats, partial,
    x_outer, x_inner, x_step, t_outer, t_inner, t_step, index_outer, index_inner, inner, R, columns, length,
    weight_sum, ignore, on, off, z_loss, softcap, scale,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr, ONE_LAM: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """`length` blocks of a row for each of SPLITS programs. ONCE: a row is one block."""
    C = columns * ALIGN
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    t_at = at(row, inner, t_outer, t_inner, LEVELS) * ALIGN
    ref = tl.zeros([ROWS], tl.float32)
    if SMOOTH or SOFT:
        # Any number near the logits: their sum is taken around it, lest a shift of the logits cost digits.
        first_z = scaled(tl.load(x + x_at, mask=live, other=0.0).to(tl.float32), softcap, scale, CAP)
        ref = tl.where(tl.abs(first_z) < float("inf"), first_z, 0.0)
    top = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    q = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(split * length, tl.minimum(split * length + length, tl.cdiv(C, BLOCK))):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < C)[None, :]
        raw = tl.load(x + (x_at[:, None] + cols.to(tl.int64)[None, :] * x_step), mask=mask, other=0.0).to(tl.float32)
        z = scaled(raw, softcap, scale, CAP)
        below = tl.where(mask, z, float("-inf"))
        if ONCE:
            top = below
            most = tl.max(below, 1)[:, None]
            total = tl.exp(below - tl.where(most == float("-inf"), 0.0, most))
        else:
            most = tl.maximum(top, below)
            base = tl.where(most == float("-inf"), 0.0, most)
            total = total * tl.exp(top - base) + tl.exp(below - base)
            top = most
        if SMOOTH or SOFT:
            w = tl.full([BLOCK], 1.0, tl.float32)
            if weight is not None:
                w = tl.load(weight + cols, mask=cols < C, other=0.0)
            centred = z - ref[:, None]
            if SOFT:
                p = tl.load(target + (t_at[:, None] + cols.to(tl.int64)[None, :] * t_step), mask=mask, other=0.0)
                here = tl.where(mask, (on * p.to(tl.float32) + off) * w[None, :], 0.0)
                rest += tl.where(here != 0, here * centred, 0.0)
                q += here
            else:
                rest += tl.where(mask & (w != 0)[None, :], w[None, :] * centred, 0.0)
    row_top = tl.max(top, 1)
    if not ONCE:
        total = tl.where(total == 0, 0.0, total * tl.exp(top - row_top[:, None]))
    row_total, row_rest, row_q = tl.sum(total, 1), tl.sum(rest, 1), tl.sum(q, 1)
    if SPLITS == 1:
        finish(
            x, x_at, x_step, target, other, lam, weight, losses, mass, stats, index, live, R, C, ref, row_top,
            row_total, row_rest, row_q, weight_sum, ignore, on, off, z_loss, softcap, scale, CAP, SMOOTH, SOFT, ONE_LAM,
        )  # fmt: skip
    else:
        part = partial + row.to(tl.int64) * SPLITS + split
        plane = tl.cast(R, tl.int64) * SPLITS
        tl.store(part, row_top, mask=live)
        tl.store(part + plane, row_total, mask=live)
        tl.store(part + 2 * plane, row_rest, mask=live)
        tl.store(part + 3 * plane, row_q, mask=live)


@triton.jit(do_not_specialize=SIZES)
def join(
    x, target, other, lam, weight, losses, mass, stats, partial,
    x_outer, x_inner, x_step, t_outer, t_inner, t_step, index_outer, index_inner, inner, R, columns, length,
    weight_sum, ignore, on, off, z_loss, softcap, scale,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr, ONE_LAM: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The rows from their SPLITS parts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    x_at = at(row, inner, x_outer, x_inner, LEVELS) * ALIGN
    ref = tl.zeros([ROWS], tl.float32)
    if SMOOTH or SOFT:
        first_z = scaled(tl.load(x + x_at, mask=live, other=0.0).to(tl.float32), softcap, scale, CAP)
        ref = tl.where(tl.abs(first_z) < float("inf"), first_z, 0.0)
    parts = tl.arange(0, PARTS)
    mask = live[:, None] & (parts < SPLITS)[None, :]
    part = partial + row.to(tl.int64)[:, None] * SPLITS + parts[None, :]
    plane = tl.cast(R, tl.int64) * SPLITS
    top = tl.load(part, mask=mask, other=float("-inf"))
    total = tl.load(part + plane, mask=mask, other=0.0)
    row_top = tl.max(top, 1)
    total = tl.sum(tl.where(total == 0, 0.0, total * tl.exp(top - row_top[:, None])), 1)
    rest = tl.sum(tl.load(part + 2 * plane, mask=mask, other=0.0), 1)
    q = tl.sum(tl.load(part + 3 * plane, mask=mask, other=0.0), 1)
    finish(
        x, x_at, x_step, target, other, lam, weight, losses, mass, stats, index, live, R, columns * ALIGN, ref, row_top,
        total, rest, q, weight_sum, ignore, on, off, z_loss, softcap, scale, CAP, SMOOTH, SOFT, ONE_LAM,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def bwd(
    dloss, dlse, x, target, other, lam, weight, stats, total, y,
    x_outer, x_inner, x_step, y_outer, y_inner, y_step, t_outer, t_inner, t_step, index_outer, index_inner, inner,
    R, columns, ignore, on, off, z_loss, softcap, scale,
    CAP: tl.constexpr, SOFT: tl.constexpr, ONE_LAM: tl.constexpr, ONE_DLOSS: tl.constexpr, MEAN: tl.constexpr,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    C = columns * ALIGN
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < R
    index = at(row, inner, index_outer, index_inner, LEVELS)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < C)[None, :]
    wide = cols.to(tl.int64)[None, :]
    raw = tl.load(
        x + ((at(row, inner, x_outer, x_inner, LEVELS) * ALIGN)[:, None] + wide * x_step), mask=mask, other=0.0
    )
    raw = raw.to(tl.float32)
    top = tl.load(stats + index, mask=live, other=0.0)
    plane = tl.cast(R, tl.int64)
    row_sum = tl.load(stats + plane + index, mask=live, other=1.0)
    q_sum = tl.load(stats + 2 * plane + index, mask=live, other=0.0)
    g = tl.zeros([ROWS], tl.float32) + tl.load(dloss + (index * 0 if ONE_DLOSS else index), mask=live, other=0.0)
    if MEAN:
        g = g / tl.load(total)
    w = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + cols, mask=cols < C, other=0.0)
    share, alive = tl.full([ROWS], 1.0, tl.float32), live
    if SOFT:
        p = tl.load(
            target + ((at(row, inner, t_outer, t_inner, LEVELS) * ALIGN)[:, None] + wide * t_step), mask=mask, other=0.0
        )
        gq = g[:, None] * (on * p.to(tl.float32) + off) * w[None, :]
    else:
        a, b, mass_a, mass_b, share, alive = targets(target, other, lam, weight, index, live, ignore, C, ONE_LAM)
        gq = (g * off * share)[:, None] * tl.where(off != 0, w, 0.0)[None, :]
        gq += tl.where(wide == a[:, None], (g * on * mass_a)[:, None], 0.0)
        if other is not None:
            gq += tl.where(wide == b[:, None], (g * on * mass_b)[:, None], 0.0)
    k = q_sum
    if z_loss != 0:
        k += 2.0 * z_loss * share * (top + tl.log(row_sum))
    k = tl.where(alive, g * k, 0.0)
    gq = tl.where(alive[:, None], gq, 0.0)
    if dlse is not None:
        k += tl.load(dlse + index, mask=live, other=0.0)
    else:
        # What a dead row holds must not reach its gradient.
        raw = tl.where(alive[:, None], raw, 0.0)
        row_sum = tl.where(alive, row_sum, 1.0)
        top = tl.where(alive, top, 0.0)
    value = (k / row_sum)[:, None] * tl.exp(scaled(raw, softcap, scale, CAP) - top[:, None]) - gq
    if CAP:
        t = tanh(raw / softcap)
        value = value * (1.0 - t * t)
    value = value * scale
    tl.store(y + ((at(row, inner, y_outer, y_inner, LEVELS) * ALIGN)[:, None] + wide * y_step), value, mask=mask)
