"""Mixing a batch with a permutation of itself, in Triton: what mixup and cutmix share.

A program holds some columns of every sample on chip, so each sample is read once and written once whatever the
permutation, and mixing in place is safe. Batches of more samples than fit are mixed sample by sample; the partner is
then read again, from L2 where its columns were read shortly before.

Forward and backward go over the samples j with their partners i = perm[j]: forward writes sample j, backward sample i.
A partner outside the batch makes its sample NaN, and has no gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Launch

MOST_SAMPLES = 512
BYTES = 32768  # of a program that holds columns of every sample
COLUMNS = 1024  # of a program that mixes a part of one sample


@triton.jit
def of_partner(value, pointer, at, partner, live, ON_CHIP: tl.constexpr):
    """`value` of each sample's partner, at pointer + at."""
    if ON_CHIP:
        return tl.gather(value, partner, 0)
    else:
        return tl.load(pointer + at, mask=live, other=0)


@triton.jit
def within(edges_low, edges_high, place):
    return (place[None, :] >= edges_low[:, None]) & (place[None, :] < edges_high[:, None])


@triton.jit
def edges(box, sample, live):
    """Top, bottom, left and right of the boxes of these samples."""
    return (
        tl.load(box + sample * 4, mask=live, other=0).to(tl.int32),
        tl.load(box + sample * 4 + 1, mask=live, other=0).to(tl.int32),
        tl.load(box + sample * 4 + 2, mask=live, other=0).to(tl.int32),
        tl.load(box + sample * 4 + 3, mask=live, other=0).to(tl.int32),
    )


@triton.jit
def weights(lam, box, sample, partner, live, ONE: tl.constexpr, BACKWARD: tl.constexpr, ON_CHIP: tl.constexpr):
    """What `mixed` needs of each sample, and of its partner: lam (as the first of four) or the edges of the box."""
    if ONE:
        sample, partner = tl.zeros_like(sample), tl.zeros_like(partner)
    if lam is not None:
        weight = tl.load(lam + sample, mask=live, other=0.0)
        mine = (weight, weight, weight, weight)
        theirs = mine
        if BACKWARD and not ONE:
            weight = of_partner(weight, lam, partner, partner, live, ON_CHIP)
            theirs = (weight, weight, weight, weight)
    else:
        mine = edges(box, sample, live)
        theirs = mine
        if BACKWARD and not ONE:
            theirs = (
                of_partner(mine[0], box, partner * 4, partner, live, ON_CHIP).to(tl.int32),
                of_partner(mine[1], box, partner * 4 + 1, partner, live, ON_CHIP).to(tl.int32),
                of_partner(mine[2], box, partner * 4 + 2, partner, live, ON_CHIP).to(tl.int32),
                of_partner(mine[3], box, partner * 4 + 3, partner, live, ON_CHIP).to(tl.int32),
            )
    return mine, theirs


