"""Bounds of our own on values where being no worse than torch would allow too much; the errors that are published."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES
from sweep import DTYPES, INTERPRETED, NAME_OF, Config, Target, check_accuracy, devices, takes, targets

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started

from bench import __main__, operations

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


@pytest.mark.skipif(INTERPRETED, reason="the parity sweep runs what is small enough for the interpreter")
@pytest.mark.parametrize("stem", operations())
def test_errors_of_every_operation_are_published(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in devices:
        path = tmp_path / f"{device}.json"
        arguments = [stem, "--accuracy", "--system-heap", "--device", device, "--json", str(path)]
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        __main__.main()
        rows = json.loads(path.read_text())["accuracy"]
        assert rows
        for row in rows:
            errors, unit = row["errors"], torch.finfo(getattr(torch, row["dtype"])).eps
            assert errors["ours"] is not None, row
            assert not row["input"].startswith("ordinary") or errors["ours"] <= errors["torch"] + 4 * unit, row


def test_what_has_no_published_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "sync_batch_norm", "--accuracy"])
    with pytest.raises(SystemExit, match="sync_batch_norm runs in several processes"):
        __main__.main()
