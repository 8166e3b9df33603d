"""The CUDA kernels of distillation on the CPU (tests/cuda_on_host): every regime of rows, which the parity sweep in
test_cuda_on_host.py reaches by chance, and sown bugs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from cuda_on_host import build
from parity import assert_bitwise_equal, assert_no_worse
from test_cuda_cross_entropy import REGIMES, SMALL, inputs
from torch import Tensor

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import distillation_loss

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
inf, nan = float("inf"), float("nan")
OPTIONS: dict[str, dict[str, Any]] = {
    "T=2": {"temperature": 2.0},
    "T=1, smoothed, weighted": {"label_smoothing": 0.2, "weight": True, "alpha": 0.3},
    "no labels": {"temperature": 4.0, "alpha": 1.0},
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[cuda_on_host.Kernels]:
    kernels = cuda_on_host.load()
    with kernels.as_backend():
        yield kernels


def run(
    backend: str, size: tuple[int, ...], options: str, reduction: str, dtype: torch.dtype, wide: bool = False
) -> list[Tensor]:
    """The loss and the student's gradient. wide: the teacher is fp32, and misaligned."""
    student, a, b, teacher = inputs(size)
    student, teacher = student.to(dtype).requires_grad_(), 4 * teacher.to(dtype)
    if wide:
        teacher = torch.cat((teacher.new_zeros(1), teacher.flatten()))[1:].reshape(size).float()
    given = {**OPTIONS[options], "reduction": reduction}
    if "weight" in given:
        given["weight"] = torch.linspace(0, 2, size[1], dtype=dtype)
    target = None if options == "no labels" else MixedTarget(a, b, torch.linspace(0, 1, size[0], dtype=torch.float64))
    with fusedtricks.backend(backend):
        loss = distillation_loss(student, teacher, target, **given)
        return [loss.detach(), torch.autograd.grad(loss.sum(), student)[0]]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("regime", REGIMES)
def test_against_the_reference(kernels: cuda_on_host.Kernels, regime: str, options: str) -> None:
    """In any order of threads, with the same bits."""
    size, device = REGIMES[regime]
    reduction = "none" if options == "T=2" else "mean"
    found = []
    for order in (0, 1, 2):
        with kernels.device(**{**device, "order": order}):
            found.append(run("cuda_on_host", size, options, reduction, torch.float32))
    reference, truth = (run("reference", size, options, reduction, d) for d in (torch.float32, torch.float64))
    for i, (ours, theirs, true) in enumerate(zip(found[0], reference, truth, strict=True)):
        assert_no_worse(ours, theirs, true.double(), name=f"result {i}")
        for other in found[1:]:
            assert_bitwise_equal(ours, other[i], name=f"result {i}")


@pytest.mark.parametrize("wide", [False, True], ids=["bf16 teacher", "fp32 teacher"])
@pytest.mark.parametrize("regime", ["a warp", "several blocks", "strided"])
def test_16_bits(kernels: cuda_on_host.Kernels, regime: str, wide: bool) -> None:
    size, device = REGIMES[regime]
    with kernels.device(**device):
        ours = run("cuda_on_host", size, "T=2", "mean", torch.bfloat16, wide)
    for a, b in zip(ours, run("reference", size, "T=2", "mean", torch.bfloat16, wide), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def run_sparse(backend: str, size: tuple[int, ...], options: str, dtype: torch.dtype, strided: bool) -> list[Tensor]:
    """The same from a sparse teacher, which names one class three times and the first label."""
    student, a, b, values = inputs(size)
    student, values = student.to(dtype), 4 * values[:, :40].to(dtype)
    student = student.t().contiguous().t() if strided else student
    indices = torch.randint(size[1], values.shape, generator=torch.Generator().manual_seed(2))
    indices[:, 0], indices[:, -1], indices[:, -2], values[:, 3] = a.clamp(min=0), indices[:, 1], indices[:, 1], -inf
    given, leaf = dict(OPTIONS[options]), student.detach().requires_grad_()
    if "weight" in given:
        given["weight"] = torch.linspace(0, 2, size[1], dtype=dtype)
    target = None if options == "no labels" else MixedTarget(a, b, torch.linspace(0, 1, size[0], dtype=torch.float64))
    with fusedtricks.backend(backend):
        loss = distillation_loss(leaf, (indices.int(), values), target, **given)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "strided"])
