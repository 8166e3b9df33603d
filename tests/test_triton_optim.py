"""The optimizers' Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from optim_tables import ALIGNMENTS, BF16, FP32, FP64, RULES, Entry, Problem, assert_same, every_kind
from sweep import INTERPRETED

from fusedtricks.ops import _table

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities that are meant
]
TILE = 8192
# pow is exp2 and log2 there, so scalars of a step differ in their last bits.
ULPS = 4
each_stem = pytest.mark.parametrize("stem", RULES)
SERVED = [e for e in every_kind(45) if e.dtype != FP64]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grad_scale": {"grad_scale": 1024.0, "found_inf": 0.0},
    "given norm": {"norm": 3.0, "max_norm": 0.7, "grad_scale": 4.0},
    "clipping": {"max_norm": 0.7, "grad_scale": 4.0},
    "norm is NaN": {"norm": float("nan"), "max_norm": 0.7},
}


def kernel(stem: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"fusedtricks.triton_kernels.{stem}"), f"{stem}_")


def both(stem: str, entries: list[Entry], **kwargs: Any) -> tuple[Problem, Problem]:
    """The step by the kernels and by the reference."""
    options = {k: kwargs.pop(k) for k in ("groups", "size", "restart") if k in kwargs}
    ours, theirs = (Problem(stem, entries, **options) for _ in range(2))
    return ours.run(kernel(stem), **kwargs), theirs.run(theirs.reference, **kwargs)


@each_stem
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind(stem: str, options: dict[str, Any]) -> None:
    assert_same(*both(stem, SERVED, steps=2, **options), ulps=ULPS)


@each_stem
def test_float64_is_served_by_the_reference(stem: str) -> None:
    assert_same(*both(stem, every_kind(9), max_norm=1.0), ulps=0)


@pytest.mark.parametrize("stem", ["adamw", "sgd"])
def test_alignments(stem: str) -> None:
    assert_same(*both(stem, ALIGNMENTS, grad_scale=2.0), ulps=ULPS)


@each_stem
def test_tiles(stem: str) -> None:
    """A tensor in several tiles, its neighbours in some of them, empty ones where tiles meet: each steps once."""
    sizes = (0, 3, TILE - 3, 0, TILE + 5, 100, 0)
    entries = [Entry(n, BF16, stochastic=True, group=i % 2, taken=i) for i, n in enumerate(sizes)]
    assert_same(*both(stem, entries, max_norm=1e9, restart=False), ulps=ULPS)


def test_stochastic_rounding_draws_the_same_bits() -> None:
    # Moments in fp32, because the interpreter truncates what it stores as bfloat16.
    entries = [Entry(n, BF16, FP32, stochastic=True, offset=n % 3, taken=n) for n in (1, 40, 2100)]
    assert_same(*both("sgd", entries, steps=3), ulps=0)


@each_stem
@pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
def test_found_inf_skips_everything(stem: str, found: float) -> None:
    ours = Problem(stem, SERVED).run(kernel(stem), grad_scale=8.0, found_inf=found, max_norm=1.0, norm=2.0)
    assert ours.outcome.tolist() == [2.0, 1.0]
    before = Problem(stem, SERVED).tensors()
    for name, t in ours.tensors().items():
        assert name == "outcome" or torch.equal(t, before[name]), f"{name} was written"


@pytest.mark.parametrize("taken", [2**24, 10**9])
def test_steps_beyond_float32(taken: int) -> None:
    for step in (FP32, FP64, None):
        ours, theirs = both("adamw", [Entry(10, taken=taken, step=step)], steps=3)
        assert_same(ours, theirs, ulps=ULPS)
        assert ours.progress.item() == taken + 3


def test_a_step_that_somebody_changed_is_obeyed() -> None:
    ours, theirs = (Problem("adamw", [Entry(10, taken=5), Entry(TILE + 1)]) for _ in range(2))
    for problem in (ours, theirs):
        for row in problem.rows:
            row.step.fill_(100)
    assert_same(ours.run(kernel("adamw")), theirs.run(theirs.reference), ulps=ULPS)


@each_stem
@pytest.mark.parametrize(("options", "launches"), [({}, 1), ({"max_norm": 1.0}, 2)])
def test_launches(stem: str, options: dict[str, Any], launches: int) -> None:
    """One a step whatever the number of tensors and groups, two with clipping."""
    from fusedtricks.triton_kernels.common import Launch

    entries = [Entry(n % 5, group=n % 2, offset=n % 3, ema=n % 2 == 0) for n in range(30)]
    with mock.patch.object(Launch, "__call__", autospec=True) as launched:
        Problem(stem, entries).run(kernel(stem), **options)
    assert launched.call_count == launches


@each_stem
def test_gaps_between_rows(stem: str) -> None:
    """Rows may as well begin with a tile of their own."""
    entries = [Entry(n, group=n % 2) for n in (5, 0, 0, 40)]
    ours, theirs = (Problem(stem, entries) for _ in range(2))
    taken = [-(-e.n // TILE) * TILE for e in ours.entries]
    ours.table[:, _table.START] = torch.tensor([sum(taken[:i]) for i in range(len(taken))])
    ours.segments[0, 3] = sum(taken)
    assert_same(ours.run(kernel(stem)), theirs.run(theirs.reference), ulps=ULPS)


def test_an_empty_table() -> None:
    assert Problem("sgd", []).run(kernel("sgd"), found_inf=1.0, max_norm=1.0).outcome.tolist() == [0.0, 1.0]
