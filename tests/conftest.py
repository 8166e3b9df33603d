from __future__ import annotations

import importlib.util
import os
import random
import sys
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Under pytest-xdist there are more threads than cores: one that waits must not spin. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # cases, parity, sweep and seeded_bugs, from wherever pytest is started

# torch's own samples and opcheck come with test classes of torch's, which no test here runs; only they need it.
if importlib.util.find_spec("expecttest") is None:
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False)


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


# What these build or read, once for all of their tests, takes a minute: under pytest-xdist one worker has them.
WHOLE = ("test_package.py", "test_cuda_compile.py")


# One of these takes as long as hundreds of others: begun last, it would leave the other workers idle.
LONG = ("test_bytes_stay_within_budget",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file.endswith(WHOLE) else nodeid

    return Scheduler(config, log)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    import sweep

    sweep.seed(0)
    random.seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
