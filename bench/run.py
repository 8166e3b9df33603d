"""Measure operations: parity first, then everybody's time at every size."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import parity
import torch

import fusedtricks
from bench import Call
from bench.timing import Contestant, Timing, copy, interleaved
from fusedtricks._op import Op

QUICK_SIZES = 2
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One size of one operation in one direction. `times` has our back ends under their names, "torch", "compile",
    peers, and "copy" for a copy of `bytes`; `ours` names the back end that serves by default."""

    operation: str
    mode: str
    size: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    ours: str
    times: dict[str, Timing]

    def speedup(self, other: str) -> float | None:
        return self.times[other].median / self.times[self.ours].median if other in self.times else None

    def of_copy(self, name: str) -> float:
        return self.times["copy"].median / self.times[name].median

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        times = {name: Timing(**t) for name, t in row["times"].items()}
        return cls(**{**row, "size": tuple(row["size"]), "times": times})


def our_backends(stem: str, device: str) -> list[str]:
    """Our implementations worth timing on `device`, the default first."""
    ops = [op for op in Op.registry.values() if op.stem == stem]
    if device == "cpu":
        return [(ops[0].cpu or "reference").split(":")[0]]
    names = [ops[0].cuda or "reference"]
    return names + [b for b in ("cuda", "triton") if b not in names and all(b in op.available() for op in ops)]


def check(operation: Any, mode: str, size: tuple[int, ...], dtype: torch.dtype, device: str, backend: str) -> None:
    """Raise AssertionError unless our results are no further from float64 than torch's are."""
    if operation.random:
        return
    tensors = operation.tensors(mode, size, dtype, device)
    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors)
    truth = operation.call(operation.torch, mode, exact)()
    theirs = operation.call(operation.torch, mode, tensors)()
    with fusedtricks.backend(backend):
        ours = operation.call(operation.ours, mode, tensors)()
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        name = f"{operation.stem} {mode} {size} {dtype} {backend}, result {i}"
        parity.assert_no_worse(a, b, t.cpu(), name=name)


@functools.cache
def can_compile(device: str) -> str | None:
    """None where torch.compile works, else why not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def contestants(operation: Any, mode: str, tensors: Tensors, device: str) -> Iterator[tuple[str, Contestant]]:
    default, *others = our_backends(operation.stem, device)
    yield default, Contestant(operation.call(operation.ours, mode, tensors))
    for backend in others:
        forced = functools.partial(fusedtricks.backend, backend)
        yield backend, Contestant(operation.call(operation.ours, mode, tensors), forced)
    yield "torch", Contestant(operation.call(operation.torch, mode, tensors))
    if can_compile(device) is None:
        torch._dynamo.reset()
        yield from able(operation, mode, "compile", lambda: operation.compiled(mode, tensors))
    for name, fn in operation.further(mode).items():
        yield name, Contestant(operation.call(fn, mode, tensors))
    if device != "cpu":
        for name, load in operation.peers.items():
            if importlib.util.find_spec(name) is not None:
                yield from able(operation, mode, name, lambda load=load: operation.call(load(), mode, tensors))


def able(operation: Any, mode: str, name: str, make: Callable[[], Call | None]) -> Iterator[tuple[str, Contestant]]:
    """The contestant, if it can run: bounds of others are not ours, so it is named, and left out of this row."""
    try:
        call = make()
        if call is None:
            return
        call()
    except Exception as error:
        print(f"{operation.stem} {mode}: {name} cannot run this: {error!r}", file=sys.stderr)
        return
    yield name, Contestant(call)


def plan(operation: Any, quick: bool) -> list[tuple[torch.dtype, tuple[int, ...], str]]:
    sizes = operation.sizes[:QUICK_SIZES] if quick else operation.sizes
    rows = [(dtype, size, mode) for dtype in operation.dtypes for mode in operation.modes for size in sizes]
    return [(dtype, size, mode) for dtype, size, mode in rows if operation.measures(mode, size, dtype)]


def measure(operation: Any, mode: str, size: tuple[int, ...], dtype: torch.dtype, device: str, budget: float) -> Row:
    if operation.processes > 1:
        return operation.measure(mode, size, dtype, device, budget)
    for backend in our_backends(operation.stem, device):
        check(operation, mode, size, dtype, device, backend)
    tensors, nbytes = operation.tensors(mode, size, dtype, device), operation.bytes(mode, size, dtype)
    entries = dict(contestants(operation, mode, tensors, device)) | {"copy": copy(nbytes, device)}
    times = interleaved(entries, device, budget=budget)
    ours = our_backends(operation.stem, device)[0]
    name = str(dtype).removeprefix("torch.")
    return Row(operation.stem, mode, size, name, device, nbytes, ours, times)
