"""Cross-entropy: sizes, inputs, bytes. Labels with smoothing, as image classifiers and language models use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op
from fusedtricks.ops._loss import Options

# (rows, classes), each for the regime it reaches.
SIZES: tuple[Size, ...] = (
    (4096, 1000),  # image classification
    (1024, 32000),  # a vocabulary
    (65536, 10),  # fewer classes than a register
    (4096, 1001),  # no multiple of a vector
    (512, 50257),  # an odd vocabulary
    (64, 262144),  # rows longer than any on-chip memory
    (1, 1000),  # cost of a call
)


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device).requires_grad_()
    return x, torch.randint(size[1], size[:1], device=device)


def liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x, y: liger_cross_entropy(x.clone(), y, label_smoothing=0.1)


def pair(x: Tensor, y: Tensor) -> Tensor:
    """Ours with two labels a sample, as mixup gives them."""
    target = fusedtricks.MixedTarget(y, y.flip(0), x.new_full((), 0.3, dtype=torch.float32))
    return fusedtricks.functional.cross_entropy(x, target, label_smoothing=0.1)


def soft(x: Tensor, y: Tensor) -> Tensor:
    """torch's way to the same: class probabilities, made and read."""
    a, b = (F.one_hot(labels, x.shape[1]).to(x.dtype) for labels in (y, y.flip(0)))
    return F.cross_entropy(x, 0.3 * a + 0.7 * b, label_smoothing=0.1)


class Loss(Function):
    def further(self, mode: str) -> dict[str, Callable[..., Tensor]]:
        return {"pair": pair, "soft": soft}


OPERATION = Loss(
    stands_in_for="nn.CrossEntropyLoss",
    ours=lambda x, y: fusedtricks.functional.cross_entropy(x, y, label_smoothing=0.1),
    torch=lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    inputs=inputs,
    floors=("ns", "2ns"),
    forward_bytes=lambda n, s: n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    sizes=SIZES,
    headline=(4096, 1000),
    peers={"liger_kernel": liger},
)


def traffic() -> Iterator[Moved]:
    """Labels and pairs, smoothed; classes that fit a block, that fill several, and that are odd."""
    fwd, bwd = (Op.registry[f"cross_entropy_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    reference = Op.registry["cross_entropy_fwd"].implementation("reference")
    for R, C in ((128, 1000), (128, 1001), (16, 32000), (8, 50257)):
        for dtype in (torch.float32, torch.bfloat16):
            x, (a, b) = torch.randn(R, C).to(dtype), (torch.randint(C, (R,)) for _ in range(2))
            n, lam = math.prod((R, C)) * x.element_size(), torch.rand(R)
            o = Options(-100, 0.9, 0.1 / C, 0.0, 0.0, 1.0, 1)
            for kind, target in (("hard", (a, None, None, None)), ("pair", (a, b, lam, None))):
                forward = lambda x=x, t=target, o=o: fwd(x, *t, *o, False, False)  # noqa: E731
                yield Moved(f"{kind} forward", (R, C), dtype, forward, n, 1.05)
                loss, stats, total, *_ = reference(x, *target, *o, False, False)
                backward = lambda x=x, t=target, o=o, s=(stats, total), d=loss: bwd(d, None, x, *t, *s, *o)  # noqa: E731
                yield Moved(f"{kind} backward", (R, C), dtype, backward, 2 * n, 1.05)
