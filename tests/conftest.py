from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # cases, parity, sweep and seeded_bugs, from wherever pytest is started


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), help="run on one device; default: the CPU, and CUDA if there is one"
    )


def pytest_configure(config: pytest.Config) -> None:
    import sweep

    wanted = config.getoption("--device")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    sweep.devices[:] = [wanted] if wanted else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    # The product of the axes makes thousands of tests: tracebacks stay short enough to be read.
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
