"""RMSprop: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator

from bench import Moved, _optimizer

OPERATION = _optimizer.Optimizer("RMSprop", states=1)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
