"""The repository keeps its shape: one stem per operation in every folder, one package, no tuned or foreign code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES, TESTED

import fusedtricks
from fusedtricks import _op
from fusedtricks._op import Op

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "fusedtricks/ops": "py",
    "csrc/cpu": "cpp",
    "csrc/cuda": "cu",
    "triton_kernels": "py",
    "tests/cases": "py",
    "bench": "py",
}
STEMS = sorted({op.stem for op in Op.registry.values()})


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_is_in_every_folder(stem: str, folder: str) -> None:
    path = ROOT / folder / f"{stem}.{FOLDERS[folder]}"
    complete = stem in CASES and CASES[stem].complete
    if not path.exists() and not complete and folder != "tests/cases":
        pytest.skip(f"{stem} is not complete: no {path.relative_to(ROOT)}")
    assert path.exists()


def test_every_case_has_operators() -> None:
    assert sorted([*CASES, *TESTED]) == STEMS
    for stem, files in TESTED.items():
        for name in files:
            assert (ROOT / "tests" / name).exists(), f"tests/cases/{stem}.py names {name}"


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda"])
def test_kernels_have_an_operation(folder: str) -> None:
    suffix = FOLDERS[folder]
    assert {p.stem for p in (ROOT / folder).glob(f"*.{suffix}")} <= set(STEMS)


@pytest.mark.parametrize("stem", CASES)
def test_exported(stem: str) -> None:
    if CASES[stem].fn.__module__ == f"fusedtricks.ops.{stem}":
        assert getattr(fusedtricks.functional, CASES[stem].fn.__name__) is CASES[stem].fn
    for ours, _ in CASES[stem].modules:
        assert getattr(fusedtricks.nn, ours.__name__) is ours


@pytest.mark.parametrize("stem", STEMS)
def test_the_readme_lists_the_operation(stem: str) -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"| `{stem}` |" in row for row in rows), f"python -m bench --report writes a row for {stem}"


def test_triton_kernels_are_not_autotuned_over_configurations() -> None:
    """Several configurations cannot run in the interpreter, and their choice is not reproducible."""
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in ("autotune", "heuristics", "Config"), f"{path.name}:{node.lineno} uses triton.{name}"


def test_a_bare_import_of_triton_kernels_is_refused() -> None:
    """Triton ships a package of that name; a checkout on sys.path must not stand in for it silently."""
    done = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "fusedtricks.triton_kernels" in done.stderr


def test_only_fusedtricks_is_installed_at_the_top() -> None:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    packages = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "packages")
    assert {name.split(".")[0] for name in packages} == {"fusedtricks"}
    folders = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "fusedtricks").rglob("__init__.py")}
    assert {f for f in folders if "triton_kernels" not in f} <= set(packages)


# ---- instruction sets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def functions() -> dict[str, str]:
    """Name, demangled where objdump can -> disassembly, of everything in the extension."""
    if _op._C is None or not hasattr(_op._C, "__file__"):
        pytest.skip("no compiled kernels in this build")
    objdump = shutil.which("objdump")
    if objdump is None or sys.platform != "linux":
        pytest.skip("no objdump to disassemble the extension with")
    text = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", _op._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    if "file format elf64-x86-64" not in text:
        pytest.skip("instruction sets are chosen at load on x86-64 alone")
    return found


@pytest.mark.parametrize(
    ("registers", "allowed"),
    [(r"%zmm|%k[0-7]\b", ("avx512",)), (r"%ymm", ("avx512", "avx2"))],
    ids=["zmm in avx512 alone", "ymm in avx2 and avx512 alone"],
)
def test_no_instruction_leaves_its_namespace(
    functions: dict[str, str], registers: str, allowed: tuple[str, ...]
) -> None:
    """Else an inline function that the linker shares would stop an older processor."""
    # Names of lambdas within lambdas objdump may leave as the linker sees them.
    spellings = [s for isa in allowed for s in (f"fusedtricks::{isa}::", f"11fusedtricks{len(isa)}{isa}")]
    inside = [name for name in functions if any(s in name for s in spellings)]
    assert any(re.search(registers, functions[name]) for name in inside), "nothing uses these registers at all"
    leaked = [n for n, code in functions.items() if n not in inside and re.search(registers, code)]
    assert not leaked, f"{len(leaked)} functions, among them {leaked[:3]}"
