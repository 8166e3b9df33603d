"""distillation_loss against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep import INTERPRETED
from torch import Tensor

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import cross_entropy, distillation_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="its kernels are those of cross_entropy")
inf = float("inf")


def definition(student: Tensor, teacher: Tensor, target: Any, temperature: float, alpha: float) -> Tensor:
    log_p, log_s = ((t / temperature).log_softmax(1) for t in (teacher, student))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_s), 0.0).sum(1).mean()
    loss = alpha * temperature**2 * kl
    return loss if target is None else loss + (1 - alpha) * cross_entropy(student, target)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["none", "hard", "pair"])
@pytest.mark.parametrize("size", [(6, 40), (6, 5, 3)], ids=str)
def test_against_the_definition(size: tuple[int, ...], kind: str, alpha: float, temperature: float) -> None:
    student, teacher = (torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (torch.randint(size[1], (size[0], *size[2:])) for _ in range(2))
    target: Any = {"none": None, "hard": a}.get(kind, MixedTarget(a, b, torch.rand(6, dtype=torch.float64)))
    ours, theirs = (fn(student, teacher, target, temperature, alpha) for fn in (distillation_loss, definition))
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(y, (student, teacher), retain_graph=True) for y in (ours, theirs))
    torch.testing.assert_close(*grads)
    low = distillation_loss(student.bfloat16(), teacher.bfloat16(), target, temperature, alpha)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), theirs, rtol=0.05, atol=0.05)


def test_a_sparse_teacher_is_a_masked_dense_one() -> None:
    student, teacher = (torch.randn(7, 30, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values, indices = teacher.topk(4, 1)
    masked = torch.full_like(teacher, -inf).scatter(1, indices, values)
    y = torch.randint(30, (7,))
    made = []
    for given in (masked, (indices, values)):
        loss = distillation_loss(student, given, y, 2.0, 0.7)
        made.append((loss, *torch.autograd.grad(loss, (student, teacher), retain_graph=True)))
        assert all(t.isfinite().all() for t in made[-1])
    torch.testing.assert_close(*made)


def test_masked_students() -> None:
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    student[:, 4] = teacher[:, 4] = -inf
    rest = [i for i in range(9) if i != 4]
    torch.testing.assert_close(
        distillation_loss(student, teacher), distillation_loss(student[:, rest], teacher[:, rest])
    )
    teacher[:, 4] = 0.0
    assert distillation_loss(student, teacher) == inf


def test_the_size_of_the_gradient_does_not_depend_on_the_temperature() -> None:
    student, teacher = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    size = [
        torch.autograd.grad(distillation_loss(student, teacher, None, t, 1.0), student)[0].norm() for t in (50, 100)
    ]
    torch.testing.assert_close(*size, rtol=0.05, atol=0)


def test_module_and_errors() -> None:
    student, teacher, y = torch.randn(4, 5), torch.randn(4, 5), torch.randint(5, (4,))
    module = fusedtricks.nn.DistillationLoss(2.0, 0.3, label_smoothing=0.1)
    expected = distillation_loss(student, teacher, y, 2.0, 0.3, label_smoothing=0.1)
    torch.testing.assert_close(module(student, teacher, y), expected)
    assert "temperature=2.0, alpha=0.3" in repr(module)
    each = distillation_loss(student, teacher, y, reduction="none")
    torch.testing.assert_close(each.mean(), distillation_loss(student, teacher, y))
    with pytest.raises(RuntimeError, match="student's shape"):
        distillation_loss(student, teacher[:3])
    with pytest.raises(RuntimeError, match="sparse teacher"):
        distillation_loss(student, (y, y))
    with pytest.raises(ValueError, match="temperature must be positive"):
        distillation_loss(student, teacher, temperature=0.0)
