"""Bytes that Triton kernels really load and store, counted in Triton's interpreter, beside the bytes they must move.

Every unmasked lane of every load, store and atomic counts, whether a cache would serve it or not. The interpreter
plans for a device of four multiprocessors, so 512 rows stand for the share of each that 16384 rows have on a large GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import interpreter

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op

ROOT = Path(__file__).resolve().parent.parent
STEMS = ("layer_norm", "rms_norm")
ROWS = 512
COLUMNS = (1024, 4096, 8192)
BUDGET = {"forward": 1.05, "backward": 1.10}


@dataclass
class Traffic:
    loaded: int = 0
    stored: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes of every kernel that is interpreted inside the block. An atomic loads and stores."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("count_traffic: set TRITON_INTERPRET=1 before Python starts, or use bench.traffic.report")
    traffic, builder = Traffic(), interpreter.interpreter_builder

    def counting(name: str, loads: bool, stores: bool, mask_at: int | None) -> Any:
        method = getattr(builder, name)

        def wrapped(pointers: Any, *args: Any) -> Any:
            lanes = pointers.data.size if mask_at is None else int(args[mask_at].data.sum())
            moved = lanes * pointers.get_element_ty().primitive_bitwidth // 8
            traffic.loaded += moved * loads
            traffic.stored += moved * stores
            return method(pointers, *args)

        return mock.patch.object(builder, name, wrapped)

    # Unmasked loads and stores call the masked ones.
    read_modify_write = builder.create_atomic_rmw

    def atomic(op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        moved = int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        traffic.loaded += moved
        traffic.stored += moved
        return read_modify_write(op, pointers, value, mask, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(counting("create_masked_load", True, False, 0))
        stack.enter_context(counting("create_masked_store", False, True, 1))
        stack.enter_context(counting("create_atomic_cas", True, True, None))
        stack.enter_context(mock.patch.object(builder, "create_atomic_rmw", atomic))
        yield traffic


def measure(stem: str, R: int, C: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of one shape: parameters of the dtype of x, all gradients wanted."""
    x, dy = (torch.randn(R, C).to(dtype) for _ in range(2))
    parameters = [torch.randn(C).to(dtype) for _ in range(2 if stem == "layer_norm" else 1)]
    fwd, bwd = (Op.registry[f"{stem}_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    rows = []
    with count_traffic() as forward:
        _, stats = fwd(x, *parameters, 1e-5, 1)
    with count_traffic() as backward:
        bwd(dy, x, parameters[0], stats, 1, True, *(True for _ in parameters))
    for direction, tensors, traffic in (("forward", 2, forward), ("backward", 3, backward)):
        floor = tensors * x.numel() * x.element_size()
        row = {"op": stem, "direction": direction, "shape": (R, C), "dtype": str(dtype).removeprefix("torch.")}
        row |= {"bytes": traffic.bytes, "floor": floor, "ratio": traffic.bytes / floor, "budget": BUDGET[direction]}
        rows.append(row)
    return rows


def interpreted(module: str, *args: str) -> str:
    """What `python -m module args` prints under TRITON_INTERPRET=1, which must be set before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def rows(stems: list[str]) -> list[dict[str, Any]]:
    """Every measurement of these operations, in this process if it interprets, else in one that does."""
    if not triton.knobs.runtime.interpret:
        return json.loads(interpreted("bench.traffic", "--json", *stems))
    dtypes = (torch.float32, torch.bfloat16)
    return [row for s in stems or STEMS for C in COLUMNS for d in dtypes for row in measure(s, ROWS, C, d)]


def report(stems: list[str]) -> list[dict[str, Any]]:
    """Print bytes moved, bytes that must move, their ratio and the budget; returns them too. No stems: all."""
    found = rows(stems)
    print(f"{'operation':22} {'shape':>12} {'dtype':9} {'bytes':>12} {'floor':>12} {'ratio':>6} {'budget':>6}")
    for r in found:
        over = "  over budget" if r["ratio"] > r["budget"] else ""
        print(
            f"{r['op'] + ' ' + r['direction']:22} {'x'.join(map(str, r['shape'])):>12} {r['dtype']:9} "
            f"{r['bytes']:12} {r['floor']:12} {r['ratio']:6.3f} {r['budget']:6.2f}{over}"
        )
    return found


if __name__ == "__main__":
    stems = [a for a in sys.argv[1:] if a != "--json"]
    print(json.dumps(rows(stems))) if "--json" in sys.argv else report(stems)
