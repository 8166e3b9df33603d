"""Batches that no cache holds are written past the caches, by whole cache lines: what begins and ends between two
lines, and what rows and runs of channels share, comes out as in a small batch or in the reference, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from sweep import INTERPRETED, forced, targets
from torch import Tensor

from fusedtricks import functional
from fusedtricks._op import Op
from fusedtricks.ops.dropout import keep_of

TARGETS = [t for t in targets(CASES["layer_norm"]) if t.backend.startswith("cpu:")]
BACKENDS = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels of the CPU")
MIB = 2**20


def rows_past_the_caches(columns: int, dtype: torch.dtype) -> int:
    return 10 * MIB // (columns * dtype.itemsize) + 3


def apart(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers that begin one element after a cache line."""
    return torch.randn(numel + 1).to(dtype)[1:]


def rounding(dtype: torch.dtype) -> float:
    """Of a few operations on numbers about 1, in the type of the arithmetic."""
    return 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


# ---- rows ------------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("stem", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "columns"),
    [
        (torch.float32, 257),
        (torch.float32, 770),
        (torch.float32, 1040),
        (torch.float64, 261),
        (torch.bfloat16, 257),
        (torch.bfloat16, 1023),
        (torch.float16, 304),
    ],
    ids=str,
)
def test_rows(target: Any, stem: str, dtype: torch.dtype, columns: int) -> None:
    rows = rows_past_the_caches(columns, dtype)
    x, dy = (apart(rows * columns, dtype).view(rows, columns) for _ in range(2))
    parameters = [torch.randn(columns) for _ in range(2 if stem == "layer_norm" else 1)]
    fn = getattr(functional, stem)

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = fn(x, (columns,), *(p.to(dtype) for p in parameters))
        return y.detach(), *torch.autograd.grad(y, x, dy)

    with forced(target):
        whole = run(x, dy)
        parts = [run(*pair) for pair in zip(x.split(rows // 7), dy.split(rows // 7), strict=True)]
    y, dx = (torch.cat(results) for results in zip(*parts, strict=True))
    assert torch.equal(whole[0], y)
    # The means of a row are summed in an order that depends on how many rows its block has.
    torch.testing.assert_close(whole[1], dx, rtol=2 * torch.finfo(dtype).eps, atol=rounding(dtype))


# ---- channels --------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (700, 64, 7, 7),
        (90, 256, 14, 15),  # of 16 bits too
        (180, 60, 14, 14),
        (3, 211, 62, 63),
        (16, 3, 210, 211),
        (9, 2051, 11, 11),  # channels_last: a pixel longer than what is drawn at once
        (5, 7, 3, 3),
        (3, 1025, 1, 2),
        (2, 2050, 2, 2),
    ],
    ids=str,
)
def test_dropout_of_channels(target: Any, dtype: torch.dtype, layout: torch.memory_format, size: tuple) -> None:
    op, seed, keep = Op.registry["dropout_fwd"], torch.tensor([12345]), keep_of(0.3)
    x = torch.randn(size).to(dtype, memory_format=layout)
    group = size[2] * size[3]
    wanted = op.implementation("reference")(x, seed, keep, group)
    found = op.implementation(target.backend)(x, seed, keep, group)
    assert found.stride() == wanted.stride()
    assert torch.equal(found, wanted)
    inside = x.clone(memory_format=torch.preserve_format)
    Op.registry["dropout_fwd_"].implementation(target.backend)(inside, seed, keep, group)
    assert torch.equal(inside, found)


@BACKENDS
@pytest.mark.parametrize("added", [False, True], ids=["alone", "with residual and relu"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, (180, 60, 14, 14)),
        (torch.float32, (150, 49, 17, 17)),
        (torch.float32, (23, 1300, 9, 8)),
        (torch.float64, (90, 61, 14, 14)),
        (torch.bfloat16, (310, 70, 14, 14)),
        (torch.float16, (40, 129, 29, 31)),
        (torch.float32, (5, 7, 4, 5)),
        (torch.float32, (6, 40, 3, 7)),
    ],
    ids=str,
)
def test_registers_of_two_channels(target: Any, added: bool, dtype: torch.dtype, size: tuple) -> None:
    """In evaluation and in training, against each channel by itself."""
    channels = size[1]
    x, dy, residual = (torch.randn(size).to(dtype) for _ in range(3))
    weight, bias, mean, var = torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels)
    some = sorted({0, 1, channels // 2, channels - 2, channels - 1})

    def run(pick: slice, training: bool) -> list[Tensor]:
        leaves = [t[:, pick].contiguous().requires_grad_() for t in (x, residual)][: 1 + added]
        running = (None, None) if training else (mean[pick], var[pick])
        p = [t[pick].to(dtype if dtype == torch.float64 else torch.float32) for t in (weight, bias)]
        y = functional.batch_norm_act(
            leaves[0], *running, *p, *leaves[1:] or [None], training, activation="relu" if added else "identity"
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[:, pick].contiguous())]

    with forced(target):
        for training in (False, True):
            whole = run(slice(None), training)
            for c in some:
                alone = run(slice(c, c + 1), training)
                for i, (a, b) in enumerate(zip(whole, alone, strict=True)):
                    # Sums of a channel are added in an order of its own, which rounding may show.
                    a = a[:, c : c + 1]
                    if training:
                        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=rounding(dtype))
                    else:
                        assert torch.equal(a, b), f"channel {c}, result {i}"


