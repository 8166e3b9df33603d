"""Adagrad: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import Moved, _optimizer


def _apex() -> Any:
    from apex.optimizers import FusedAdagrad

    return lambda params: FusedAdagrad(params, lr=1e-3)


OPERATION = _optimizer.Optimizer("Adagrad", states=1, fused=("cpu",), peers={"apex": _apex})


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
