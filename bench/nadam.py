"""NAdam: sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterator

from bench import Moved, _optimizer

OPERATION = _optimizer.Optimizer("NAdam", states=2)


def traffic() -> Iterator[Moved]:
    return _optimizer.traffic(OPERATION)
