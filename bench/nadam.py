"""NAdam: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fusedtricks.optim
from bench import Moved, _optimizer

OPERATION = _optimizer.Optimizer(
    stands_in_for="optim.NAdam",
    ours=lambda params: fusedtricks.optim.NAdam(params, lr=1e-3),
    torch=lambda params: torch.optim.NAdam(params, foreach=True, lr=1e-3),
    states=2,
)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
