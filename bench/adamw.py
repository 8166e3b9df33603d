"""AdamW: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import Moved, _optimizer


def _apex() -> Any:
    from apex.optimizers import FusedAdam

    return lambda params: FusedAdam(params, lr=1e-3, weight_decay=0.01, adam_w_mode=True)


def _optimi() -> Any:
    from optimi import AdamW

    return lambda params: AdamW(params, lr=1e-3, weight_decay=0.01)


OPERATION = _optimizer.Optimizer(
    "AdamW", states=2, fused=("cpu", "cuda"), options={"weight_decay": 0.01}, peers={"apex": _apex, "optimi": _optimi}
)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
