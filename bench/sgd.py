"""SGD: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import Moved, _optimizer


def _apex() -> Any:
    from apex.optimizers import FusedSGD

    return lambda params: FusedSGD(params, lr=1e-3, momentum=0.9)


OPERATION = _optimizer.Optimizer(
    "SGD", states=1, fused=("cpu", "cuda"), options={"momentum": 0.9}, peers={"apex": _apex}
)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
