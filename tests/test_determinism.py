"""Kernels give the same bits from run to run, for any number of threads, and for any split of the batch."""

import pytest
import torch
from cases import CASES, Case
from parity import assert_bitwise_equal
from sweep import (
    DTYPES,
    INTERPRETED,
    Config,
    Target,
    cast,
    forced,
    forward_backward,
    generated,
    outputs,
    takes,
    targets,
)
from torch import Tensor

RUNS = [
    pytest.param(stem, shape, name, target, id=f"{stem}-{target}-{shape}-{name}")
    for stem, case in CASES.items()
    for shape in case.large
    for name in ("fp32", "bf16")
    for target in targets(case)
    if takes(target, DTYPES[name]) and target.backend != "reference"
]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one after another")


def results(case: Case, shape: str, dtype: str, target: Target, rows: slice = slice(None)) -> list[Tensor]:
    torch.manual_seed(1)
    size, *rest = case.large[shape]
    tensors = [cast(t, DTYPES[dtype]).to(target.device) for t in case.inputs(size, *rest)]
    ys = outputs(case.call(case.torch_fn, tensors, *rest))
    dys = [torch.randn(y.shape).to(target.device, y.dtype) for y in ys]
    if rows != slice(None):
        tensors[0], dys = tensors[0][rows], [dy[rows] for dy in dys]
    wanted = [i for i, name in enumerate(case.names) if name not in case.fixed]
    with forced(target):
        return forward_backward(case, case.fn, tensors, wanted, dys, *rest)


@pytest.mark.parametrize(("stem", "shape", "dtype", "target"), RUNS)
def test_runs_threads_and_batches(stem: str, shape: str, dtype: str, target: Target) -> None:
    case = CASES[stem]
    first = results(case, shape, dtype, target)
    for _ in range(2):
        for a, b in zip(first, results(case, shape, dtype, target), strict=True):
            assert_bitwise_equal(a, b, name="run to run")
    if target.device == "cpu":
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for a, b in zip(first, results(case, shape, dtype, target), strict=True):
                assert_bitwise_equal(a, b, name=f"{threads} threads instead of 2")
    if case.rowwise:
        cut = case.large[shape][0][0] // 3 + 1
        for rows in (slice(0, cut), slice(cut, None)):
            y = results(case, shape, dtype, target, rows)[0]
            assert_bitwise_equal(y, first[0][rows], name="y of a part of the batch")


def test_the_default_is_the_best_kernel() -> None:
    """The dispatcher's own choice and the forced one are the same code."""
    for stem, case in CASES.items():
        rest = case.shapes[case.shape][1:]
        tensors, dys = generated(case, Config(case.shape))
        wanted = [i for i, name in enumerate(case.names) if name not in case.fixed]
        default = forward_backward(case, case.fn, tensors, wanted, dys, *rest)
        with forced(Target("cpu", case.operators[0].cpu or "reference")):
            chosen = forward_backward(case, case.fn, tensors, wanted, dys, *rest)
        for a, b in zip(default, chosen, strict=True):
            assert_bitwise_equal(a, b, name=stem)
