"""Dropout in Triton. Which element gets which bits: fusedtricks/ops/dropout.py and _philox.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedtricks._op import Op

from . import common, philox
from .common import Launch, supported

BLOCKS = 512  # of eight elements, drawn at once, for a program: 16 elements a thread
COLUMNS = 1024  # of a row of a channel


@triton.jit
def drop(x, bits, keep, scale):
    """What is dropped is zero even where it was infinite or NaN."""
    return tl.where(bits < keep, x.to(tl.float32) * scale, 0.0)


@triton.jit(do_not_specialize=["n", "keep", "scale"])
def drop_elements(x, y, seed, n, keep, scale, BLOCKS: tl.constexpr):
    """Elements in counting order. Only the last program needs a mask, which would cost the others their vectors."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    at = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = philox.random16x8(tl.load(seed), block)
    if (first + BLOCKS) * 8 <= n:
        tl.store(y + at, drop(tl.load(x + at), bits, keep, scale))
    else:
        tl.store(y + at, drop(tl.load(x + at, mask=at < n), bits, keep, scale), mask=at < n)


# `inner_of` and `channels_of` count ALIGN elements, for vector accesses.
@triton.jit(do_not_specialize=["outer", "inner_of", "keep", "scale", "chunks"])
def drop_channels(x, y, seed, outer, inner_of, chunks, keep, scale, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """(outer, inner) with one group a row."""
    inner = inner_of * ALIGN
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    at = row * inner + column
    bits = philox.random16(tl.load(seed), row + tl.arange(0, 1))
    value = tl.load(x + at, mask=column < inner)
    tl.store(y + at, drop(value, bits, keep, scale), mask=column < inner)


@triton.jit(do_not_specialize=["channels_of", "group", "keep", "scale", "tiles", "chunks"])
def drop_channels_last(
    x,
    y,
    seed,
    channels_of,
    group,
    tiles,
    chunks,
    keep,
    scale,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(batch, group, channels) in memory, (batch, channels, group) in counting order: bits for many rows at once."""
    channels = channels_of * ALIGN
    item = tl.program_id(0) // chunks
    batch = (item // tiles).to(tl.int64)
    row, column = (
        (item % tiles) * ROWS + tl.arange(0, ROWS),
        tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS),
    )
    at = ((batch * group + row) * channels)[:, None] + column[None, :]
    mask = (row < group)[:, None] & (column < channels)[None, :]
    bits = philox.random16(tl.load(seed), batch * channels + column)
    tl.store(y + at, drop(tl.load(x + at, mask=mask), bits[None, :], keep, scale), mask=mask)


def plan(x: Tensor, y: Tensor, seed: Tensor, keep: int, group: int) -> Launch:
    """For plain x and y."""
    n = x.numel()
    args = {"x": x, "y": y, "seed": seed, "keep": keep, "scale": 65536 / max(keep, 1)}
    if group == 1:
        args |= {"n": n, "BLOCKS": BLOCKS}
        return Launch(drop_elements, triton.cdiv(n, 8 * BLOCKS), args, 8)
    chunks, align = triton.cdiv(group, COLUMNS), common.alignment(group)
    args |= {"outer": n // group, "inner_of": group // align, "chunks": chunks, "ALIGN": align, "COLUMNS": COLUMNS}
    return Launch(drop_channels, n // group * chunks, args, 4)


def plan_channels_last(x: Tensor, y: Tensor, seed: Tensor, keep: int, group: int) -> Launch:
    channels, align = x.shape[1], common.alignment(x.shape[1])
    columns = min(128, triton.next_power_of_2(channels))
    rows = 4096 // columns
    tiles, chunks = triton.cdiv(group, rows), triton.cdiv(channels, columns)
    args = {"x": x, "y": y, "seed": seed, "keep": keep, "scale": 65536 / max(keep, 1), "group": group}
    args |= {"channels_of": channels // align, "ALIGN": align, "tiles": tiles, "chunks": chunks}
    args |= {"ROWS": rows, "COLUMNS": columns}
    return Launch(drop_channels_last, x.shape[0] * tiles * chunks, args, 8)


def is_channels_last(x: Tensor, group: int) -> bool:
    """Dense (N, C, ...) with the channels innermost, and a group a channel."""
    if x.dim() < 3 or group != math.prod(x.shape[2:]):
        return False
    order = (0, *range(2, x.dim()), 1)
    return x.permute(order).is_contiguous()


def run(x: Tensor, y: Tensor, seed: Tensor, keep: int, group: int) -> None:
    """Into y, which may be x."""
    if x.numel() == 0:
        return
    if x.is_contiguous() and y.is_contiguous():
        return plan(x, y, seed, keep, group)(x.device)
    if is_channels_last(x, group) and x.stride() == y.stride():
        return plan_channels_last(x, y, seed, keep, group)(x.device)
    plain = x.clone(memory_format=torch.contiguous_format)
    plan(plain, plain, seed, keep, group)(x.device)
    y.copy_(plain)


def dropout_fwd(x: Tensor, seed: Tensor, keep: int, group: int) -> Tensor:
    if not supported("dropout_fwd", x):
        return Op.registry["dropout_fwd"].implementation("reference")(x, seed, keep, group)
    y = torch.empty_like(x)
    run(x, y, seed, keep, group)
    return y


def dropout_fwd_(x: Tensor, seed: Tensor, keep: int, group: int) -> None:
    if not supported("dropout_fwd_", x):
        return Op.registry["dropout_fwd_"].implementation("reference")(x, seed, keep, group)
    run(x, x, seed, keep, group)


def specialisations() -> Iterator[tuple[str, Launch]]:
    """(note, launch) for the usual dtypes, planned on meta tensors as on an H100."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype)[6:]
        for size, group, note in (
            ((64, 4096), 1, "elements"),
            ((262081,), 1, "odd number of elements"),
            ((64, 64, 56, 56), 3136, "channels"),
            ((64, 64, 7, 7), 49, "channels, without vectors"),
        ):
            x = torch.empty(size, dtype=dtype, device="meta")
            yield f"{note}, {name}", plan(x, x, seed, keep=30000, group=group)
        x = torch.empty((64, 64, 56, 56), dtype=dtype, device="meta")
        yield f"channels last, {name}", plan_channels_last(x, x, seed, keep=30000, group=3136)
