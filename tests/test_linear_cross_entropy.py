"""linear_cross_entropy against cross_entropy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.cross_entropy import torchs
from parity import assert_no_worse
from sweep import INTERPRETED

from fusedtricks import MixedTarget
from fusedtricks.functional import linear_cross_entropy

pytestmark = pytest.mark.skipif(INTERPRETED, reason="its kernels are those of cross_entropy")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "sum, an ignored class": {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "pair", "one lam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 4, 5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_against_the_logits(with_bias: bool, chunk: int | None, dtype: torch.dtype, kind: str, options: str) -> None:
    rows, width, classes, given = 14, 9, 23, OPTIONS[options]
    values = [torch.randn(s).to(dtype) for s in ((rows, width), (classes, width), (classes,))]
    class_weight = (torch.rand(classes) + 0.1).to(dtype)
    a, b = (torch.randint(classes, (rows,)) for _ in range(2))
    a[3] = b[3] = b[5] = given.get("ignore_index", -100)
    lam = torch.rand(rows if kind == "pair" else ())
    target: Any = a if kind == "hard" else MixedTarget(a, b, lam)

    def run(fused: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w, bias = (v.detach().to(dtype).requires_grad_() for v in values)
        inputs = [x, w, bias] if with_bias else [x, w]
        t = MixedTarget(a, b, lam.to(dtype)) if kind != "hard" and not fused else target
        if fused:
            loss = linear_cross_entropy(
                x, w, t, bias if with_bias else None, class_weight=class_weight, chunk=chunk, **given
            )
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        else:
            logits = torch.nn.functional.linear(x, w, bias if with_bias else None)
            loss = torchs(logits, t, class_weight.to(dtype), **given)
        grads = torch.autograd.grad(3 * loss, inputs)
        return [loss.detach().to(dtype), *grads]

    truth = run(False, torch.float64)
    for i, (ours, theirs, true) in enumerate(zip(run(True, dtype), run(False, dtype), truth, strict=True)):
        assert_no_worse(ours, theirs, true, name=f"result {i}", ulps=8)


def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedtricks.ops import linear_cross_entropy as module

    seen, fwd = [], module.cross_entropy_fwd
    monkeypatch.setattr(
        module, "cross_entropy_fwd", lambda logits, *rest: seen.append(logits.shape) or fwd(logits, *rest)
    )
    x, w = torch.randn(300, 8, requires_grad=True), torch.randn(70_000, 8)
    linear_cross_entropy(x, w, torch.randint(70_000, (300,))).backward()
    assert max(rows * classes * 4 for rows, classes in seen) <= module.CHUNK_BYTES
    assert sum(rows for rows, _ in seen) == 300


def test_nothing_kept_and_shapes() -> None:
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy(x, w, torch.full((2, 3), -100))
    assert loss.isnan()
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    for args, error in (
        ((x, torch.randn(5, 3), torch.zeros(2, 3).long()), RuntimeError),
        ((x, w, torch.zeros(2).long()), RuntimeError),
        ((x, w.double(), torch.zeros(2, 3).long()), RuntimeError),
        ((x, w, torch.full((2, 3), 5)), IndexError),
    ):
        with pytest.raises(error):
            linear_cross_entropy(*args)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(x, w, torch.zeros(2, 3).long(), reduction="none")
