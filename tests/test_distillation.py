"""distillation_loss beyond the parity sweep: every kind of target and teacher, extreme shares, errors."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from cases.distillation import torchs
from parity import assert_bitwise_equal, assert_no_worse, assert_within, largest
from sweep import INTERPRETED
from torch import Tensor

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import distillation_loss
from fusedtricks.ops._norm import accumulate_dtype

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the parity sweep runs the kernels")
inf = float("inf")
KINDS = ["none", "hard", "pair", "probabilities"]


def target_of(kind: str, size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Any:
    a, b = (torch.randint(size[1], (size[0], *size[2:])) for _ in range(2))
    lam, soft = torch.rand(size[0], dtype=dtype), torch.rand(size, dtype=dtype)
    return {"none": None, "hard": a, "pair": MixedTarget(a, b, lam), "probabilities": soft}[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(6, 40), (6, 5, 3)], ids=str)
def test_no_further_from_float64_than_torch(size: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    given, target = [torch.randn(size).to(dtype) for _ in range(2)], target_of(kind, size, dtype)

    def run(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in given]
        t = target.to(dtype) if kind == "probabilities" else target
        loss = fn(*inputs, t, 4.0, 0.3)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    for i, (ours, theirs, truth) in enumerate(
        zip(run(distillation_loss, dtype), run(torchs, dtype), run(torchs, torch.float64), strict=True)
    ):
        assert_no_worse(ours, theirs, truth, name=f"result {i}")
        if dtype.itemsize == 2:  # torch computes in 16 bits, which excuses much: of ours, only the result is rounded
            assert_within(ours, truth, 0.75 * torch.finfo(dtype).eps * largest(truth), name=f"result {i}")


def test_gradients_of_the_target_and_second_derivatives() -> None:
    for kind in KINDS:
        student, teacher = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        target, inputs = target_of(kind, (2, 3)), [student, teacher]
        if kind in ("pair", "probabilities"):
            inputs.append((target.lam if kind == "pair" else target).requires_grad_())

        def loss(s: Tensor, t: Tensor, *rest: Tensor, target: Any = target, kind: str = kind) -> Tensor:
            given = MixedTarget(target.a, target.b, *rest) if kind == "pair" else rest[0] if rest else target
            return distillation_loss(s, t, given, 2.0, 0.3, label_smoothing=0.1)

        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)


def test_transforms() -> None:
    student, teacher, y = torch.randn(4, 5), torch.randn(4, 5), torch.randint(5, (4,))
    each = torch.vmap(lambda s, t, y: distillation_loss(s, t, y, 2.0))(student, teacher, y)
    torch.testing.assert_close(each, distillation_loss(student, teacher, y, 2.0, reduction="none"))
    made = torch.func.grad(lambda s: distillation_loss(s, teacher, y, 2.0))(student)
    leaf = student.clone().requires_grad_()
    torch.testing.assert_close(made, torch.autograd.grad(distillation_loss(leaf, teacher, y, 2.0), leaf)[0])


def entries(rows: int, classes: int, k: int) -> tuple[Tensor, Tensor]:
    """A sparse teacher that names a class three times, knows nothing of another, and has one that is certain."""
    indices, values = torch.randint(classes, (rows, k)), 2 * torch.randn(rows, k, dtype=torch.float64)
    indices[:, -1] = indices[:, 1] = indices[:, 0]
    values[:, 2] = -inf
    values[0, 1:] = -inf
    return indices, values


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


SPARSE: dict[str, dict[str, Any]] = {
    "T=4": {"temperature": 4.0},
    "T=1, none": {"reduction": "none"},
    "smoothed, weighted": {"temperature": 2.0, "label_smoothing": 0.1, "weighted": True, "alpha": 0.3},
    "alpha=1, sum": {"alpha": 1.0, "reduction": "sum"},
}


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize("options", SPARSE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 7), (6, 301), (3, 5000)], ids=str)
def test_sparse_teachers(size: tuple[int, int], kind: str, options: str, backend: str) -> None:
    """Of every dtype and layout, with labels that the teacher knows; both gradients."""
    given = dict(SPARSE[options])
    indices, values = entries(*size, 6 if size[1] == 7 else 70)
    target, weight = target_of(kind, size), torch.linspace(0.5, 2, size[1]) if given.pop("weighted", False) else None
    if kind in ("hard", "pair"):
        (target if kind == "hard" else target.a).copy_(indices[:, 0])
    logits = torch.randn(size)

    def run(fn: Any, dtype: torch.dtype, of_values: torch.dtype, of_indices: torch.dtype, layout: str) -> list[Tensor]:
        tensors = [logits.to(dtype), values.to(of_values), indices.to(of_indices)]
        if layout == "transposed":
            tensors = [t.t().contiguous().t() for t in tensors]
        elif layout == "sliced":
            tensors = [torch.cat((t, t), 1)[:, : t.shape[1]] for t in tensors]
        leaves = [t.detach().requires_grad_() for t in tensors[:2]]
        wide = torch.promote_types(dtype, of_values)
        t = target.to(wide) if kind == "probabilities" else target
        more = given if weight is None else {**given, "weight": weight.to(wide)}
        loss = fn(leaves[0], (tensors[2], leaves[1]), t, **more)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    for dtype, of_values, of_indices, layout in (
        (torch.float32, torch.float32, torch.int64, "plain"),
        (torch.float32, torch.bfloat16, torch.int32, "transposed"),
        (torch.bfloat16, torch.bfloat16, torch.int64, "sliced"),
        (torch.float16, torch.float64, torch.int32, "plain"),
        (torch.float64, torch.float32, torch.int64, "transposed"),
        (torch.float32, torch.float64, torch.uint8 if size[1] < 256 else torch.int32, "sliced"),
    ):
        logits, values = logits.to(dtype).float(), values.to(of_values).double()
        with contextlib.nullcontext() if backend == "default" else fusedtricks.backend(backend):
            ours = run(distillation_loss, dtype, of_values, of_indices, layout)
        torchs_own = run(torchs, dtype, of_values, torch.int64, layout)
        truth = run(torchs, torch.float64, torch.float64, torch.int64, "plain")
        for i, (a, b, c) in enumerate(zip(ours, torchs_own, truth, strict=True)):
            name = f"result {i} of {dtype}, {of_values}, {of_indices}, {layout}"
            assert_no_worse(a, b.to(a.dtype), c, name=name, strides=a.stride(), precision=accumulate_dtype(dtype))
            if dtype.itemsize == 2 and i < 2:
                assert_within(a, c, 0.75 * torch.finfo(dtype).eps * largest(c), name=name)


def test_derivatives_and_transforms_of_a_sparse_teacher() -> None:
    for kind in KINDS:
        student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        indices, values = torch.tensor([[0, 3, 0], [1, 2, 3], [2, 2, 2]]), torch.randn(3, 3, dtype=torch.float64)
        target, inputs = target_of(kind, (3, 4)), [student, values.requires_grad_()]
        if kind in ("pair", "probabilities"):
            inputs.append((target.lam if kind == "pair" else target).requires_grad_())

        def loss(s: Tensor, v: Tensor, *rest: Tensor, i: Tensor = indices, y: Any = target, kind: str = kind) -> Tensor:
            given = MixedTarget(y.a, y.b, *rest) if kind == "pair" else rest[0] if rest else y
            return distillation_loss(s, (i, v), given, 2.0, 0.3, label_smoothing=0.1)

        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)
        made = torch.func.grad(loss, argnums=(0, 1))(*(t.detach() for t in inputs))
        torch.testing.assert_close(made, torch.autograd.grad(loss(*inputs), inputs[:2]))
        batch = torch.stack([student.detach(), 2 * student.detach()])
        each = torch.vmap(lambda s, v=values, f=loss, t=inputs[2:]: f(s, v, *t))(batch)
        torch.testing.assert_close(each, torch.stack([loss(s, *inputs[1:]) for s in batch]))


def test_compiled_with_a_sparse_teacher() -> None:
    """As eager, whether labels are there or not."""
    indices, values = entries(6, 40, 5)
    student, y = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))
    values = values.float().requires_grad_()
    for target in (None, y):
        fn = lambda s, v, y=target: distillation_loss(s, (indices, v), y, 2.0)  # noqa: E731
        torch._dynamo.reset()
        made = []
        for call in (fn, torch.compile(fn, fullgraph=True)):
            loss = call(student, values)
            made.append((loss, *torch.autograd.grad(loss, (student, values))))
        torch.testing.assert_close(*made, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_infinite_logits_and_a_sparse_teacher(backend: str) -> None:
    """-inf of the student counts only where the teacher has a probability; teachers that know nothing are NaN."""
    indices, values = torch.tensor([[0, 3, 5]] * 4), torch.randn(4, 3)
    student, y = torch.randn(4, 40), torch.full((4,), 3)
    student[0, 7] = student[1, 5] = student[2, 5] = -inf
    values[1, 2], values[3] = -inf, -inf
    with contextlib.nullcontext() if backend == "default" else fusedtricks.backend(backend):
        for target in (None, y):
            leaf = student.clone().requires_grad_()
            loss = distillation_loss(leaf, (indices, values), target, 2.0, reduction="none")
            (made,) = torch.autograd.grad(loss.sum(), leaf)
            assert loss[:2].isfinite().all()
            assert loss[2] == inf
            assert loss[3].isnan()
            assert made[:3].isfinite().all()
            assert made[3].isnan().all()
            torch.testing.assert_close(loss[:2], torchs(student, (indices, values), target, 2.0, reduction="none")[:2])


@pytest.mark.parametrize("classes", [9, 100])
def test_masked_students(classes: int) -> None:
    student, teacher = torch.randn(3, classes), torch.randn(3, classes)
    student[:, 4] = teacher[:, 4] = -inf
    rest = [i for i in range(classes) if i != 4]
    torch.testing.assert_close(
        distillation_loss(student, teacher), distillation_loss(student[:, rest], teacher[:, rest])
    )
    teacher[:, 4] = 0.0
    assert distillation_loss(student, teacher) == inf


@pytest.mark.parametrize("classes", [9, 100])
def test_a_term_without_a_share_is_left_out(classes: int) -> None:
    """Infinite divergences, NaN teachers and infinite cross-entropies, times 0."""
    student, teacher, y = torch.randn(3, classes), torch.full((3, classes), float("nan")), torch.randint(4, (3,))
    student.requires_grad_(), teacher.requires_grad_()
    for reduction in ("mean", "none"):
        loss = distillation_loss(student, teacher, y, alpha=0.0, reduction=reduction)
        theirs = torch.nn.functional.cross_entropy(student, y, reduction=reduction)
        torch.testing.assert_close(loss, theirs)
        made = torch.autograd.grad(loss.sum(), (student, teacher))
        torch.testing.assert_close(made[0], torch.autograd.grad(theirs.sum(), student)[0])
        assert (made[1] == 0).all()
        assert distillation_loss(student, teacher, alpha=0.0, reduction=reduction).shape == loss.shape
    masked = student.detach().clone()
    masked[:, 4] = -inf
    labels = torch.full((3,), 4)
    loss = distillation_loss(masked.requires_grad_(), masked.detach(), labels, 2.0, 1.0, label_smoothing=0.1)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, masked)[0].abs().max() < 1e-6


def test_ignored_labels_and_nothing_kept() -> None:
    student, teacher = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
    y = torch.tensor([3, -100, 7, -100])
    (made,) = torch.autograd.grad(distillation_loss(student, teacher, y, reduction="sum"), student)
    (kl,) = torch.autograd.grad(distillation_loss(student, teacher, reduction="sum"), student)
    torch.testing.assert_close(made[y < 0], kl[y < 0])
    loss = distillation_loss(student, teacher, torch.full((4,), -100))
    assert loss.isnan()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], kl / 4)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_gradient_beyond_the_caches(temperature: float, sparse: bool) -> None:
    """Stored past them, in rows of every alignment: row by row what a small one is, made with the loss or after it."""
    rows, classes = 2100, 4099  # 34 MB
    student, teacher, y = torch.randn(rows, classes), torch.randn(rows, classes), torch.randint(classes, (rows,))
    indices, values = entries(rows, classes, 64)

    def gradients(these: slice) -> list[Tensor]:
        leaf = student[these].clone().requires_grad_()
        given = (indices[these], values[these]) if sparse else teacher[these]
        loss = distillation_loss(leaf, given, y[these], temperature, reduction="sum", label_smoothing=0.1)
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]

    whole = gradients(slice(None))
    for these in (slice(0, 33), slice(rows - 33, rows)):
        for large, small in zip(whole, gradients(these), strict=True):
            torch.testing.assert_close(large[these], small, rtol=1e-5, atol=1e-8)
    assert_bitwise_equal(*whole)


def test_the_size_of_the_gradient_does_not_depend_on_the_temperature() -> None:
    student, teacher = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    size = [
        torch.autograd.grad(distillation_loss(student, teacher, None, t, 1.0), student)[0].norm() for t in (50, 100)
    ]
    torch.testing.assert_close(*size, rtol=0.05, atol=0)


def test_module_backward_twice_and_errors() -> None:
    student, teacher, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.randint(5, (4,))
    module = fusedtricks.nn.DistillationLoss(2.0, 0.3, label_smoothing=0.1)
    expected = distillation_loss(student, teacher, y, 2.0, 0.3, label_smoothing=0.1)
    torch.testing.assert_close(module(student, teacher, y), expected)
    torch.testing.assert_close(module(student, teacher.sort(1)[::-1], y), expected)
    assert "temperature=2.0, alpha=0.3" in repr(module)
    each = distillation_loss(student, teacher, y, reduction="none")
    torch.testing.assert_close(each.mean(), distillation_loss(student, teacher, y))
    twice = [torch.autograd.grad(3 * expected, student, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(*twice, rtol=0, atol=0)
    student, wrong = student.detach(), torch.tensor([[0, 0], [0, 1], [2, 5], [0, 7]])
    with fusedtricks.backend("reference"), pytest.raises(IndexError, match="Index 5 of the teacher is out of bounds"):
        distillation_loss(student, (wrong, teacher[:, :2]))
    with pytest.raises(IndexError, match="Index 5 of the teacher is out of bounds"):
        torch.func.grad(lambda s: distillation_loss(s, (wrong, teacher[:, :2].detach())))(student)
    for error, match, args, options in (
        (RuntimeError, "student's shape", (student, teacher[:3]), {}),
        (RuntimeError, "sparse teacher", (student, (y, y)), {}),
        (RuntimeError, "of torch.float32 and", (student, (teacher, teacher)), {}),
        (TypeError, "a pair of them", (student, [teacher]), {}),
        (IndexError, "Index 5 of the teacher is out of bounds: row 2", (student, (wrong, teacher[:, :2])), {}),
        (IndexError, "Index -1 of the teacher is out of bounds: row 1", (student, (-wrong, teacher[:, :2])), {}),
        (IndexError, "Target 5 is out of bounds", (student, (y[:, None], teacher[:, :1]), y + 5), {}),
        (ValueError, "temperature must be positive", (student, teacher), {"temperature": 0.0}),
        (ValueError, "not a valid value for reduction", (student, teacher), {"reduction": "batchmean"}),
        (RuntimeError, "label_smoothing must be between", (student, teacher, y), {"label_smoothing": 1.5}),
        (IndexError, "Target 5 is out of bounds: row 1", (student, teacher, torch.tensor([0, 5, 0, 0])), {}),
        (
            IndexError,
            "Target 5 is out of bounds: row 1",
            (student, teacher, torch.tensor([0, 5, 0, 0])),
            {"alpha": 1.0},
        ),
        (NotImplementedError, "not implemented for int64", (student, teacher.long()), {}),
        (IndexError, "at least one class", (student[:, :0], teacher[:, :0]), {}),
        (RuntimeError, "weight tensor should be defined", (student, teacher, y), {"weight": torch.ones(4)}),
        (ValueError, "batch_size", (student, teacher, y[:3]), {}),
        (ValueError, "MixedTarget.b must have shape", (student, teacher, MixedTarget(y, y[:3], torch.rand(()))), {}),
    ):
        with pytest.raises(error, match=match):
            distillation_loss(*args, **options)
