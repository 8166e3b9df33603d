"""Every bug sown into csrc/cuda is caught by the parity sweep of the kernels on the CPU (tests/cuda_on_host)."""

from __future__ import annotations

import cuda_on_host
import pytest
import sweep
from cases import CASES
from cuda_on_host import build
from seeded_bugs import CUDA_BUGS
from test_cuda_on_host import HOST, sample

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]


@pytest.mark.parametrize("name", CUDA_BUGS)
def test_caught(name: str) -> None:
    """On a device whose threads run in descending order, which shows what relies on ascending order."""
    bug = CUDA_BUGS[name]
    kernels = cuda_on_host.Kernels(build.build({bug.file: (bug.right, bug.wrong)}, stems=(bug.op,)))
    with kernels.as_backend(), kernels.device(order=1):
        for config in sample(CASES[bug.op], "a real device"):
            try:
                sweep.check(CASES[bug.op], config, HOST)
            except AssertionError:
                return
    pytest.fail(f"no configuration of {bug.op} notices: {name}")
