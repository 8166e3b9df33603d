"""Bytes that Triton kernels really load and store, counted in Triton's interpreter, beside the bytes they must move.

Every unmasked lane of every load, store and atomic counts, whether a cache would serve it or not. bench/<stem>.py says
which calls are counted and what each must move.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.runtime import interpreter

from bench import ROOT, operations


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


def measure(stem: str) -> Iterator[dict[str, Any]]:
    """Every call that the operation declares, counted."""
    for moved in importlib.import_module(f"bench.{stem}").traffic():
        with count_traffic() as traffic:
            moved.call()
        yield {
            "op": stem,
            "direction": moved.direction,
            "shape": moved.shape,
            "dtype": str(moved.dtype).removeprefix("torch."),
            "bytes": traffic.bytes,
            "floor": moved.floor,
            "ratio": traffic.bytes / moved.floor,
            "budget": moved.budget,
        }


def counted(stems: list[str] | None = None) -> list[str]:
    """The operations that declare `traffic`: those with Triton kernels."""
    return [s for s in operations(stems or ()) if hasattr(importlib.import_module(f"bench.{s}"), "traffic")]


def interpreted(module: str, *args: str) -> str:
    """What `python -m module args` prints under TRITON_INTERPRET=1, which must be set before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def rows(stems: list[str]) -> list[dict[str, Any]]:
    """Every measurement of these operations, in this process if it interprets, else in one that does."""
    if not triton.knobs.runtime.interpret:
        return json.loads(interpreted("bench.traffic", "--json", *stems))
    return [row for stem in counted(stems) for row in measure(stem)]


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
