"""The Triton kernels of distillation in the interpreter: options that the parity sweep tries on larger shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.distillation import torchs
from parity import assert_no_worse
from sweep import INTERPRETED

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import distillation_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts")

OPTIONS: dict[str, dict[str, Any]] = {
    "T=1": {},
    "mean, weighted, smoothed": {"temperature": 2.0, "alpha": 0.3, "weighted": True, "label_smoothing": 0.1},
    "none, T=4": {"temperature": 4.0, "reduction": "none"},
    "teacher alone": {"temperature": 2.0, "alpha": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(70, 5), (2, 9000), (17, 4500), (2, 6, 3, 5)], ids=str)
def test_against_torch(size: tuple[int, ...], options: str) -> None:
    given = dict(OPTIONS[options])
    weight = torch.rand(size[1]) + 0.1 if given.pop("weighted", False) else None
    values = [2 * torch.randn(size) for _ in range(2)]
    a, b = (torch.randint(size[1], (size[0], *size[2:])) for _ in range(2))
    a[1] = -100
    lam = torch.rand(size[0])

    def run(fn: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [v.detach().to(dtype).requires_grad_() for v in values]
        more = given if weight is None else {**given, "weight": weight.to(dtype)}
        loss = fn(*inputs, MixedTarget(a, b, lam.to(dtype)), **more)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]

    with fusedtricks.backend("triton"):
        made = run(distillation_loss, torch.float32)
    each = zip(made, run(torchs, torch.float32), run(torchs, torch.float64), strict=True)
    for i, (ours, theirs, truth) in enumerate(each):
        assert_no_worse(ours, theirs, truth, name=f"result {i}")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "k"), [((70, 5), 7), ((2, 5000), 70), ((17, 4500), 9), ((70, 40), 70)], ids=str)
def test_sparse_teachers(size: tuple[int, int], k: int, options: str) -> None:
    """The label among what the teacher knows, a class three times, one without a probability; k beyond a block too."""
    given = dict(OPTIONS[options])
    weight = torch.rand(size[1]) + 0.1 if given.pop("weighted", False) else None
    student, values = 2 * torch.randn(size), 2 * torch.randn(size[0], k)
    a, b = (torch.randint(size[1], size[:1]) for _ in range(2))
    indices, lam = torch.randint(size[1], values.shape), torch.rand(size[0])
    indices[:, 0], indices[:, 1], indices[:, -1], values[:, 2] = a, a, a, -torch.inf

    def run(fn: Any, dtype: torch.dtype, columns: bool = False) -> list[torch.Tensor]:
        leaves = [v.detach().to(dtype) for v in (student, values)]
        leaves = [(v.t().contiguous().t() if columns else v).requires_grad_() for v in leaves]
        more = given if weight is None else {**given, "weight": weight.to(dtype)}
        loss = fn(leaves[0], (indices, leaves[1]), MixedTarget(a, b, lam.to(dtype)), **more)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    theirs, truth = run(torchs, torch.float32), run(torchs, torch.float64)
    for columns in (False, True):
        with fusedtricks.backend("triton"):
            made = run(distillation_loss, torch.float32, columns)
        for i, (ours, one, true) in enumerate(zip(made, theirs, truth, strict=True)):
            assert_no_worse(ours, one, true, name=f"result {i}", strides=ours.stride())


@pytest.mark.parametrize("classes", [30, 4099])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bad_rows_of_a_sparse_teacher(temperature: float, classes: int) -> None:
    """NaN, all of them, are rows of which an index is no class, and those of a teacher that knows nothing."""
    student, values, y = torch.randn(6, classes), torch.randn(6, 3), torch.randint(classes, (6,))
    indices = torch.tensor([[0, 1, 2], [0, classes, 2], [-1, 1, 2], [0, 1, 2], [0, 1, 2**40], [1, 1, 1]])
    values[3], values[4, 2] = -torch.inf, -torch.inf
    bad = [False, True, True, True, True, False]
    for target in (None, y):
        leaf = student.clone().requires_grad_()
        with fusedtricks.backend("triton"):
            loss = distillation_loss(leaf, (indices, values), target, temperature, reduction="none")
            (made,) = torch.autograd.grad(loss, leaf, torch.ones(6))
        assert loss.isnan().tolist() == bad
        assert made.isnan().all(1).tolist() == made.isnan().any(1).tolist() == bad


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("finite", [0, 3000, -1])
def test_parts_of_minus_infinity(finite: int, sparse: bool) -> None:
    """Of rows that several programs share, and that have one finite logit."""
    student, teacher = (torch.full((1, 9000), -torch.inf) for _ in range(2))
    student[0, finite], teacher[0, finite] = 3.0, -2.0
    y = torch.tensor([finite % 9000])
    given = (torch.tensor([[5, finite % 9000]]), torch.tensor([[-torch.inf, -2.0]])) if sparse else teacher
    with fusedtricks.backend("triton"):
        loss = distillation_loss(student.requires_grad_(), given, y, 2.0)
        (made,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert (made == 0).all()
