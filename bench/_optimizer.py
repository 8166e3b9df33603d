"""Optimizer steps against torch's: sizes, groups, bytes, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from optim_accuracy import BETAS2, STEPS, decay_error, median_error, one_update
from torch import Tensor

import fusedtricks.optim
from bench import Call, Moved, Size
from bench.accuracy import Error
from fusedtricks.ops import _optimizer, _shard

# (parameters, elements of each), each for the regime it reaches. A quick run measures the first two.
BANDWIDTH: Size = (1, 24_000_000)
SIZES: tuple[Size, ...] = (
    (161, 1),  # cost of a step on the host
    BANDWIDTH,
    (1000, 1),
    (161, 150_000),  # a ResNet-50 of equal layers
)
ONE_GROUP, MANY_GROUPS = "step", "step, a group each"
Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def first(params: Sequence[Any]) -> Tensor:
    return params[0]["params"][0] if isinstance(params[0], dict) else params[0]


class Stepped:
    """Parameters with gradients, and the optimizer over them, as `ours` and `torch` make it."""

    def __init__(self, make: Make, tensors: Sequence[Tensor], mode: str = ONE_GROUP):
        half = len(tensors) // 2
        params = [torch.nn.Parameter(t.detach().clone()) for t in tensors[:half]]
        for p, g in zip(params, tensors[half:], strict=True):
            p.grad = g.detach().clone()
        # Groups that differ, as those of a schedule by layers do: equal ones share their scalars.
        groups = [{"params": [p], "lr": 1e-3 * (1 + i / half)} for i, p in enumerate(params)]
        self.optimizer = make(groups if mode == MANY_GROUPS else params)
        self.results = [p.detach() for p in params]

    def __call__(self) -> list[Tensor]:
        self.optimizer.step()
        return self.results


@dataclass(frozen=True)
class Optimizer:
    """An optimizer against torch's, with the interface of bench.Function.

    `fused`: devices where torch has a fused step, the one compared with; elsewhere it is the one of lists (`foreach`).
    The remaining ways of torch are timed beside it. `states` is the number of moments; a step must read the parameter,
    its gradient and each moment, and write all but the gradient. Our moments of bfloat16 parameters are float32, and
    torch's bfloat16.
    """

    name: str
    states: int
    fused: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[Size, ...] = SIZES
    headline: Size = BANDWIDTH
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    random: bool = False
    stem: str = ""

    modes = (ONE_GROUP, MANY_GROUPS)
    processes = 1

    @property
    def stands_in_for(self) -> str:
        return f"optim.{self.name}"

    def ours(self, params: Sequence[Any], **more: Any) -> torch.optim.Optimizer:
        moments = {"state_dtype": torch.float32} if first(params).dtype == torch.bfloat16 else {}
        return getattr(fusedtricks.optim, self.name)(params, **{"lr": 1e-3, **moments, **self.options, **more})

    def torch_by(self, params: Sequence[Any], **more: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.name)(params, **{"lr": 1e-3, **self.options, **more})

    def torch(self, params: Sequence[Any], **more: Any) -> torch.optim.Optimizer:
        way = "fused" if first(params).device.type in self.fused else "foreach"
        return self.torch_by(params, **{way: True}, **more)

    def further(self, mode: str) -> dict[str, Make]:
        """torch's other ways to step; where every parameter has a group, ours with one for all."""
        ways = {"foreach": partial(self.torch_by, foreach=True)} if self.fused else {}
        ways["for-loop"] = partial(self.torch_by, foreach=False)
        if mode == MANY_GROUPS:
            ways["one group"] = lambda groups: self.ours([p for group in groups for p in group["params"]])
        return ways

    @property
    def floors(self) -> tuple[str, ...]:
        return (f"{3 + 2 * self.states}ns a step, one launch",)

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        count, numel = size
        moment = 4 if dtype == torch.bfloat16 else dtype.itemsize
        return (3 * dtype.itemsize + 2 * self.states * moment) * count * numel

    def measures(self, mode: str, size: Size, dtype: torch.dtype) -> bool:
        """A group each and 16 bits matter in one regime only."""
        if mode == MANY_GROUPS:
            return size == SIZES[0] and dtype == torch.float32
        return dtype == torch.float32 or size == BANDWIDTH

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        count, numel = size
        return tuple(torch.randn(numel, dtype=dtype, device=device) for _ in range(2 * count))

    def call(self, fn: Make, mode: str, tensors: tuple[Tensor, ...]) -> Call:
        return Stepped(fn, tensors, mode)

    def compiled(self, mode: str, tensors: tuple[Tensor, ...]) -> Call | None:
        """torch's step, of lists, compiled as its documentation does; not for many tensors, which takes minutes."""
        if len(tensors) > 20:
            return None
        stepped = Stepped(partial(self.torch_by, foreach=True), tensors, mode)
        step = torch.compile(stepped.optimizer.step, fullgraph=False, dynamic=False)
        return lambda: (step(), stepped.results)[1]

    def errors(self, dtype: torch.dtype, device: str) -> list[Error]:
        """What a step is off by: see `update_errors` and `decay_errors`."""
        rows = update_errors(self, device) if dtype == torch.float32 else []
        return rows + (decay_errors(self, device) if dtype == torch.bfloat16 and "weight_decay" in self.options else [])


# ---- bytes -----------------------------------------------------------------------------------------------------------


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


# ---- errors ----------------------------------------------------------------------------------------------------------


def update_errors(operation: Optimizer, device: str) -> list[Error]:
    """Median relative error of the update against float64, from the same state."""
    rule, rows = getattr(fusedtricks.optim, operation.name).rule, []
    for t in STEPS:
        for beta2 in BETAS2 if "betas" in rule.columns else (None,):
            more = {} if beta2 is None else {"betas": (0.9, beta2)}
            makes = {"ours": partial(operation.ours, **more), "torch": partial(operation.torch, **more)}
            truth = one_update(partial(operation.torch_by, foreach=False, **more), rule, t, torch.double)
            found = {who: one_update(make, rule, t, torch.float32, device) for who, make in makes.items()}
            errors = {who: median_error(update, truth) for who, update in found.items()}
            label = f"step {t}" + ("" if beta2 is None else f", beta2 {beta2}")
            rows.append(Error(operation.stem, label, "float32", "update, median", errors))
    return rows


def decay_errors(operation: Optimizer, device: str) -> list[Error]:
    """bfloat16 weights that only decay: see tests/optim_accuracy.py."""
    decay, rows = {"lr": 1e-3, "weight_decay": 0.1}, []
    theirs = decay_error(partial(operation.torch, **decay), device)
    for kind in ({}, {"master_weights": "fp32"}, {"master_weights": "remainder"}, {"stochastic_rounding": True}):
        errors = {"ours": decay_error(partial(operation.ours, **decay, **kind), device), "torch": theirs}
        label = ", ".join(f"{k}={v}" for k, v in kind.items()) or "plain"
        rows.append(Error(operation.stem, label, "bfloat16", "1000 decays", errors))
    return rows
