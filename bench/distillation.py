"""Distillation: sizes, inputs, bytes. Labels and a teacher at T = 2, as image classifiers are distilled.

A third mode is loss and gradient from a sparse teacher, as large language models leave one behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedtricks.functional
from bench import Call, Function, Moved, Size
from fusedtricks._op import Op
from fusedtricks.ops.distillation import Options

T, ALPHA = 2.0, 0.5
SPARSE, KNOWN = "sparse teacher", 64

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


def composed(student: Tensor, teacher: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    """As training scripts write it."""
    log_s, log_p = (F.log_softmax(t / T, 1) for t in (student, teacher))
    log_s = log_s if indices is None else log_s.gather(1, indices)
    kl = F.kl_div(log_s, log_p, reduction="batchmean", log_target=True)
    return ALPHA * T**2 * kl + (1 - ALPHA) * F.cross_entropy(student, target)


def ours(student: Tensor, teacher: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    given = teacher if indices is None else (indices, teacher)
    return fusedtricks.functional.distillation_loss(student, given, target, T, ALPHA)


class Distillation(Function):
    modes = (*Function.modes, SPARSE)

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        if mode != SPARSE:
            return super().bytes(mode, size, dtype)
        return 3 * math.prod(size) * dtype.itemsize + 2 * size[0] * KNOWN * (8 + dtype.itemsize)

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        if mode != SPARSE:
            return super().tensors(mode, size, dtype, device)
        student, teacher, target, dy = super().tensors("forward+backward", size, dtype, device)
        values, indices = teacher.topk(KNOWN, 1)
        return student, values, target, indices, dy

    def call(self, fn: Callable[..., Tensor], mode: str, tensors: tuple[Any, ...]) -> Call:
        return super().call(fn, "forward+backward" if mode == SPARSE else mode, tensors)

    def measures(self, mode: str, size: Size, dtype: torch.dtype) -> bool:
        return mode != SPARSE or size in ((4096, 1000), (1024, 32000))


OPERATION = Distillation(
    stands_in_for="kl_div + cross_entropy",
    ours=ours,
    torch=composed,
    inputs=inputs,
    floors=("2ns", "3ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 3 * n * s,
    sizes=SIZES,
    headline=(4096, 1000),
)


def traffic() -> Iterator[Moved]:
    """Classes that fit a block, that fill several, and that are odd. Of a sparse teacher, the student is read once more
    at its classes; in the backward, where the gradient is stored once more as well, so are its entries."""
    fwd, bwd = (Op.registry[f"distillation_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    for R, C in ((64, 1000), (32, 1001), (4, 32000), (2, 50257)):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(R, C).to(dtype) for _ in range(2))
            target = (torch.randint(C, (R,)), None, None, None)
            n, o = math.prod((R, C)) * student.element_size(), Options(-100, 1.0, 0.0, T, ALPHA, 1)
            values, indices = teacher.topk(KNOWN, 1)
            e = values.nbytes + indices.nbytes
            sparse_budgets = (1.1, 1.25) if C < 2048 else (1.05, 1.1)
            for kind, given, floor, budget in (
                ("", (student, teacher, None), (2 * n, 3 * n), (1.05, 1.05)),
                (", sparse", (student, values, indices), (n + e, 2 * n + e), sparse_budgets),
            ):
                forward = lambda a=(*given, *target), o=o: fwd(*a, *o, False)  # noqa: E731
                yield Moved(f"forward{kind}", (R, C), dtype, forward, floor[0], budget[0])
                loss, stats, total, _ = forward()
                backward = lambda a=(*given, *target, stats, total), o=o, d=loss: bwd(d, *a, *o)  # noqa: E731
                yield Moved(f"backward{kind}", (R, C), dtype, backward, floor[1], budget[1])
