"""`make gpu-check`: every check that needs a GPU, stage by stage, with the machine's own torch and no network.

GPU_CHECK names the stages: build parity graphs sync determinism sanitizer bench; default: all. `sanitizer:memcheck` is
one tool, `bench:layer_norm` one operation. No stage takes ten minutes: `parity` and `bench` are one for each operation.
GPU_CHECK_MINUTES ends the whole run, so that what kills it later finds everything written; default: no end.
GPU_CHECK_BENCH is passed on to `python -m bench`: "--quick" for two sizes of each operation.
GPU_CHECK_OUT is the folder for summary.json, a log for each stage and the figures; default: out/gpu-check. Of those,
results/ is what goes into bench/results/. Without git, FUSEDTRICKS_REVISION is the commit they are figures of.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "parity", "graphs", "sync", "determinism", "sanitizer", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_GPU = 2  # exit status


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    minutes: float = 9.5
    env: dict[str, str] = field(default_factory=dict)
    # Words in the log that turn a failure into "unavailable": the tool cannot work on this machine.
    unavailable: tuple[str, ...] = ()


@dataclass
class Result:
    stage: str
    status: str  # passed, failed, timed out, unavailable, not started
    seconds: float = 0.0
    last_line: str = ""


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "--device", "cuda", *arguments]


def ask(program: str) -> Any:
    """What a Python program prints, as JSON; it sees the package, bench and the tests."""
    command = [sys.executable, "-c", f"import json, bench; print(json.dumps({program}))"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def archs() -> str:
    """TORCH_CUDA_ARCH_LIST of the GPUs that are here: the package's own list takes several times as long to build."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return "" if torch.version.hip else ";".join(f"{a}.{b}" for a, b in sorted(found))


def build() -> list[Stage]:
    command = f"{link()} && {sys.executable} setup.py build_ext --inplace"
    return [Stage("build", ["bash", "-c", command], env={"TORCH_CUDA_ARCH_LIST": archs()})]


def link() -> str:
    """The in-place build's stand-in for `package_dir`."""
    return "ln -sfn ../triton_kernels fusedtricks/triton_kernels"


