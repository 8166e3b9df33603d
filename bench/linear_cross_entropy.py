"""Linear layer and cross-entropy, loss and gradients: time and peak memory. `python -m bench.linear_cross_entropy`.

It has no operators of its own and no floor but that of its matrix products, so it is a program and not an OPERATION.
Peak memory is what a call adds to the process at most; each contestant has a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedtricks.functional
from bench import ROOT

SIZES = ((1024, 128, 32000),)  # rows, features, classes
ROUNDS = 3  # a call takes half a second on a CPU


def of_logits(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


CONTESTANTS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "fusedtricks": lambda: fusedtricks.functional.linear_cross_entropy,
    "torch": lambda: of_logits,
    "compile": lambda: torch.compile(of_logits, fullgraph=True, dynamic=False),
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
    CONTESTANTS["torch chunked"] = lambda: functools.partial(
        F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()
    )


def call(name: str, size: tuple[int, ...], device: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    rows, features, classes = size
    x, weight = (
        torch.randn(rows, features, device=device),
        torch.randn(classes, features, device=device) / features**0.5,
    )
    inputs, target = (x.requires_grad_(), weight.requires_grad_()), torch.randint(classes, (rows,), device=device)
    fn = CONTESTANTS[name]()
    return lambda: torch.autograd.grad(fn(*inputs, target), inputs)


def resident(field: str) -> int:
    """Bytes that Linux counts as resident now (VmRSS) or at most (VmHWM)."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak(name: str, size: tuple[int, ...], device: str) -> int:
    """Bytes that a call adds at most, the gradients it returns included."""
    run = call(name, size, device)
    run()
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    run()
    return resident("VmHWM") - before


def peak_of_its_own(name: str, size: tuple[int, ...], device: str) -> int:
    arguments = ["--device", device, "--peak", name, *map(str, size)]
    command = [sys.executable, "-m", "bench.linear_cross_entropy", *arguments]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def seconds(entries: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """The median of a few calls of each, one after the other."""
    samples: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(ROUNDS + 1):
        for name, run in entries.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in samples.items()}  # the first call compiles


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear_cross_entropy", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", nargs=4, metavar=("WHO", "ROWS", "FEATURES", "CLASSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak[0], tuple(map(int, args.peak[1:])), args.device)))
        return
    print(f"{'rows x features x classes':26} {'':14} {'time':>10} {'peak memory':>12}")
    for size in SIZES:
        entries = {name: call(name, size, args.device) for name in CONTESTANTS}
        for name, taken in seconds(entries, args.device).items():
            mebibytes = peak_of_its_own(name, size, args.device) / 2**20
            shape = "x".join(map(str, size))
            print(f"{shape:26} {name:14} {taken * 1e3:7.1f} ms {mebibytes:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
