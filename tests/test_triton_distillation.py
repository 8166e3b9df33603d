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
@pytest.mark.parametrize("size", [(70, 5), (2, 5000), (2, 6, 3, 5)], ids=str)
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
