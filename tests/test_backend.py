"""backend() forces, nests and refuses clearly; backends() and `python -m fusedtricks` tell what runs."""

import subprocess
import sys

import pytest
import torch

import fusedtricks
from fusedtricks import _op
from fusedtricks._op import Op


@pytest.fixture
def op() -> Op:
    return Op.registry["layer_norm_fwd"]


def test_backend_forces_and_nests(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, kernel = [], op.implementation("reference")
    for name in ("reference", "triton"):
        monkeypatch.setitem(op._implementations, name, lambda *a, name=name: ran.append(name) or kernel(*a))
    x = torch.randn(2, 8)
    call = lambda: fusedtricks.functional.layer_norm(x, (8,))  # noqa: E731
    with fusedtricks.backend("reference"):
        call()
        with fusedtricks.backend("triton"):
            call()
        call()
        with pytest.raises(KeyError), fusedtricks.backend("triton"):
            raise KeyError
        call()
    call()
    assert ran == ["reference", "triton", "reference", "reference"]


@pytest.mark.parametrize("name", ["Reference", "", "gpu", "avx2"])
def test_unknown_back_end(name: str) -> None:
    with (
        pytest.raises(ValueError, match=r"expected one of reference, cpu, cuda, triton, got"),
        fusedtricks.backend(name),
    ):
        pass
    assert _op._forced is None


def test_missing_back_end_says_what_there_is(op: Op) -> None:
    missing = "cuda" if "cuda" not in op.kernels else "cpu:none"
    with (
        fusedtricks.backend(missing),
        pytest.raises(
            RuntimeError, match=f"layer_norm_fwd has no '{missing}' implementation here; available: reference"
        ),
    ):
        fusedtricks.functional.layer_norm(torch.randn(2, 8), (8,))


@pytest.mark.parametrize("name", sorted(Op.registry))
def test_every_available_back_end_can_be_had(name: str) -> None:
    op = Op.registry[name]
    assert op.available()[0] == "reference"
    for backend in op.available():
        assert callable(op.implementation(backend)), backend
        assert op.implementation(backend) is op.implementation(backend)


def test_the_reference_differs_from_the_kernel_in_what_is_called(op: Op) -> None:
    if op.cpu is None:
        pytest.skip("no compiled kernels in this build")
    assert op.implementation("cpu") is op.implementation(op.cpu)
    assert op.implementation("cpu") is not op.implementation("reference")


def test_table_and_printout(capsys: pytest.CaptureFixture[str]) -> None:
    fusedtricks.backends()
    printed = capsys.readouterr().out
    rows = _op.table()
    assert [r.op for r in rows] == list(Op.registry)
    for row in rows:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row.op} "))
        assert row.cpu in line
        assert row.cuda in line
        assert row.why
        assert row.why in line
        assert row.cpu in (Op.registry[row.op].cpu, "reference")


def test_python_m_fusedtricks() -> None:
    done = subprocess.run([sys.executable, "-m", "fusedtricks"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in Op.registry:
        assert name in done.stdout
    assert torch.__version__ in done.stdout
