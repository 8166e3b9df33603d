"""Optimizer steps against torch's: sizes, models, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedtricks
from bench import Call, Moved, Size
from fusedtricks.ops import _optimizer, _shard

# (parameters, elements of each), each for the regime it reaches.
SIZES: tuple[Size, ...] = (
    (161, 1),  # cost of a step on the host
    (1000, 1),
    (1, 24_000_000),  # bandwidth
    (161, 150_000),  # a ResNet-50 of equal layers
)


class Stepped:
    """Parameters with gradients, and the optimizer over them, as `ours` and `torch` make it."""

    def __init__(self, make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], tensors: Sequence[Tensor]):
        half = len(tensors) // 2
        self.params = [torch.nn.Parameter(t.detach().clone()) for t in tensors[:half]]
        for p, g in zip(self.params, tensors[half:], strict=True):
            p.grad = g.detach().clone()
        self.optimizer = make(self.params)

    def __call__(self) -> list[Tensor]:
        self.optimizer.step()
        return [p.detach() for p in self.params[:1]]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer against torch's fastest eager one, with the interface of bench.Function: one mode, one step.

    `states` is the number of moments; a step must read the parameter, its gradient and each moment, and write all but
    the gradient.
    """

    stands_in_for: str
    ours: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    torch: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    states: int
    sizes: tuple[Size, ...] = SIZES
    headline: Size = (1, 24_000_000)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    stem: str = ""

    modes = ("step",)

    @property
    def floors(self) -> tuple[str, ...]:
        return (f"{3 + 2 * self.states}ns a step, one launch",)

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        count, numel = size
        return (3 + 2 * self.states) * count * numel * dtype.itemsize

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        count, numel = size
        return tuple(torch.randn(numel, dtype=dtype, device=device) for _ in range(2 * count))

    def call(self, fn: Callable[..., Any], mode: str, tensors: tuple[Tensor, ...]) -> Call:
        return Stepped(fn, tensors)


def traffic(operation: Optimizer) -> Iterator[Moved]:
    """Bytes of one step of 300 000 elements in three tensors, sizes that fill no tile."""
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.nn.Parameter(torch.randn(100_000).to(dtype)) for _ in range(3)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = operation.ours(params)

        def call(optimizer: torch.optim.Optimizer = optimizer) -> Sequence[Tensor]:
            before, _optimizer.Shard = _optimizer.Shard, lambda *args: _shard.Shard(*args, tiled=True)
            try:
                with fusedtricks.backend("triton"):
                    optimizer.step()
            finally:
                _optimizer.Shard = before
            return []

        yield Moved("step", (300_000,), dtype, call, operation.bytes("step", (3, 100_000), dtype), 28.5 / 28)
