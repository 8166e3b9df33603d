"""Instructions executed by one call on one thread, counted by valgrind's callgrind: exact where wall time is noise.

Run by `python -m bench --instructions`. valgrind 3.19 has no AVX-512, so it is the AVX2 kernels, torch's too, that run.
The count includes Python's share of a call: at the smallest size it is nearly all of it.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, operations
from bench.report import size as text_of_size

SWITCH = """
#include <valgrind/callgrind.h>
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
extern "C" void stop(const char* label) { CALLGRIND_DUMP_STATS_AT(label); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def chosen(stems: list[str], quick: bool) -> list[tuple[Any, str, tuple[int, ...]]]:
    """(operation, mode, size): the smallest size and, unless `quick`, that of the README."""
    found = []
    for operation in operations(stems).values():
        smallest = min(operation.sizes, key=math.prod)
        sizes = [smallest] if quick else dict.fromkeys((operation.headline, smallest))
        found += [(operation, mode, size) for size in sizes for mode in operation.modes]
    return found


def count(switch: str, quick: bool, stems: list[str]) -> None:
    """Inside valgrind: one call of each, labelled `index ours` and `index torch`."""
    library = ctypes.CDLL(switch)
    torch.set_num_threads(1)
    for i, (operation, mode, size) in enumerate(chosen(stems, quick)):
        tensors = operation.tensors(mode, size, torch.float32, "cpu")
        for who in ("ours", "torch"):
            call = operation.call(getattr(operation, who), mode, tensors)
            for _ in range(3):
                call()
            library.start()
            call()
            library.stop(f"{i} {who}".encode())


def build(folder: Path) -> Path:
    """The switch that turns counting on and off, from valgrind's own header."""
    compiler, switch = shutil.which("c++") or shutil.which("g++"), folder / "switch.so"
    if not (shutil.which("valgrind") and compiler):
        raise SystemExit("bench --instructions: needs valgrind and a C++ compiler")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-x", "c++", "-", "-o", switch],
        input=SWITCH,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(f"bench --instructions: valgrind/callgrind.h was not found\n{done.stderr[:400]}")
    return switch


def measure(stems: list[str], quick: bool = False) -> dict[str, int]:
    """{`index ours` or `index torch`: instructions}, by the index in `chosen`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        child = [sys.executable, "-m", "bench.instructions", str(build(folder)), str(int(quick)), *stems]
        done = subprocess.run([*command, *child], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench --instructions: {done.stderr[-2000:]}")
        found = {}
        for path in folder.glob("out.*"):
            text = path.read_text(errors="replace")
            label = re.search(r"Client Request: (\d+ \w+)", text)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if label and total:
                found[label[1]] = int(total[1])
        return found


def report(stems: list[str], quick: bool = False) -> None:
    """Print the counts of ours and torch's, and instructions for each element."""
    counts = measure(stems, quick)
    print("instructions of one call, fp32, one thread, under valgrind")
    print(f"{'operation':38} {'size':>14} {'ours':>13} {'an element':>10} {'torch':>13} {'torch/ours':>10}")
    for i, (operation, mode, size) in enumerate(chosen(stems, quick)):
        ours, theirs = counts[f"{i} ours"], counts[f"{i} torch"]
        print(
            f"{f'{operation.stem} {mode}':38} {text_of_size(size):>14} {ours:13,} {ours / math.prod(size):10.2f} "
            f"{theirs:13,} {theirs / ours:9.2f}x"
        )


if __name__ == "__main__":
    count(sys.argv[1], sys.argv[2] == "1", sys.argv[3:])
