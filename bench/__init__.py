"""Benchmarks: `python -m bench`. Each bench/<stem>.py declares one operation as OPERATION; the rest discovers it."""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # cases and parity: what is correct is declared once, there

Size = tuple[int, ...]
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Function:
    """A differentiable function against its torch counterpart.

    `inputs` gives the tensors of a call; those that require gradients are differentiated. `forward_bytes` and
    `backward_bytes` give, for n elements of s bytes, the least a kernel can move: the floors of the README, in words in
    `floors`. `headline` is the size whose figure stands in the README. A peer is a function that imports another
    library and returns its counterpart, called as `ours` is.
    """

    stands_in_for: str
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    inputs: Callable[[Size, torch.dtype, str], tuple[Tensor, ...]]
    floors: tuple[str, str]
    forward_bytes: Callable[[int, int], int]
    backward_bytes: Callable[[int, int], int]
    sizes: tuple[Size, ...]
    headline: Size
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peers: dict[str, Callable[[], Callable[..., Tensor]]] = field(default_factory=dict)
    random: bool = False  # ours and torch's draw differently, so there is no truth to compare with before timing
    stem: str = ""

    modes = ("forward", "forward+backward")
    processes = 1  # where there are more, `measure` takes the place of bench.run.measure

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        n = math.prod(size)
        moved = self.forward_bytes(n, dtype.itemsize)
        return moved if mode == "forward" else moved + self.backward_bytes(n, dtype.itemsize)

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        """What `call` takes: the inputs and, where gradients are wanted, the gradient of the result; 1 of a loss."""
        torch.manual_seed(0)
        inputs = self.inputs(size, dtype, device)
        if mode == "forward":
            return tuple(t.detach() for t in inputs)
        with torch.no_grad():
            y = self.torch(*inputs)
            return *inputs, torch.randn_like(y) if y.dim() else torch.ones_like(y)

    def call(self, fn: Callable[..., Tensor], mode: str, tensors: tuple[Tensor, ...]) -> Call:
        """One call of `fn`, the thing that is timed."""
        if mode == "forward":
            return lambda: (fn(*tensors),)
        *inputs, dy = tensors
        wanted = [t for t in inputs if t.requires_grad]
        return lambda: torch.autograd.grad(fn(*inputs), wanted, dy)

    def compiled(self, mode: str, tensors: tuple[Tensor, ...]) -> Call | None:
        """The same of torch.compile, or None where that is not wanted."""
        return self.call(torch.compile(self.torch, fullgraph=True, dynamic=False), mode, tensors)

    def further(self, mode: str) -> dict[str, Callable[..., Tensor]]:
        """Who else is timed."""
        return {}

    def measures(self, mode: str, size: Size, dtype: torch.dtype) -> bool:
        """Is this one of the rows?"""
        return True


@dataclass(frozen=True)
class Moved:
    """One call of Triton kernels whose bytes are counted: `floor` is what it must move, `budget` the most it may.

    `budget` is a multiple of the floor. bench/<stem>.py yields them from `traffic()`.
    """

    direction: str
    shape: Size
    dtype: torch.dtype
    call: Call
    floor: int
    budget: float


def operations(stems: Sequence[str] = (), *, processes: bool = False) -> dict[str, Any]:
    """The declared operations, all or those named, in alphabetical order; with `processes` those over several too."""
    found, left_out = {}, {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_") and (ROOT / "fusedtricks" / "ops" / f"{module.name}.py").exists():
            declared = getattr(importlib.import_module(f"bench.{module.name}"), "OPERATION", None)
            # Else a program of its own.
            if declared is not None:
                object.__setattr__(declared, "stem", module.name)
                (found if processes or declared.processes == 1 else left_out)[module.name] = declared
    if several := set(stems) & set(left_out):
        raise SystemExit(f"bench: {', '.join(sorted(several))} runs in several processes, only to be timed, on a CPU")
    unknown = set(stems) - set(found)
    if unknown:
        raise SystemExit(f"bench: no operation {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return {stem: found[stem] for stem in stems or found}
