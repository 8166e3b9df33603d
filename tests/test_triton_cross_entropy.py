"""The Triton kernels of cross_entropy in the interpreter: what the parity sweep does not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_no_worse
from sweep import INTERPRETED

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import cross_entropy

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts")

OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True, "label_smoothing": 0.2},
    "extras": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "temperature": 2.0, "return_lse": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "pair", "one lam", "probabilities"])
@pytest.mark.parametrize("size", [(9, 5), (3, 1000), (1, 70_001), (2, 6, 3, 5)], ids=str)
def test_against_the_reference(size: tuple[int, ...], kind: str, options: str) -> None:
    given: dict[str, Any] = {**OPTIONS[options], "reduction": "none" if options in ("smoothed", "extras") else "mean"}
    classes, lead = size[1], (size[0], *size[2:])
    if "weight" in given:
        given["weight"] = torch.rand(classes) + 0.1
    x = (3 * torch.randn(size)).requires_grad_()
    a, b = (torch.randint(classes, lead) for _ in range(2))
    if a.numel() > 2:
        a.view(-1)[1], b.view(-1)[1], b.view(-1)[2] = -100, -100, -100
    lam = torch.rand(size[:1] if kind == "pair" else ())
    target: Any = {"hard": a, "probabilities": torch.rand(size)}.get(kind, MixedTarget(a, b, lam))

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        cast = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        t = MixedTarget(a, b, cast(lam)) if isinstance(target, MixedTarget) else cast(target)
        leaf = x.detach().to(dtype).requires_grad_()
        with fusedtricks.backend(backend):
            ys = cross_entropy(leaf, t, **{k: cast(v) for k, v in given.items()})
            ys = ys if isinstance(ys, tuple) else (ys,)
            return [*(y.detach() for y in ys), *torch.autograd.grad(sum(y.sum() for y in ys), leaf)]

    truth = run("reference", torch.float64)
    each = zip(run("triton", torch.float32), run("reference", torch.float32), truth, strict=True)
    for i, (ours, reference, true) in enumerate(each):
        assert_no_worse(ours, reference, true, name=f"result {i}")


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_of_other_classes_need_not_be_finite(distilled: bool) -> None:
    x, labels = torch.randn(3, 40, requires_grad=True), torch.tensor([0, 1, 0])
    weight = torch.full((40,), float("inf"))
    weight[:2] = torch.tensor([0.5, 1.0])
    with fusedtricks.backend("triton"):
        if distilled:
            loss = fusedtricks.functional.distillation_loss(x, torch.randn(3, 40), labels, weight=weight, alpha=0.0)
        else:
            loss = cross_entropy(x, labels, weight)
        (ours,) = torch.autograd.grad(loss, x)
    want = torch.nn.functional.cross_entropy(x, labels, weight)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ours, *torch.autograd.grad(want, x))


@pytest.mark.parametrize("classes", [3 * 4096, 600_000])
def test_rows_of_minus_infinity_in_every_block(classes: int) -> None:
    for finite in (0, classes // 2, classes - 1):
        x = torch.full((1, classes), -float("inf"))
        x[0, finite] = 3.0
        x.requires_grad_()
        with fusedtricks.backend("triton"):
            loss = cross_entropy(x, torch.tensor([finite]))
            (made,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert (made == 0).all()


def test_bad_rows() -> None:
    """Ignored rows are inert, a row without a finite logit is NaN, and so is a label that is no class."""
    x = torch.randn(5, 30)
    x[1], x[2] = float("nan"), -float("inf")
    y = torch.tensor([3, -100, 4, 30, 5])
    with fusedtricks.backend("triton"):
        x.requires_grad_()
        loss = cross_entropy(x, y, reduction="none", label_smoothing=0.1)
        (made,) = torch.autograd.grad(loss, x, torch.ones(5))
    assert loss.isnan().tolist() == [False, False, True, True, False]
    assert loss[1] == 0
    assert (made[1] == 0).all()
    assert made.isnan().any(1).tolist() == [False, False, True, True, False]