@pytest.mark.parametrize("regime", [name for name, (size, _) in REGIMES.items() if len(size) == 2])
def test_sparse_teachers(kernels: cuda_on_host.Kernels, regime: str, strided: bool, options: str) -> None:
    size, device = REGIMES[regime]
    found = []
    for order in (0, 1, 2):
        with kernels.device(**{**device, "order": order}):
            found.append(run_sparse("cuda_on_host", size, options, torch.float32, strided))
    reference, truth = (run_sparse("reference", size, options, d, strided) for d in (torch.float32, torch.float64))
    for i, (ours, theirs, true) in enumerate(zip(found[0], reference, truth, strict=True)):
        assert_no_worse(ours, theirs, true.double(), name=f"result {i}")
        for other in found[1:]:
            assert_bitwise_equal(ours, other[i], name=f"result {i}")
    with kernels.device(**device):
        ours = run_sparse("cuda_on_host", size, options, torch.bfloat16, strided)
    for a, b in zip(ours, run_sparse("reference", size, options, torch.bfloat16, strided), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("classes", [30, 4099])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bad_rows_of_a_sparse_teacher(kernels: cuda_on_host.Kernels, temperature: float, classes: int) -> None:
    """NaN, all of them, are rows of which an index is no class, and those of a teacher that knows nothing."""
    student, values, y = torch.randn(6, classes), torch.randn(6, 3), torch.randint(classes, (6,))
    indices = torch.tensor([[0, 1, 2], [0, classes, 2], [-1, 1, 2], [0, 1, 2], [0, 1, 2**40], [1, 1, 1]])
    values[3], values[4, 2] = -inf, -inf
    bad = [False, True, True, True, True, False]
    for target in (None, y):
        leaf = student.clone().requires_grad_()
        with kernels.device(**SMALL), fusedtricks.backend("cuda_on_host"):
            loss = distillation_loss(leaf, (indices, values), target, temperature, reduction="none")
            (made,) = torch.autograd.grad(loss, leaf, torch.ones(6))
        assert loss.isnan().tolist() == bad
        assert made.isnan().all(1).tolist() == made.isnan().any(1).tolist() == bad


@pytest.mark.parametrize("classes", [30, 4099])
def test_bad_rows(kernels: cuda_on_host.Kernels, classes: int) -> None:
    """NaN are models without a finite logit and labels that are no class, infinite a divergence, and no other rows."""
    student, teacher = torch.randn(5, classes), torch.randn(5, classes)
    student[1], teacher[2], student[4, -1] = -inf, -inf, -inf
    y = torch.tensor([3, -100, 4, classes, 5])
    with kernels.device(**SMALL), fusedtricks.backend("cuda_on_host"):
        student.requires_grad_()
        loss = distillation_loss(student, teacher, y, reduction="none", label_smoothing=0.0)
        (made,) = torch.autograd.grad(loss, student, torch.ones(5))
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert loss[4] == inf
    assert made.isnan().any(1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("classes", [7, 4099])
def test_rows_of_minus_infinity_in_every_block(kernels: cuda_on_host.Kernels, classes: int) -> None:
    for finite in (0, 1, -1):
        student, teacher = (torch.full((1, classes), -inf) for _ in range(2))
        student[0, finite], teacher[0, finite] = 3.0, -2.0
        y = torch.tensor([finite % classes])
        with kernels.device(**SMALL), fusedtricks.backend("cuda_on_host"):
            loss = distillation_loss(student.requires_grad_(), teacher, y, 2.0)
            (made,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert (made == 0).all()


def test_no_rows_and_no_order_of_memory(kernels: cuda_on_host.Kernels) -> None:
    """Nothing to do, and rows that take more than two levels of strides: these go through copies."""
    none = torch.empty(0, 3)
    with fusedtricks.backend("cuda_on_host"):
        assert distillation_loss(none, none, torch.empty(0, dtype=torch.long)).isnan()
        assert distillation_loss(none, none, reduction="sum") == 0
        assert distillation_loss(none, none, reduction="none").shape == (0,)
    student, teacher = (torch.randn(7, 5, 6, 8, 3)[:5, :, ::2, ::2].movedim(-1, 1) for _ in range(2))
    made = []
    for backend in ("cuda_on_host", "reference"):
        leaf = student.detach().requires_grad_()
        with fusedtricks.backend(backend):
            made.append(torch.autograd.grad(distillation_loss(leaf, teacher), leaf)[0])
    torch.testing.assert_close(*made)
    assert made[0].stride() == made[1].stride()


BUGS = {
    "divergence of a part not shifted to the row's maxima": (
        "math/distillation.h",
        "part.teacher * (teacher_fall - fall)",
        "A(0)",
        "a block",
    ),
    "one block's part for the row": (
        "cuda/distillation.cuh",
        "    s = group.reduce(s, join_sums);",
        "",
        "several blocks",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_caught(name: str) -> None:
    file, old, new, regime = BUGS[name]
    size, device = REGIMES[regime]
    bad = cuda_on_host.Kernels(build.build({file: (old, new)}, stems=("distillation",)))
    with bad.as_backend(), bad.device(**device):
        found = run("cuda_on_host", size, "T=2", "none", torch.float32)
    truth = run("reference", size, "T=2", "none", torch.float64)
    assert not all(torch.allclose(a.double(), b, 1e-5, 1e-5) for a, b in zip(found, truth, strict=True))
