"""`make gpu-check` and `python -m bench` keep what they have, whatever fails or ends them; and without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from cases import CASES

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench, from wherever pytest is started

from bench import gpu_check, operations
from bench.gpu_check import Stage, run

pytestmark = pytest.mark.skipif(sweep.INTERPRETED, reason="does not depend on the interpreter")
SLEEP = "import time; print('begun', flush=True); time.sleep(60)"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPU_CHECK_OUT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("program", "minutes", "status", "last"),
    [
        pytest.param("print('done')", 9.0, "passed", "done", id="passes"),
        pytest.param("raise SystemExit('reason')", 9.0, "failed", "reason", id="fails"),
        pytest.param("raise SystemExit('no such tool')", 9.0, "unavailable", "no such tool", id="unavailable"),
        pytest.param(SLEEP, 0.05, "timed out", "begun", id="takes too long"),
        pytest.param(SLEEP, 0.0, "not started", "GPU_CHECK_MINUTES are over", id="too late"),
    ],
)
def test_a_stage_ends_in_one_of_five_ways(program: str, minutes: float, status: str, last: str, out: Path) -> None:
    stage = Stage("a:b", [sys.executable, "-c", program], unavailable=("no such tool",))
    result = run(stage, minutes)
    assert (result.status, result.last_line) == (status, last)
    assert result.seconds < 50
    assert (out / "a-b.log").exists() == (status != "not started")


def test_the_revision_of_a_copy_without_git_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FUSEDTRICKS_REVISION", raising=False)
    assert gpu_check.revision() == "unknown"
    monkeypatch.setenv("FUSEDTRICKS_REVISION", "0123456789ab")
    assert gpu_check.revision() == "0123456789ab"


@pytest.mark.parametrize("devices", [["cpu"], ["cuda"], ["cpu", "cuda"]], ids=" ".join)
def test_back_ends_are_those_of_the_devices(devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "devices", devices)
    assert {target.device for target in sweep.targets(CASES["layer_norm"])} == set(devices)


def test_a_wrong_row_costs_no_other_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    from bench import __main__, report
    from bench import run as measuring

    measure, figures = measuring.measure, tmp_path / "figures.json"

    def wrong_in_bf16(operation: Any, mode: str, size: Any, dtype: torch.dtype, device: str, budget: float) -> Any:
        assert dtype != torch.bfloat16, "off by 1"
        return measure(operation, mode, size, dtype, device, budget)

    monkeypatch.setattr(measuring, "measure", wrong_in_bf16)
    monkeypatch.setattr(measuring, "can_compile", lambda device: "not here")
    monkeypatch.setattr(measuring, "plan", lambda op, quick: [(d, (4, 16), "forward") for d in op.dtypes[::-1]])
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    arguments = ["shake_shake", "--device", "cpu", "--system-heap", "--seconds", "0.01", "--record"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json", str(figures)])
    with pytest.raises(SystemExit, match=r"1 rows failed, .*shake_shake forward 4x16 torch.bfloat16.*off by 1"):
        __main__.main()
    assert "off by 1" in capsys.readouterr().err
    assert [row["dtype"] for row in json.loads(figures.read_text())["rows"]] == ["float32"]
    assert not report.RESULTS.exists()


def test_a_contestant_that_cannot_run_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.run import able

    def cannot() -> Any:
        raise RuntimeError("no such device")

    operation = operations()["shake_shake"]
    assert list(able(operation, "forward", "compile", lambda: cannot)) == []
    assert list(able(operation, "forward", "compile", cannot)) == []
    assert list(able(operation, "forward", "compile", lambda: None)) == []
    assert capsys.readouterr().err.count("shake_shake forward: compile cannot run this") == 2
    assert [name for name, _ in able(operation, "forward", "compile", lambda: list)] == ["compile"]


def test_without_a_gpu_nothing_is_run() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(gpu_check.ROOT / "bench" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU
    assert "Nothing was run" in done.stdout
