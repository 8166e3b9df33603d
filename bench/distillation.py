"""Distillation: sizes, inputs, bytes. Labels and a teacher at T = 2, as image classifiers are distilled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op
from fusedtricks.ops.distillation import Options

T, ALPHA = 2.0, 0.5

# (rows, classes), each for the regime it reaches.
SIZES: tuple[Size, ...] = (
    (4096, 1000),  # image classification
    (1024, 32000),  # a vocabulary
    (65536, 10),  # fewer classes than a register
    (4096, 1001),  # no multiple of a vector
    (1, 1000),  # cost of a call
)


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    student, teacher = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(size[1], size[:1], device=device)


def composed(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """As training scripts write it."""
    log_s, log_p = (F.log_softmax(t / T, 1) for t in (student, teacher))
    kl = F.kl_div(log_s, log_p, reduction="batchmean", log_target=True)
    return ALPHA * T**2 * kl + (1 - ALPHA) * F.cross_entropy(student, target)


OPERATION = Function(
    stands_in_for="kl_div + cross_entropy",
    ours=lambda s, t, y: fusedtricks.functional.distillation_loss(s, t, y, T, ALPHA),
    torch=composed,
    inputs=inputs,
    floors=("2ns", "3ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 3 * n * s,
    sizes=SIZES,
    headline=(4096, 1000),
)


def traffic() -> Iterator[Moved]:
    """Classes that fit a block, that fill several, and that are odd."""
    fwd, bwd = (Op.registry[f"distillation_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    for R, C in ((64, 1000), (32, 1001), (4, 32000), (2, 50257)):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(R, C).to(dtype) for _ in range(2))
            target = (torch.randint(C, (R,)), None, None, None)
            n, o = math.prod((R, C)) * student.element_size(), Options(-100, 1.0, 0.0, T, ALPHA, 1)
            forward = lambda a=(student, teacher, *target), o=o: fwd(*a, *o, False)  # noqa: E731
            yield Moved("forward", (R, C), dtype, forward, 2 * n, 1.05)
            loss, stats, total, _ = forward()
            backward = lambda a=(student, teacher, *target, stats, total), o=o, d=loss: bwd(d, *a, *o)  # noqa: E731
            yield Moved("backward", (R, C), dtype, backward, 3 * n, 1.05)
