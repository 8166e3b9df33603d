"""Random lists of parameters in random layouts, stepped against torch in float64, with canaries around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import GRAD_LAYOUTS, NAMES, PARAM_LAYOUTS, canaries_unharmed, laid_out, make
from torch import Tensor

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

TENSORS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 6), max_size=3),  # shape
        st.sampled_from(PARAM_LAYOUTS),
        st.sampled_from(GRAD_LAYOUTS),
        st.integers(0, 15),  # a bit for each step: is there a gradient?
    ),
    min_size=1,
    max_size=5,
)


def fuzz(
    name: str,
    tensors: Any,
    dtype: torch.dtype,
    groups: int,
    maximize: bool,
    clip: bool,
    ema: bool,
    skipped: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs, rooms = [], [], []
    for shape, layout, _, _ in tensors:
        view, room = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
        p = torch.nn.Parameter(view)
        p.data = view
        ours.append(p)
        theirs.append(torch.nn.Parameter(view.double().clone()))
        rooms.append((view, room))
    split = lambda ps: [{"params": ps[g::groups], "lr": 0.01 * (g + 1)} for g in range(groups)]  # noqa: E731
    kwargs = {"maximize": maximize} | ({"state_dtype": torch.float32} if dtype == torch.bfloat16 else {})
    # Where decay cancels the gradient, a step is the sign of a rounding error, unless eps is above it.
    eps = {"eps": 1e-2} if dtype != torch.float64 and name != "SGD" else {}
    extra = ({"max_grad_norm": 0.5} if clip else {}) | ({"ema_decay": 0.75} if ema else {})
    a = make(name, split(ours), **kwargs, **eps, **extra)
    b = make(name, split(theirs), theirs=True, maximize=maximize, **eps)
    averages: dict[int, Tensor] = {}
    for step in range(4):
        for p, q, (shape, _, layout, present) in zip(ours, theirs, tensors, strict=True):
            grad, _ = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
            p.grad, q.grad = (grad, grad.double().contiguous().clone()) if present >> step & 1 else (None, None)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        if dtype == torch.bfloat16:  # one step at a time, so that only one rounding is between them
            with torch.no_grad():
                for p, q in zip(ours, theirs, strict=True):
                    q.copy_(p)
        before = [q.detach().clone() for q in theirs]
        a.found_inf = torch.tensor(float(2 * (step == skipped)))
        a.step()
        if step != skipped:
            b.step()
            for i, q in enumerate(theirs):
                if q.grad is not None:
                    averages[i] = averages.get(i, before[i]).lerp(q.detach(), 0.25)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-7
    near = {"rtol": tolerance, "atol": tolerance}
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(p.detach().double(), q.detach(), **near)
        if ema and i in averages:
            torch.testing.assert_close(a.state[p]["ema"].double(), averages[i], **near)
    assert all(canaries_unharmed(view, room) for view, room in rooms)


CASES = {
    "name": st.sampled_from(NAMES),
    "tensors": TENSORS,
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    "groups": st.integers(1, 3),
    "maximize": st.booleans(),
    "clip": st.booleans(),
    "ema": st.booleans(),
    "skipped": st.integers(0, 7),  # the step at which a scaler finds infinities, if it is one of the four
    "seed": st.integers(0, 2**20),
}
QUIET = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "derandomize": True, "database": None}


@hypothesis.settings(max_examples=1000, **QUIET)
@hypothesis.given(**CASES)
def test_fuzz(**case: Any) -> None:
    fuzz(**case)


@pytest.mark.slow
@hypothesis.settings(max_examples=20_000, **QUIET)
@hypothesis.given(**CASES)
def test_fuzz_for_long(**case: Any) -> None:
    fuzz(**case)
