"""Bounds of our own on values where being no worse than torch would allow too much."""

import pytest
import torch
from cases import CASES
from sweep import DTYPES, INTERPRETED, NAME_OF, Config, Target, check_accuracy, takes, targets

RUNS = [
    pytest.param(stem, name, dtype, target, id=f"{stem}-{target}-{name}, {NAME_OF[dtype]}")
    for stem, case in CASES.items()
    for name, adversary in case.adversaries.items()
    for dtype in adversary.dtypes
    for target in targets(case)
    if takes(target, dtype)
]


@pytest.mark.skipif(INTERPRETED, reason="the parity sweep runs what is small enough for the interpreter")
@pytest.mark.parametrize(("stem", "adversary", "dtype", "target"), RUNS)
def test_error_against_the_scale_of_the_result(stem: str, adversary: str, dtype: torch.dtype, target: Target) -> None:
    check_accuracy(CASES[stem], Config("", NAME_OF[dtype], adversary=adversary), target)


@pytest.mark.parametrize("stem", [stem for stem, case in CASES.items() if case.family == "norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_saved_statistics_are_fp32_or_wider(stem: str, dtype: torch.dtype) -> None:
    """Statistics saved in 16 bits cost gradients two digits."""
    case, saved = CASES[stem], []
    size, *rest = case.shapes[case.shape]
    tensors = [
        t if n in case.fixed else t.to(dtype).requires_grad_()
        for n, t in zip(case.names, case.inputs(size, *rest), strict=True)
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(case.fn, tensors, *rest)
    pointers = {t.data_ptr() for t in tensors}
    computed = [t for t in saved if t.data_ptr() not in pointers]
    assert computed
    assert {t.dtype for t in computed if t.is_floating_point()} <= {DTYPES["fp32"], DTYPES["fp64"]}
