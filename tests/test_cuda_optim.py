"""The optimizers' CUDA kernels on the CPU, thread by thread (tests/cuda_on_host), against the reference."""

from __future__ import annotations

from typing import Any

import cuda_on_host
import pytest
import torch
from cuda_on_host import build
from optim_tables import ALIGNMENTS, BF16, FP16, FP32, FP64, RULES, Entry, Problem, assert_same, every_kind
from sweep import INTERPRETED

from fusedtricks.ops import _table

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]

# The order of threads and blocks differs as well.
DEVICES: dict[str, dict[str, int]] = {
    "a real device": {},
    "64 threads": {"threads": 64, "order": 5},
    "32 threads": {"threads": 32, "order": 1},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grad_scale": {"grad_scale": 1024.0, "found_inf": 0.0},
    "given norm": {"norm": 3.0, "max_norm": 0.7, "grad_scale": 4.0},
    "norm below the maximum": {"norm": 0.5, "max_norm": 0.7},
    "norm is NaN": {"norm": float("nan"), "max_norm": 0.7},
}
each_stem = pytest.mark.parametrize("stem", RULES)
TILE = 8192


@pytest.fixture(scope="module")
def kernels() -> cuda_on_host.Kernels:
    return cuda_on_host.load()


def both(kernels: cuda_on_host.Kernels, stem: str, entries: list[Entry], **kwargs: Any) -> tuple[Problem, Problem]:
    """The step by the kernels and by the reference."""
    options = {k: kwargs.pop(k) for k in ("groups", "size", "restart") if k in kwargs}
    ours, theirs = (Problem(stem, entries, **options) for _ in range(2))
    return ours.run(kernels.ops[f"{stem}_"], **kwargs), theirs.run(theirs.reference, **kwargs)


@each_stem
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind(kernels: cuda_on_host.Kernels, stem: str, options: dict[str, Any]) -> None:
    for device in DEVICES.values():
        with kernels.device(**device):
            assert_same(*both(kernels, stem, every_kind(45), steps=2, **options))


@each_stem
def test_alignments(kernels: cuda_on_host.Kernels, stem: str) -> None:
    for device in DEVICES.values():
        with kernels.device(**device):
            assert_same(*both(kernels, stem, ALIGNMENTS, grad_scale=2.0))


@each_stem
def test_tiles(kernels: cuda_on_host.Kernels, stem: str) -> None:
    """A tensor in several tiles, its neighbours in some of them, empty ones where tiles meet: each steps once."""
    sizes = (0, 3, TILE - 3, 0, 0, 2 * TILE + 5, 100, TILE - 105, 0)
    entries = [Entry(n, group=i % 2, taken=i) for i, n in enumerate(sizes)]
    for order in (0, 1):
        with kernels.device(order=order):
            assert_same(*both(kernels, stem, entries, steps=2))
    assert_same(*both(kernels, stem, [Entry(0), Entry(0)]))
    assert_same(*both(kernels, stem, [], max_norm=1.0))


