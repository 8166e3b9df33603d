"""What nvcc makes of csrc/cuda: every kernel, for every architecture, without spills and with 16-byte accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started

from bench import static
from fusedtricks import _op

pytestmark = pytest.mark.skipif(
    not (static.nvcc() and static.cuobjdump()), reason="needs nvcc and cuobjdump (the latter comes with Triton)"
)
LANES = {"fp32": 4, "bf16": 8, "fp16": 8, "fp64": 2, "u8": 16}
# Kernels that store no more than a few numbers for each row or channel.
STATISTICS = (
    *("measure_strips", "project_strips", "square_gradients", "measure_channels", "sum_channels"),
    *("row_losses", "row_divergences", "project_sum_strips"),
)
# Kernels that launchers give all the shared memory of a block that they do not declare.
FILLING = ("normalize_rows", "backward_rows", "forward_resident", "backward_resident", "mix_columns")


@pytest.fixture(scope="module")
def rows() -> list[static.Row]:
    return static.cuda()


def test_every_source_for_every_architecture(rows: list[static.Row]) -> None:
    kernels = {arch: {row.kernel for row in rows if row.arch == f"sm_{arch}"} for arch in static.ARCHS}
    assert len(kernels[80]) > 0
    assert kernels[80] == kernels[90] == kernels[100]


def test_no_spills(rows: list[static.Row]) -> None:
    spilling = [f"{row.kernel} {row.arch}: {row.spills} bytes" for row in rows if row.spills]
    assert not spilling, "\n".join(spilling)


def test_static_shared_memory(rows: list[static.Row]) -> None:
    """Launchers that fill shared memory leave kStaticShared (csrc/cuda/launch.cuh) to what kernels declare.

    From sm_90 on the figure has 1 KB that is the system's, and not among what a launcher can give.
    """
    limits = {"sm_80": 4 << 10, "sm_90": 5 << 10, "sm_100": 5 << 10}
    filling = [row for row in rows if row.kernel.startswith(FILLING)]
    assert {row.kernel.split("<")[0] for row in filling} == set(FILLING)
    wasteful = [f"{row.kernel} {row.arch}: {row.shared} bytes" for row in filling if row.shared > limits[row.arch]]
    assert not wasteful, "\n".join(wasteful)


def test_wide_accesses(rows: list[static.Row]) -> None:
    """Kernels for aligned rows load and store 16 bytes at once."""
    checked = 0
    for row in rows:
        # Template arguments of a kernel: the dtype of its elements is followed by how many one access moves.
        found = re.match(r"(\w+)<.*?\b(fp32|bf16|fp16|fp64|u8), (\d+)\b", row.kernel)
        assert found, f"{row.kernel}: expected ..., dtype, elements per access, ... among the template arguments"
        kernel, dtype, lanes = found.groups()
        if int(lanes) < LANES[dtype]:
            continue
        checked += 1
        assert row.loads.get(16, 0) > 0, f"{row.kernel} {row.arch}: loads {static.widths(row.loads)}"
        if kernel not in STATISTICS:
            assert row.stores.get(16, 0) > 0, f"{row.kernel} {row.arch}: stores {static.widths(row.stores)}"
    assert checked > 0


def test_the_extension_can_find_torchs_stream() -> None:
    """Of a torch with CUDA, libtorch_cuda.so has it; only a dependency on libtorch.so brings that within reach."""
    extension = importlib.util.find_spec("fusedtricks._C")
    if not extension or not shutil.which("readelf") or not any(k.backend == "cuda" for k in _op._C.kernels()):
        pytest.skip("needs readelf and an extension built with CUDA")
    dynamic = subprocess.check_output(["readelf", "-d", extension.origin], text=True)
    assert "[libtorch.so]" in dynamic, "link libtorch.so although no symbol of it is used: -Wl,--no-as-needed"
