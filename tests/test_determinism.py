"""Bitwise the same from run to run, for any number of threads, and for any split of the batch."""

import pytest
import torch
from cases import CASES, Case
from parity import assert_bitwise_equal
from sweep import DTYPES, INTERPRETED, Config, Target, forced, forward_backward, generated, takes, targets
from torch import Tensor

SIZES = [(4099, 33), (37, 4097), (3, 100_003)]
RUNS = [
    pytest.param(stem, size, name, target, id=f"{stem}-{target}-{'x'.join(map(str, size))}-{name}")
    for stem, case in CASES.items()
    for size in SIZES
    for name in ("fp32", "bf16")
    for target in targets(case)
    if takes(target, DTYPES[name])
]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one after another")


def results(case: Case, size: tuple[int, ...], dtype: str, target: Target, rows: slice = slice(None)) -> list[Tensor]:
    torch.manual_seed(1)
    tensors = [t.to(target.device, DTYPES[dtype]) for t in case.inputs(size, 1)]
    dy = torch.randn(size).to(target.device, DTYPES[dtype])[rows]
    tensors[0] = tensors[0][rows]
    with forced(target):
        return forward_backward(case, case.fn, tensors, range(len(tensors)), [dy], 1)


@pytest.mark.parametrize(("stem", "size", "dtype", "target"), RUNS)
def test_runs_threads_and_batches(stem: str, size: tuple[int, ...], dtype: str, target: Target) -> None:
    case = CASES[stem]
    first = results(case, size, dtype, target)
    for _ in range(3):
        for a, b in zip(first, results(case, size, dtype, target), strict=True):
            assert_bitwise_equal(a, b, name="run to run")
    if target.device == "cpu" and target.backend != "reference":
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for a, b in zip(first, results(case, size, dtype, target), strict=True):
                assert_bitwise_equal(a, b, name=f"{threads} threads instead of 2")
    if case.rowwise and target.backend != "reference":
        cut = size[0] // 3 + 1
        for rows in (slice(0, cut), slice(cut, None)):
            y = results(case, size, dtype, target, rows)[0]
            assert_bitwise_equal(y, first[0][rows], name="y of a part of the batch")


def test_the_default_is_the_best_kernel() -> None:
    """The dispatcher's own choice and the forced one are the same code."""
    for stem, case in CASES.items():
        rest = case.shapes[case.shape][1:]
        tensors, dys = generated(case, Config(case.shape))
        default = forward_backward(case, case.fn, tensors, range(len(tensors)), dys, *rest)
        with forced(Target("cpu", case.operators[0].cpu or "reference")):
            chosen = forward_backward(case, case.fn, tensors, range(len(tensors)), dys, *rest)
        for a, b in zip(default, chosen, strict=True):
            assert_bitwise_equal(a, b, name=stem)