@each_stem
def test_many_rows_in_a_tile(kernels: cuda_on_host.Kernels, stem: str) -> None:
    entries = [Entry(i % 4, group=i // 100, offset=i % 3, taken=i % 5) for i in range(150)]
    assert_same(*both(kernels, stem, entries))
    assert_same(*both(kernels, stem, entries + every_kind(9), restart=False))


@each_stem
@pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
def test_found_inf_skips_everything(kernels: cuda_on_host.Kernels, stem: str, found: float) -> None:
    entries, options = every_kind(20), {"grad_scale": 8.0, "found_inf": found, "max_norm": 1.0, "norm": 2.0}
    ours, theirs = both(kernels, stem, entries, **options)
    assert_same(ours, theirs)
    assert ours.outcome.tolist() == [2.0, 1.0]
    before = Problem(stem, entries).tensors()
    for name, t in ours.tensors().items():
        assert name == "outcome" or torch.equal(t, before[name]), f"{name} was written"


@each_stem
def test_clipping(kernels: cuda_on_host.Kernels, stem: str) -> None:
    """The order of a sum differs from the reference's, and nothing else; its own is always the same."""
    entries = [*every_kind(60), Entry(2 * TILE + 11, offset=1)]
    for max_norm in (1.0, 1e9):
        found = []
        for order in (0, 1, 2, 3):
            with kernels.device(order=order):
                ours, theirs = both(kernels, stem, entries, max_norm=max_norm, grad_scale=2.0)
            assert_same(ours, theirs, ulps=4)
            found.append(ours)
        for other in found[1:]:
            assert_same(found[0], other, ulps=0)


def test_clipping_of_large_and_small_gradients(kernels: cuda_on_host.Kernels) -> None:
    """Squares that fp32 cannot hold."""
    for size in (1e-30, 1e30):
        assert_same(*both(kernels, "sgd", [Entry(1000), Entry(10, BF16)], size=size, max_norm=size), ulps=4)


@pytest.mark.parametrize("taken", [2**24 - 1, 2**24, 2**24 + 1, 10**9])
def test_steps_beyond_float32(kernels: cuda_on_host.Kernels, taken: int) -> None:
    for step in (FP32, FP64, None):
        ours, theirs = both(kernels, "adamw", [Entry(10, taken=taken, step=step)], steps=3)
        assert_same(ours, theirs)
        assert ours.progress.item() == taken + 3


def test_a_step_that_somebody_changed_is_obeyed(kernels: cuda_on_host.Kernels) -> None:
    ours, theirs = (Problem("adamw", [Entry(10, taken=5), Entry(TILE + 1)]) for _ in range(2))
    for problem in (ours, theirs):
        for row in problem.rows:
            row.step.fill_(100)
    assert_same(ours.run(kernels.ops["adamw_"]), theirs.run(theirs.reference))
    assert ours.progress.tolist() == [101, 101]


def test_orders_of_threads(kernels: cuda_on_host.Kernels) -> None:
    for stem in RULES:
        found = []
        for order in (0, 1, 2, 3):
            with kernels.device(order=order):
                problem = Problem(stem, [*every_kind(45), Entry(TILE)])
                found.append(problem.run(kernels.ops[f"{stem}_"], max_norm=1.0, grad_scale=2.0, steps=2))
        for other in found[1:]:
            assert_same(found[0], other, ulps=0)


@pytest.mark.parametrize(
    ("options", "launches"), [({}, 1), ({"norm": 1.0, "max_norm": 1.0}, 1), ({"max_norm": 1.0}, 2)]
)
def test_launches(kernels: cuda_on_host.Kernels, options: dict[str, Any], launches: int) -> None:
    """One a step whatever the number of tensors and groups, two with clipping."""
    entries = [Entry(n % 50, group=n % 2, offset=n % 3, ema=n % 2 == 0) for n in range(200)]
    for stem in RULES:
        before = kernels.launches()
        Problem(stem, entries).run(kernels.ops[f"{stem}_"], **options)
        assert kernels.launches() - before == launches


def test_unlike_dtypes_share_no_launch(kernels: cuda_on_host.Kernels) -> None:
    before = kernels.launches()
    Problem("adamw", every_kind(4)).run(kernels.ops["adamw_"])
    assert kernels.launches() - before == 6


@each_stem
def test_gaps_between_rows(kernels: cuda_on_host.Kernels, stem: str) -> None:
    """Rows may as well begin with a tile of their own, and `progress` be longer than the table."""
    entries = [Entry(n, group=n % 2) for n in (5, 0, TILE, TILE + 1, 0, 40)]
    ours, theirs = (Problem(stem, entries) for _ in range(2))
    taken = [-(-e.n // TILE) * TILE for e in ours.entries]
    ours.table[:, _table.START] = torch.tensor([sum(taken[:i]) for i in range(len(taken))])
    ours.segments[0, 3] = sum(taken)
    assert_same(ours.run(kernels.ops[f"{stem}_"]), theirs.run(theirs.reference))


def test_wrong_scalars_are_refused(kernels: cuda_on_host.Kernels) -> None:
    problem = Problem("sgd", [Entry(3)])
    given = (problem.table, problem.segments, problem.progress, problem.hyper, problem.outcome)
    with pytest.raises(RuntimeError, match="found_inf must be one float32 or float64 number, got 2"):
        kernels.ops["sgd_"](*given, None, torch.zeros(2), None, None)


# ---- sown bugs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("last = before >> kStepBits == static_cast<Progress>(tiles - 1);", "last = true;"),
        ("if (scaling.skip) return;", ""),
        ("aligned_at(grad, head) &&", ""),
        ("return at + i * stride < single;", "return at + i * stride <= single;"),
        ("    __syncthreads();  // everybody is done with the slots\n", ""),
    ],
    ids=["every block advances the step", "found_inf", "alignment", "tail", "barrier"],
)
def test_sown_bugs_are_caught(old: str, new: str) -> None:
    broken = cuda_on_host.Kernels(build.build({"cuda/multi_tensor.cuh": (old, new)}, stems=("adamw",)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(broken)


def check_everything(kernels: cuda_on_host.Kernels) -> None:
    for order in (0, 1):
        with kernels.device(order=order):
            assert_same(*both(kernels, "adamw", [Entry(TILE + 9), Entry(300, skew=1)], found_inf=0.0))
            assert_same(*both(kernels, "adamw", [Entry(i % 7, FP16, FP32) for i in range(80)], found_inf=1.0))
            assert_same(*both(kernels, "adamw", [Entry(40 + i % 7) for i in range(80)]))
