"""Counting instructions under valgrind works, and tells two amounts of work apart."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started

pytest.importorskip("rich")  # of what prints figures
from bench import instructions

pytestmark = [
    pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="counts CPU kernels"),
]


def test_backward_costs_more_than_forward() -> None:
    counts = instructions.measure(["rms_norm"], quick=True)
    modes = [mode for _, mode, _ in instructions.chosen(["rms_norm"], quick=True)]
    assert modes == ["forward", "forward+backward"]
    for who in ("ours", "torch"):
        assert 1000 < counts[f"0 {who}"] < counts[f"1 {who}"] < 10_000_000
