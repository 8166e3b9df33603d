"""The CUDA kernels of batch normalization on the CPU (tests/cuda_on_host): regimes, order of threads, sown bugs.

Parity over the whole sweep is in test_cuda_on_host.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from cuda_on_host import build
from parity import assert_bitwise_equal, bits
from torch import Tensor

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op
from fusedtricks.ops import _batch_norm as bn

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
Ops = dict[str, Callable[..., Any]]
SMALL = {"processors": 3, "threads": 64}
SHAPES = {"planes": (3, 5, 6, 8), "planes without vectors": (3, 5, 7, 9), "rows": (70, 16), "narrow rows": (66, 3)}
KERNELS = ("measure_channels", "normalize_channels", "sum_channels", "backward_channels")


@pytest.fixture(scope="module")
def kernels() -> Iterator[cuda_on_host.Kernels]:
    return cuda_on_host.load()


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, residual, dy; weight, bias."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    return (*tensors, *torch.randn(2, shape[1], generator=generator).unbind())


def everything(ops: Ops, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of forward and backward on fixed data, with a mask and averages."""
    x, residual, dy, weight, bias = data(shape, dtype)
    averages = [torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(2)]
    options = (None, 1e-5, bn.RELU, 0.0, True, True)
    y, stats, mask = ops["batch_norm_fwd"](x, residual, weight, bias, *averages, *options)
    grads = ops["batch_norm_bwd"](dy, x, None, weight, None, stats, mask, None, True, bn.RELU, 0.0, *(True,) * 4)
    return [y, stats, mask, *averages, *grads]


def reference(shape: tuple[int, ...]) -> list[Tensor]:
    return everything({name: op.implementation("reference") for name, op in Op.registry.items()}, shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("device", [{}, SMALL, {"processors": 9, "threads": 32}], ids=str)
def test_order_of_threads(kernels: cuda_on_host.Kernels, shape: tuple[int, ...], device: dict[str, int]) -> None:
    found = []
    for order in (0, 1, 2):
        with kernels.device(**device, order=order):
            found.append(everything(kernels.ops, shape))
    for results in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], results, strict=True)):
            assert_bitwise_equal(a, b, name=f"result {i}")
    for ours, theirs in zip(found[0], reference(shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_regimes(kernels: cuda_on_host.Kernels) -> None:
    """These tests reach every kernel, in both layouts, with whole vectors and without."""
    for shape, dtype in itertools.product(SHAPES.values(), (torch.float32, torch.bfloat16)):
        everything(kernels.ops, shape, dtype)
        x, residual, dy, weight, bias = data(shape, dtype)
        stats = kernels.ops["batch_norm_apply"](
            x, residual, weight, bias, weight, None, bias.abs(), 1e-5, bn.GELU, 0.0, False
        )[1]
        kernels.ops["batch_norm_bwd"](
            dy, x, residual, weight, bias, stats, None, None, False, bn.GELU, 0.0, *(True,) * 4
        )
    launched = "\n".join(kernels.launched())
    for kernel, planes in itertools.product(KERNELS, ("true", "false")):
        last = [", true", ", false"] if kernel == "backward_channels" else [""]
        for dtype, end in itertools.product(("float, 4", "__nv_bfloat16, 8"), last):
            name = f"{kernel}<{dtype}, {planes}{end}>"
            assert name in launched, f"{name} was never launched"
    for name in ("take_statistics", "count_batch", "measure_channels<float, 1, true>"):
        assert name in launched


@pytest.mark.parametrize("shape", [(3, 5, 6, 8), (66, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_wanted_gradients(kernels: cuda_on_host.Kernels, shape: tuple[int, ...], training: bool) -> None:
    """What is not wanted is empty; what is, does not depend on the rest."""
    x, _, dy, weight, bias = data(shape)
    stats = bn.statistics(x, 1e-5)
    args = (dy, x, None, weight, bias, stats, None, None, training, bn.SILU, 0.0)
    every = kernels.ops["batch_norm_bwd"](*args, *(True,) * 4)
    for need in itertools.product((True, False), repeat=4):
        for whole, part, want in zip(every, kernels.ops["batch_norm_bwd"](*args, *need), need, strict=True):
            assert_bitwise_equal(part, whole if want else whole.new_empty(0))


@pytest.mark.parametrize("shape", [(769, 6), (6, 5, 9, 14)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_error_does_not_grow_with_the_mean(kernels: cuda_on_host.Kernels, shape: tuple[int, ...], mean: float) -> None:
    x = data(shape)[0] + mean
    x[:, 1] *= 1e20
    x[:2, 3] -= 1e3  # a shift taken from these is a bad one
    truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    with kernels.device(**SMALL):
        y = kernels.ops["batch_norm_fwd"](x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)[0]
    error = (y - truth).transpose(0, 1).flatten(1).abs().amax(1)
    assert (error <= 2e-6 * truth.transpose(0, 1).flatten(1).abs().amax(1)).all(), error


# ---- sown bugs -------------------------------------------------------------------------------------------------------


def with_bug(path: str, old: str, new: str) -> cuda_on_host.Kernels:
    built: Path = build.build({f"cuda/{path}": (old, new)}, stems=("batch_norm",))
    return cuda_on_host.Kernels(built)


BUGS = {
    "sign at zero": ("batch_norm_forward.cuh", "!(z <= A(0))", "!(z < A(-1))"),
    "rest forgotten": ("batch_norm_backward.cuh", "a.means[c] - rest * incline[i]", "a.means[c] + incline[i]"),
    "biased running variance": (
        "batch_norm_forward.cuh",
        "var * (static_cast<A>(a.samples)",
        "var * (static_cast<A>(a.samples - 1)",
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_bug_is_caught(bug: tuple[str, str, str]) -> None:
    shape = SHAPES["planes"]
    found, expected = everything(with_bug(*bug).ops, shape), reference(shape)
    assert not all(torch.allclose(a.double(), b.double(), 1e-5, 1e-5) for a, b in zip(found, expected, strict=True))


def test_missing_barrier_is_caught() -> None:
    """Between the writing and the reading of sums over the rows of a block."""
    old = "        __syncthreads();\n        if (threadIdx.x < half) {"
    kernels = with_bug("batch_norm.cuh", old, old.replace("__syncthreads();", ""))
    found = []
    for order in (0, 1):
        with kernels.device(order=order):
            found.append(everything(kernels.ops, SHAPES["rows"]))
    assert any(not torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
