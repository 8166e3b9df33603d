"""SGD: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fusedtricks.optim
from bench import Moved, _optimizer

OPERATION = _optimizer.Optimizer(
    stands_in_for="optim.SGD",
    ours=lambda params: fusedtricks.optim.SGD(params, lr=1e-3, momentum=0.9),
    torch=lambda params: torch.optim.SGD(params, fused=True, lr=1e-3, momentum=0.9),
    states=1,
)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
