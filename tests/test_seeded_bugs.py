"""Every seeded bug is caught by the parity sweep or by the bounds on hard values."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import CASES
from seeded_bugs import BUGS, NATIVE_BUGS
from sweep import INTERPRETED, Config, Target, check, check_accuracy, configurations, shape_of

from fusedtricks._op import Op

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the bugs are in the reference and in C++")


def failure(stem: str, config: Config, target: Target) -> str:
    """What the comparison says, "" if it passes. Any other error is a bug of the bug."""
    try:
        check(CASES[stem], config, target)
        if config.adversary:
            check_accuracy(CASES[stem], config, target)
    except AssertionError as said:
        return str(said) or "an assertion failed"
    return ""


def failures(stem: str, target: Target) -> Iterator[tuple[Config, str]]:
    """What fails the comparison: every shape and adversary once, then smallest first, the largest last."""
    case = CASES[stem]

    def order(config: Config) -> tuple[bool, bool, int]:
        size = math.prod(shape_of(case, config)[0])
        once = config in (Config(config.shape), Config("", adversary=config.adversary))
        return size > 300_000, not once, size

    for config in sorted(configurations(case), key=order):
        message = failure(stem, config, target)
        if message:
            yield config, message


@pytest.mark.parametrize("name", BUGS)
def test_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some configuration fails with the bug and passes without it."""
    op, target = Op.registry[BUGS[name].op], Target("cpu", "reference")
    right = op.implementation("reference")
    wrong = {"reference": lambda *args: BUGS[name].wrong(right, *args)}
    monkeypatch.setattr(op, "_implementations", wrong)
    for config, _ in failures(op.stem, target):
        monkeypatch.setattr(op, "_implementations", {"reference": right})
        if not failure(op.stem, config, target):
            return
        monkeypatch.setattr(op, "_implementations", wrong)
    pytest.fail(f"no configuration of {op.stem} notices: {name}")


CHECK_NATIVE = """
import importlib.util, itertools, sys, torch
spec = importlib.util.spec_from_file_location("fusedtricks._C", sys.argv[1])
sys.modules["fusedtricks._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path.insert(0, sys.argv[2])
from test_seeded_bugs import failures
from sweep import Target
for config, _ in itertools.islice(failures(sys.argv[3], Target("cpu", "cpu:baseline")), 20):
    print(config)
"""


def built() -> Path | None:
    """The build folder of this interpreter's extension, where its ninja file has compile commands to borrow."""
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    return folder if (folder / "build.ninja").exists() and (folder / "module.o").exists() else None


@pytest.mark.skipif(built() is None, reason="no native build to take the compile command from")
@pytest.mark.parametrize("name", NATIVE_BUGS)
def test_caught_in_a_kernel(name: str, tmp_path: Path) -> None:
    """One expression of one source is changed, compiled for the baseline alone, and linked with what there is."""
    bug, build, sources = NATIVE_BUGS[name], built(), ROOT / "csrc"
    text = (sources / bug.file).read_text()
    assert text.count(bug.right) == 1, f"csrc/{bug.file} no longer has: {bug.right}"
    # The source is copied too, for what it includes from its own folder is looked for there first.
    source = sources / "cpu" / f"{bug.op}.cpp"
    for path in (source, *(sources / "cpu").glob("*.h"), *(sources / "math").glob("*.h")):
        copy = tmp_path / "csrc" / path.relative_to(sources)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "csrc" / bug.file).write_text(text.replace(bug.right, bug.wrong))

    commands = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", build, "-t", "commands"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    object_file = f"{bug.op}.baseline.o"
    command = next(c for c in commands if c.endswith(f"-o {build / object_file}"))
    command = command.replace(f"-I{ROOT / 'csrc'}", f"-I{tmp_path / 'csrc'} -I{ROOT / 'csrc'}", 1)
    command = command.replace(f" {source} ", f" {tmp_path / 'csrc' / 'cpu' / source.name} ", 1)
    command = command.replace(str(build / object_file), str(tmp_path / object_file)).replace("-O3", "-O0")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=300)

    linking = (c for c in commands if " -shared " in c or " -bundle " in c)
    link = next(c for c in linking if Path(c.split(" -o ")[1].split(" ")[0]).name.startswith("_C."))
    output = tmp_path / "_C.so"
    before, _, after = link.partition(" -o ")
    link = f"{before} -o {output} {after.split(' ', 1)[1]}".replace(
        str(build / object_file), str(tmp_path / object_file)
    )
    subprocess.run(link, shell=True, check=True, cwd=tmp_path, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", CHECK_NATIVE, output, Path(__file__).parent, bug.op],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    caught = set(done.stdout.splitlines())
    right = [c for c in configurations(CASES[bug.op]) if str(c) in caught]
    assert any(not failure(bug.op, config, Target("cpu", "cpu:baseline")) for config in right), (
        f"no configuration of {bug.op} notices: {name}"
    )