@triton.jit
def mixed(value, other, mine, theirs, column, lam, scale, shift, channels, inner, H, W, BACKWARD: tl.constexpr):
    """The formulas of fusedtricks/ops/mixup.py (`lam` given) and cutmix.py, of samples and their partners.

    Of cutmix, a line has W pixels of `inner` elements and an image H lines.
    """
    if lam is not None:
        value, other = value.to(tl.float32), other.to(tl.float32)
        if BACKWARD:
            result = theirs[0][:, None] * other + (1 - mine[0])[:, None] * value
        else:
            result = mine[0][:, None] * value + (1 - mine[0])[:, None] * other
        if scale is not None:
            channel = (column // inner) % channels
            result = result * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
    else:
        x, y = (column // inner) % W, (column // (inner * W)) % H
        inside = within(mine[0], mine[1], y) & within(mine[2], mine[3], x)
        if BACKWARD:
            cut = within(theirs[0], theirs[1], y) & within(theirs[2], theirs[3], x)
            result = tl.where(cut, 0.0, other.to(tl.float32)) + tl.where(inside, value.to(tl.float32), 0.0)
        else:
            result = tl.where(inside, other.to(tl.float32), value.to(tl.float32))
    return result


# One compiled kernel serves every size; `D_of` counts ALIGN elements, for vector accesses.
SIZES = ["N", "D_of", "channels", "inner", "H", "W", "chunks"]


@triton.jit(do_not_specialize=SIZES)
def mix_columns(
    x, y, lam, perm, box, scale, shift, N, D_of, channels, inner, H, W,
    ONE: tl.constexpr, BACKWARD: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
):  # fmt: skip
    D = D_of * ALIGN
    sample = tl.arange(0, ROWS)
    live = sample < N
    partner = tl.load(perm + sample, mask=live, other=0).to(tl.int32)
    exists = (partner >= 0) & (partner < N)
    partner = tl.where(exists, partner, 0)
    mine, theirs = weights(lam, box, sample, partner, live, ONE, BACKWARD, True)
    for strip in range(STRIPS):
        column = (tl.program_id(0) * STRIPS + strip) * COLUMNS + tl.arange(0, COLUMNS)
        mask = live[:, None] & (column < D)[None, :]
        at = sample.to(tl.int64)[:, None] * D + column[None, :]
        value = tl.load(x + at, mask=mask, other=0)
        # The barrier inside gather also keeps stores behind every load, which makes mixing in place safe.
        other = tl.gather(value, tl.broadcast_to(partner[:, None], (ROWS, COLUMNS)), 0)
        result = mixed(value, other, mine, theirs, column, lam, scale, shift, channels, inner, H, W, BACKWARD)
        if BACKWARD:
            to = partner.to(tl.int64)[:, None] * D + column[None, :]
            tl.store(y + to, result, mask=mask & exists[:, None])
        else:
            tl.store(y + at, tl.where(exists[:, None], result, float("nan")), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mix_samples(
    x, y, lam, perm, box, scale, shift, N, D_of, channels, inner, H, W, chunks,
    ONE: tl.constexpr, BACKWARD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    D = D_of * ALIGN
    sample = tl.program_id(0) % N + tl.arange(0, 1)  # the same columns of all samples one after the other
    column = tl.program_id(0) // N * COLUMNS + tl.arange(0, COLUMNS)
    live, mask = sample < N, (column < D)[None, :]
    partner = tl.load(perm + sample).to(tl.int32)
    exists = (partner >= 0) & (partner < N)
    partner = tl.where(exists, partner, 0)
    at = sample.to(tl.int64)[:, None] * D + column[None, :]
    to = partner.to(tl.int64)[:, None] * D + column[None, :]
    mine, theirs = weights(lam, box, sample, partner, live, ONE, BACKWARD, False)
    value, other = tl.load(x + at, mask=mask, other=0), tl.load(x + to, mask=mask, other=0)
    result = mixed(value, other, mine, theirs, column, lam, scale, shift, channels, inner, H, W, BACKWARD)
    if BACKWARD:
        tl.store(y + to, result, mask=mask & exists[:, None])
    else:
        tl.store(y + at, tl.where(exists[:, None], result, float("nan")), mask=mask)


def dense_samples(x: Tensor, y: Tensor) -> bool:
    """Are both one dense sample after the other, with elements in the same order?"""
    if x.stride() != y.stride() and not (x.is_contiguous() and y.is_contiguous()):
        return False
    if x.is_contiguous():
        return True
    levels = sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size > 1)
    expected = 1
    for stride, size in levels:
        if stride != expected:
            return False
        expected *= size
    return x.shape[0] == 1 or x.stride(0) == expected


def plan(
    x: Tensor,
    y: Tensor,
    perm: Tensor,
    *,
    lam: Tensor | None = None,
    box: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backward: bool = False,
) -> Launch:
    """For dense samples. Of mixup `inner` is the stride of channels, of cutmix the elements of a pixel."""
    N, D = x.shape[0], x.numel() // x.shape[0]
    align = common.alignment(D)
    args = {"x": x, "y": y, "lam": lam, "perm": perm, "box": box, "scale": scale, "shift": shift, "N": N}
    args |= {
        "D_of": D // align,
        "ALIGN": align,
        "BACKWARD": backward,
        "ONE": (box if lam is None else lam).shape[0] == 1,
    }
    args |= {"channels": 1, "inner": 1, "H": 1, "W": 1}
    if scale is not None:
        args |= {"channels": x.shape[1], "inner": x.stride(1) if x.shape[1] > 1 else 1}
    if box is not None:
        H, W = x.shape[-2:]
        args |= {"inner": 1 if x.is_contiguous() else D // max(H * W, 1), "H": H, "W": W}
    if N <= MOST_SAMPLES:
        rows = triton.next_power_of_2(N)
        # Both boxes of the backward of cutmix take registers.
        elements = BYTES // (2 if backward and box is not None else 1) // y.element_size()
        elements = (
            min(elements, 8192) if backward and rows == 512 and box is not None else elements
        )  # sm_80 would spill
        columns = min(max(16, elements // rows), triton.next_power_of_2(D))
        warps = 16 if rows == 512 or rows * columns > 8192 else 8
        # Partner and weight (or box) are read once for so many strips that they are a tenth of the traffic at most, if
        # that leaves every multiprocessor a program.
        strips, programs, each = 1, triton.cdiv(D, columns), 12 if box is None else 40
        enough = programs // (2 * common.processors(x.device))
        while 2 * strips * columns * y.element_size() < 10 * each and strips <= enough:
            strips *= 2
        args |= {"ROWS": rows, "COLUMNS": columns, "STRIPS": strips}
        # Unasked, ptxas spills a few registers to fit one more program: backward of mixup, forward of cutmix.
        registers = 224 if rows == 256 and backward == (box is None) else None
        return Launch(mix_columns, triton.cdiv(programs, strips), args, warps, registers)
    columns = min(COLUMNS, triton.next_power_of_2(D))
    chunks = triton.cdiv(D, columns)
    return Launch(mix_samples, N * chunks, args | {"chunks": chunks, "COLUMNS": columns}, max(1, columns // 256))


def run(x: Tensor, y: Tensor, perm: Tensor, **given: Tensor | bool | None) -> None:
    """Into y, which may be x. Cutmix of interleaved images takes those with one channel dimension alone."""
    if x.numel() == 0:
        return
    usable = dense_samples(x, y) and (given.get("box") is None or x.is_contiguous() or x.dim() == 4)
    if usable and given.get("box") is not None and not x.is_contiguous():
        usable = x.is_contiguous(memory_format=torch.channels_last)
    if usable and (x is not y or x.shape[0] <= MOST_SAMPLES):
        return plan(x, y, perm, **given)(x.device)
    plain = x.contiguous()
    out = torch.empty(x.shape, dtype=y.dtype, device=y.device)
    plan(plain, out, perm, **given)(x.device)
    y.copy_(out)
