"""What users install: wheel and sdist, in another environment, with and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = ("triton_kernels", "tests", "bench", "examples", "csrc")
COMPILERS = ("c++", "g++", "clang++")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "TRITON_INTERPRET")}
    environment |= {"FUSEDTRICKS_CUDA": "0", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of what git would give: no build products to be picked up by accident."""
    copy = tmp_path_factory.mktemp("checkout") / "fusedtricks"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "out", "*.so", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, copy, ignore=unwanted, symlinks=True)
    (copy / "fusedtricks" / "triton_kernels").unlink(missing_ok=True)
    return copy


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, cwd=sources)
    (archive,) = out.glob("*.tar.gz")
    return archive


def unpack(archive: Path, to: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(to, filter="data") if hasattr(tarfile, "data_filter") else file.extractall(to)
    (folder,) = to.iterdir()
    return folder


def build_wheel(folder: Path, out: Path, **env: str) -> tuple[Path, str]:
    log = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        out,
        ".",
        cwd=folder,
        **env,
    )
    (wheel,) = out.glob("*.whl")
    return wheel, log


# What is tested is what gets into the wheel, not how fast that is.
QUICK = {"FUSEDTRICKS_CPU": "baseline", "CXXFLAGS": "-O0"}


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(sdist, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist: what it forgets, the wheel lacks."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    return build_wheel(unpacked, tmp_path_factory.mktemp("wheel"), **QUICK)[0]


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with `wheel` in it, and with this environment's packages except our own; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=folder)
    # Paths, unlike site directories, bring no editable installation along.
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


def environment_report(python: Path, where: Path) -> str:
    report = run(python, "-m", "fusedtricks", cwd=where)
    origin = run(python, "-c", "import fusedtricks; print(fusedtricks.__file__)", cwd=where)
    assert origin.startswith(str(python.parent.parent)), "the installed package is not the one that was imported"
    return report


def test_sdist_has_what_is_needed(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    tracked = [p for p in (*ROOT.glob("csrc/**/*"), *ROOT.glob("triton_kernels/*.py")) if p.is_file()]
    missing = {p.relative_to(ROOT).as_posix() for p in tracked} - names
    assert not missing
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names


def test_wheel_has_no_stray_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"fusedtricks"}
    assert not top & set(NOT_OURS)
    assert "fusedtricks/triton_kernels/__init__.py" in names
    assert libraries(names) == ["_C", "_node", "_plan"]


def libraries(names: list[str]) -> list[str]:
    return sorted(Path(name).name.split(".")[0] for name in names if name.endswith(".so"))


def test_wheel_runs_in_another_environment(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path / "env")
    report = environment_report(python, tmp_path)
    assert "layer_norm_fwd" in report
    assert "cpu:baseline" in report
    assert re.search(r"autograd nodes +C\+\+", report)
    code = (
        "import importlib.util, torch, fusedtricks;"
        "fusedtricks.nn.LayerNorm(8)(torch.randn(4, 8)).sum().backward();"
        "assert importlib.util.find_spec('fusedtricks.triton_kernels'); print('good')"
    )
    assert "good" in run(python, "-c", code, cwd=tmp_path)


def test_torch_whose_headers_do_not_fit(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    """What is built on the stable ABI is there all the same, and the library of an earlier build is not."""
    source = unpacked / "csrc" / "node.cpp"
    text = source.read_text()
    try:
        source.write_text("#error no such header\n" + text)
        other, log = build_wheel(unpacked, tmp_path / "out", **QUICK)
    finally:
        source.write_text(text)
    assert "csrc/node.cpp does not build with this torch" in log
    with zipfile.ZipFile(other) as file:
        assert libraries(file.namelist()) == ["_C", "_plan"]
    code = (
        "import torch, fusedtricks; from fusedtricks import _op;"
        "y = fusedtricks.nn.LayerNorm(8)(torch.randn(4, 8)); y.sum().backward();"
        "assert _op._node is None; assert isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction);"
        "print('good')"
    )
    assert "good" in run(install(other, tmp_path / "env"), "-c", code, cwd=tmp_path)


def test_installs_without_a_compiler_and_says_so(sdist: Path, tmp_path: Path) -> None:
    """A PATH that has everything but compilers."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).iterdir() if Path(folder).is_dir() else ():
            link = tools / tool.name
            if tool.name not in COMPILERS and not tool.name.endswith(("cc", "clang")) and not link.is_symlink():
                link.symlink_to(tool)
    wheel, log = build_wheel(unpack(sdist, tmp_path / "source"), tmp_path / "out", PATH=str(tools))
    assert "no C++ compiler found" in log
    report = environment_report(install(wheel, tmp_path / "env"), tmp_path)
    assert "not built: no C++ compiler" in report
    assert "cpu:" not in report
