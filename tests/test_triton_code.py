"""What Triton kernels move and what they compile to, on a machine without a GPU.

Two passes cover this file, because Triton decides once per process whether it interprets: one with TRITON_INTERPRET=1
and one without.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started

from bench import aot, traffic  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile; run without TRITON_INTERPRET")
SPECIALISATIONS = [
    pytest.param(note, launch, target, id=f"{stem}-{note}-{target}")
    for stem in aot.stems()
    for note, launch in ([] if INTERPRETED else aot.specialisations(stem))
    for target in aot.TARGETS
]


@interpreted
@pytest.mark.parametrize("stem", traffic.counted())
def test_bytes_stay_within_budget(stem: str) -> None:
    rows = list(traffic.measure(stem))
    assert rows
    over = [row for row in rows if not 1 <= row["ratio"] <= row["budget"]]
    assert not over, over


@interpreted
def test_a_sample_may_have_more_elements_than_32_bits_count() -> None:
    """Its first program alone, which has elements to write however many follow."""
    from fusedtricks.triton_kernels.shake_shake import COLUMNS, shake, shake_backward

    x, y, z = torch.ones(COLUMNS), torch.zeros(COLUMNS), torch.zeros(COLUMNS)
    share, length = torch.full((1,), 0.25), {"D_of": 2**28, "chunks": 2**21, "ONE": True, "ALIGN": 16}
    shake[(1,)](x1=x, x2=y, y=z, alpha=share, COLUMNS=COLUMNS, **length)
    assert (z == 0.25).all()
    shake_backward[(1,)](dy=x, dx1=y, dx2=z, beta=share, COLUMNS=COLUMNS, **length)
    assert (y == 0.25).all()
    assert (z == 0.75).all()


@compiled
@pytest.mark.parametrize(("note", "launch", "target"), SPECIALISATIONS)
def test_no_spills_and_wide_accesses(note: str, launch: aot.Launch, target: str) -> None:
    wrong = aot.complaints(note, aot.compile_specialisation(launch, target), target)
    assert not wrong, f"{note} for {target}: {', '.join(wrong)}"


@compiled
@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_scaled_logit_is_rounded(target: str) -> None:
    """z - top is 0 at the maximum only if no multiplication goes into the subtraction."""
    from fusedtricks.ops._loss import Options
    from fusedtricks.triton_kernels import cross_entropy as ce

    scaled = Options(-100, 1.0, 0.0, 0.0, 0.0, 1 / 0.7, 1)
    x, labels, losses = (
        torch.empty(*s, dtype=d, device="meta") for s, d in (((64, 1000), None), ((64,), torch.int64), ((64,), None))
    )
    stats, total = torch.empty((3, 64), device="meta"), torch.empty((), device="meta")
    args = ce.lay_out(x, x, x) | ce.common_args(labels, None, None, None, 1000, scaled) | {"weight_sum": None}
    launches = ce.plan_forward(x, args, losses, losses, stats, scaled)
    for launch in (*launches, ce.plan_backward(total, None, x, x, args, stats, total, scaled)):
        fused = []  # multiplications that an addition has taken in; functions have some of their own
        for each in (launch, launch._replace(contract=True)):
            asm = aot.compile_specialisation(each, target).asm
            code = asm["ptx"] if target.startswith("sm_") else asm["amdgcn"]
            fused.append(len(re.findall(r"\bfma\.rn|v_(?:pk_)?(?:fma|mad)", code)))
        assert fused[0] < fused[1]