def parity(wanted: str = "") -> list[Stage]:
    """The sweep of each operation; for one that is no function of tensors, the files that test it."""
    # A test computes on two threads; each worker compiles Triton kernels, which is most of the time.
    workers = min(8, max(1, (os.cpu_count() or 1) // 2))
    spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    stages = {stem: ["tests/test_parity.py", "-k", f"[{stem}-"] for stem in ask("[*__import__('cases').CASES]")}
    for stem, files in ask("__import__('cases').TESTED").items():
        if [f"tests/{name}" for name in files] not in stages.values():  # once, where operations share them
            stages[stem] = [f"tests/{name}" for name in files]
    return [Stage(f"parity:{s}", pytest(*spread, *a)) for s, a in stages.items() if wanted in ("", s)]


def of_test_gpu(name: str) -> Callable[[], list[Stage]]:
    return lambda: [Stage(name, pytest("tests/test_gpu.py", "-k", name))]


def sanitizer(kinds: tuple[str, ...] = SANITIZERS) -> list[Stage]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return [Stage("sanitizer", [], unavailable=("compute-sanitizer is not installed",))]
    # Without torch's cache of allocations every tensor is an allocation of its own, whose bounds are known.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    stages = []
    for kind in kinds:
        files = ("tests/test_gpu.py", "tests/test_gpu_optim.py")
        tests = pytest(*files, "-k", "small and not second and not reference and not launches")
        command = [tool, "--tool", kind, "--error-exitcode", "3", *tests]
        stages.append(Stage(f"sanitizer:{kind}", command, 9.5 / len(kinds), env, ("Device not supported",)))
    return stages


def bench(stem: str) -> Stage:
    import torch

    figures = output() / "results" / slug(torch.cuda.get_device_name()) / f"{stem}.json"
    to = ["--json", str(figures), "--plot", str(output() / f"bench-{stem}.png")]
    # Hundreds of samples of a GPU's call; what compiles takes longer.
    command = [sys.executable, "-m", "bench", stem, "--device", "cuda", "--seconds", "0.2", *to]
    return Stage(f"bench:{stem}", [*command, *shlex.split(os.environ.get("GPU_CHECK_BENCH", ""))])


def stages(wanted: list[str]) -> Iterator[Stage]:
    makers = {"build": build, "sanitizer": sanitizer}
    for name in wanted:
        stage, _, choice = name.partition(":")
        if stage == "bench":
            yield from map(bench, [choice] if choice else ask("[*bench.operations()]"))
        elif stage == "parity":
            yield from parity(choice)
        elif stage == "sanitizer" and choice:
            yield from sanitizer((choice,))
        else:
            yield from makers.get(stage, of_test_gpu(stage))()


def output() -> Path:
    return Path(os.environ.get("GPU_CHECK_OUT") or ROOT / "out" / "gpu-check").resolve()


def run(stage: Stage, minutes: float) -> Result:
    """Run one stage; its output goes to the terminal and to a log. `minutes` are left for the whole run."""
    print(f"\n==== {stage.name}", flush=True)
    if not stage.command:
        print(stage.unavailable[0])
        return Result(stage.name, "unavailable", last_line=stage.unavailable[0])
    if minutes <= 0:
        return Result(stage.name, "not started", last_line="GPU_CHECK_MINUTES are over")
    start, log = time.monotonic(), output() / f"{stage.name.replace(':', '-')}.log"
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.env}
    # A process group of its own, so that a stage past its limit ends with everything it started; no session of its own,
    # so that what ends this process by its session ends the stage too.
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,
    )
    alarm = Alarm(process, min(stage.minutes, minutes) * 60)
    try:
        with log.open("wb", buffering=0) as file:
            for line in process.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
                file.write(line)
        code = process.wait()
    except BaseException:  # Ctrl-C, which the other group does not get
        alarm.ring()
        raise
    finally:
        alarm.cancel()
    text = log.read_text(errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    status = "timed out" if alarm.rang else "passed" if code == 0 else "failed"
    reason = next((words for words in stage.unavailable if words in text), None)
    if status != "passed" and reason:
        status, last = "unavailable", reason
    return Result(stage.name, status, round(time.monotonic() - start, 1), last)


class Alarm:
    """Ends a process group that outlives its limit."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        from threading import Timer

        self.process, self.rang = process, False
        self.timer = Timer(seconds, self.ring)
        self.timer.daemon = True
        self.timer.start()

    def ring(self) -> None:
        self.rang = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def cancel(self) -> None:
        self.timer.cancel()


def main() -> int:
    try:
        import torch
    except ImportError:
        print(f"gpu-check: {sys.executable} has no torch; set PYTHON. Nothing was run.")
        return NO_GPU
    if not torch.cuda.is_available():
        print(f"gpu-check: no GPU found by torch {torch.__version__} of {sys.executable}. Nothing was run.")
        return NO_GPU

    wanted = (os.environ.get("GPU_CHECK") or " ".join(STAGES)).replace(",", " ").split()
    unknown = [name for name in wanted if name.split(":")[0] not in STAGES]
    if unknown:
        print(f"gpu-check: no stage {', '.join(unknown)}; see bench/gpu_check.py.")
        return 1
    if "build" not in wanted:
        wanted.insert(0, "build")  # quick where nothing changed
    output().mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: the stage ends too
    end = time.monotonic() + 60 * float(os.environ.get("GPU_CHECK_MINUTES") or "inf")
    results: list[Result] = []
    for stage in stages(wanted):
        results.append(run(stage, (end - time.monotonic()) / 60))
        summary(results)
        if stage.name == "build" and results[-1].status != "passed":
            break
    print("\n==== summary")
    for r in results:
        print(f"{r.stage:<24} {r.status:<12} {r.seconds:>7.1f} s  {r.last_line}")
    print(f"logs and figures: {output()}")
    return 0 if all(r.status in ("passed", "unavailable") for r in results) else 1


def revision() -> str:
    """The commit that is measured, "-dirty" if anything but recorded results has changed since.

    A copy of the files without git has FUSEDTRICKS_REVISION instead.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSEDTRICKS_REVISION") or "unknown"


def slug(device: str) -> str:
    """The folder of a device under bench/results/."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def summary(results: list[Result]) -> None:
    import torch

    content = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "revision": revision(),
        "stages": [asdict(r) for r in results],
    }
    (output() / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
