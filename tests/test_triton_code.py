"""What Triton kernels move and what they compile to, on a machine without a GPU.

Two passes cover this file, because Triton decides once per process whether it interprets: one with TRITON_INTERPRET=1
and one without.
"""

from __future__ import annotations

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
