"""The same cases for pytest-benchmark: `pytest bench`, with its options to save and compare runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import operations, run

CASES = [
    pytest.param(operation, mode, size, dtype, id=f"{stem}-{mode}-{'x'.join(map(str, size))}-{str(dtype)[6:]}")
    for stem, operation in operations().items()
    for dtype, size, mode in run.plan(operation, quick=False)
]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize(("operation", "mode", "size", "dtype"), CASES)
def test_bench(benchmark: Any, operation: Any, mode: str, size: tuple[int, ...], dtype: torch.dtype, who: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.check(operation, mode, size, dtype, device, run.our_backends(operation.stem, device)[0])
    call = operation.call(getattr(operation, who), mode, operation.tensors(mode, size, dtype, device))
    benchmark.group = f"{operation.stem} {mode} {size} {dtype}"

    def timed() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
