"""The CUDA kernels of dropout_add_layer_norm on the CPU (tests/cuda_on_host): every regime, layer and RMS.

Parity over the whole sweep is in test_cuda_on_host.py, sown bugs are in test_cuda_seeded_bugs.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from parity import assert_bitwise_equal
from torch import Tensor

from fusedtricks._op import Op

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
# 700 columns are long for the second: strips.
DEVICES = {"rows": {}, "strips": {"processors": 3, "threads": 32, "shared": 12 << 10}}
FWD, BWD = "dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd"


@pytest.fixture(scope="module")
def kernels() -> cuda_on_host.Kernels:
    return cuda_on_host.load()


def run(ops: dict[str, Callable[..., Any]], columns: int, dtype: torch.dtype, center: bool) -> list[Tensor]:
    """Outputs of forward and backward on fixed data, 13 rows."""
    generator = torch.Generator().manual_seed(1)
    x, residual, dy, dz = (torch.randn(13, columns, generator=generator).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    bias, seed = bias if center else None, torch.tensor([2**40 + 3])
    y, z, stats = ops[FWD](x, residual, weight, bias, seed, 40000, 1e-5, 1, center)
    grads = ops[BWD](dy, dz, z, weight, stats, seed, 40000, 1, center, True, True, True, center)
    return [y, z, stats, *grads]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [24, 700, 701])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
def test_regimes(kernels: cuda_on_host.Kernels, center: bool, dtype: torch.dtype, columns: int, device: str) -> None:
    reference = {name: Op.registry[name].implementation("reference") for name in (FWD, BWD)}
    with kernels.device(**DEVICES[device]):
        found = run(kernels.ops, columns, dtype, center)
    with kernels.device(**DEVICES[device], order=1):
        again = run(kernels.ops, columns, dtype, center)
    names = ("y", "z", "stats", "dx", "dresidual", "dweight", "dbias")
    for name, ours, same, wanted in zip(names, found, again, run(reference, columns, dtype, center), strict=True):
        assert_bitwise_equal(ours, same, name=f"{name} in another order of threads")
        if name == "stats" and center:  # mean and what its rounding left: their sum is what is defined
            ours, wanted = ((s[0].double() + s[1], s[2]) for s in (ours, wanted))
        rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(ours, wanted, **rounding)


def test_wanted_gradients(kernels: cuda_on_host.Kernels) -> None:
    """What is not wanted is empty; what is, does not depend on the rest."""
    dy, z, weight = torch.randn(5, 40), torch.randn(5, 40), torch.randn(40)
    seed, stats = torch.tensor([3]), torch.rand(3, 5)
    every = kernels.ops[BWD](dy, None, z, weight, stats, seed, 40000, 1, True, *(True,) * 4)
    for wanted in itertools.product((True, False), repeat=4):
        some = kernels.ops[BWD](dy, None, z, weight, stats, seed, 40000, 1, True, *wanted)
        for whole, part, want in zip(every, some, wanted, strict=True):
            if want:
                assert_bitwise_equal(whole, part)
            else:
                assert part.shape == (0,)


@pytest.mark.parametrize("columns", [700, 701])
def test_rows_in_registers_take_one_launch_each_way(kernels: cuda_on_host.Kernels, columns: int) -> None:
    before = kernels.launches()
    run(kernels.ops, columns, torch.bfloat16, True)
    assert kernels.launches() - before == 2


def test_every_kernel_is_reached(kernels: cuda_on_host.Kernels) -> None:
    for device, columns in itertools.product(DEVICES.values(), (700, 701)):
        with kernels.device(**device):
            run(kernels.ops, columns, torch.float32, True)
    names = ("normalize_sums", "add_strips", "normalize_sum_strips", "split_gradients", "project_sum_strips")
    for kernel, width in itertools.product(names, (1, 4)):
        name = f"void fusedtricks::cuda::{kernel}<float, {width}>"
        assert any(k.startswith(name) for k in kernels.launched()), f"{name} was never launched"