# ---- images ----------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, (15, 3, 225, 227)),
        (torch.bfloat16, (160, 3, 97, 95)),
        (torch.float32, (2300, 1, 31, 33)),
        (torch.float64, (9, 1, 355, 357)),
        (torch.float32, (2, 1, 270, 4099)),
        (torch.uint8, (60, 3, 217, 225)),
    ],
    ids=str,
)
def test_cutmix(target: Any, layout: torch.memory_format, dtype: torch.dtype, size: tuple) -> None:
    batch, _, height, width = size
    x = torch.randint(0, 200, size).to(dtype, memory_format=layout)
    perm = torch.randperm(batch)
    top, left = torch.randint(0, height, (batch,)), torch.randint(0, width, (batch,))
    box = torch.stack((top, top + height // 3, left, left + width // 2), 1)
    for name in ("cutmix_fwd", "cutmix_bwd")[: 1 + dtype.is_floating_point]:
        op = Op.registry[name]
        found = op.implementation(target.backend)(x, perm, box)
        assert torch.equal(found, op.implementation("reference")(x, perm, box)), name


@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, (14, 3, 225, 227)), (torch.bfloat16, (5000, 1031)), (torch.float32, (9000, 299))],
    ids=str,
)
def test_mixup_and_shake_shake(target: Any, dtype: torch.dtype, size: tuple) -> None:
    """Against the same columns alone."""
    x, other = (torch.randn(size).to(dtype).flatten(1) for _ in range(2))
    batch, columns = x.shape
    lam, perm = torch.rand(batch), torch.randperm(batch)
    cut = slice(columns // 3 + 1, columns // 3 + 1 + columns // 9)
    names = ("mixup_fwd", "mixup_bwd", "shake_shake_fwd", "shake_shake_bwd")
    kernel = {name: Op.registry[name].implementation(target.backend) for name in names}
    mixed = kernel["mixup_fwd"](x, lam, perm, None, None, dtype)
    back = kernel["mixup_bwd"](x, lam, perm)
    shaken = kernel["shake_shake_fwd"](x, other, lam)
    one, two = kernel["shake_shake_bwd"](x, lam)
    a, b = x[:, cut].contiguous(), other[:, cut].contiguous()
    assert torch.equal(mixed[:, cut], kernel["mixup_fwd"](a, lam, perm, None, None, dtype))
    assert torch.equal(back[:, cut], kernel["mixup_bwd"](a, lam, perm))
    assert torch.equal(shaken[:, cut], kernel["shake_shake_fwd"](a, b, lam))
    for found, alone in zip((one, two), kernel["shake_shake_bwd"](a, lam), strict=True):
        assert torch.equal(found[:, cut], alone)
