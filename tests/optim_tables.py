"""Tables of parameters for the optimizers' kernels: every kind, feature and alignment, guards around each buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedtricks import optim  # noqa: F401  (defines the operators)
from fusedtricks.ops import _table
from fusedtricks.ops._table import Row, Rule
from fusedtricks.ops.adagrad import ADAGRAD_RULE
from fusedtricks.ops.adamw import ADAMW_RULE
from fusedtricks.ops.nadam import NADAM_RULE
from fusedtricks.ops.rmsprop import RMSPROP_RULE
from fusedtricks.ops.sgd import SGD_RULE

RULES: dict[str, Rule] = {r.stem: r for r in (ADAMW_RULE, NADAM_RULE, SGD_RULE, RMSPROP_RULE, ADAGRAD_RULE)}
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GUARD, CANARY = 64, 7  # elements
COMMON = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-8, "maximize": False, "decoupled_weight_decay": False}
# For each optimizer a group with every state and feature in use and one with few.
GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        {"betas": (0.9, 0.999), "amsgrad": True},
        {"betas": (0.3, 0.99), "amsgrad": False, "decoupled_weight_decay": True, "maximize": True},
    ),
    "nadam": (
        {"betas": (0.9, 0.999), "momentum_decay": 0.004, "decoupled_weight_decay": True},
        {"betas": (0.8, 0.9), "momentum_decay": 0.1, "maximize": True},
    ),
    "sgd": (
        {"momentum": 0.9, "dampening": 0.5, "nesterov": False},
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "decoupled_weight_decay": True, "maximize": True},
    ),
    "rmsprop": (
        {"alpha": 0.99, "momentum": 0.9, "centered": True},
        {"alpha": 0.9, "momentum": 0.0, "centered": False, "maximize": True, "weight_decay": 0.0},
    ),
    "adagrad": ({"lr_decay": 0.1}, {"lr_decay": 0.0, "maximize": True}),
}


@dataclass(frozen=True)
class Entry:
    """One parameter. `offset`: elements that every tensor is shifted by from 16 bytes, `skew` the gradient more."""

    n: int
    dtype: torch.dtype = FP32
    moments: torch.dtype | None = None
    group: int = 0
    offset: int = 0
    skew: int = 0
    master: str | None = None
    ema: bool = False
    stochastic: bool = False
    taken: int = 0
    step: torch.dtype | None = FP32


def every_kind(n: int) -> list[Entry]:
    """All kinds and what goes with them, of tensors of about n elements."""
    return [
        *(Entry(m, group=g, offset=g, ema=bool(g)) for g, m in enumerate((n, n + 3))),
        Entry(0),
        Entry(1, taken=3, step=FP64),
        Entry(n, FP64, offset=1, taken=10, ema=True),
        Entry(n, BF16, group=1),
        Entry(n + 1, BF16, stochastic=True, offset=3),
        Entry(n + 5, BF16, stochastic=True, taken=7, skew=1),
        Entry(n, BF16, FP32, master="fp32", ema=True),
        Entry(n + 2, BF16, FP32, master="remainder", group=1, offset=5),
        Entry(n, FP16, skew=3),
        Entry(n, FP16, FP32, master="fp32", group=1),
    ]


ALIGNMENTS = [
    Entry(n, dtype, offset=offset, skew=skew, group=i % 2)
    for i, (dtype, (offset, skew), n) in enumerate(
        itertools.product((FP32, BF16), ((0, 0), (1, 0), (3, 0), (0, 1)), (1, 7, 33))
    )
]


class Problem:
    """Tensors and table of one step; two of the same arguments hold the same numbers."""

    def __init__(
        self,
        stem: str,
        entries: Sequence[Entry],
        groups: Sequence[Mapping[str, Any]] | None = None,
        *,
        size: float = 1.0,
        ema_decay: float = 0.9,
        device: str = "cpu",
        restart: bool = True,
    ):
        self.rule, self.device = RULES[stem], device
        self.groups = [{**COMMON, **g} for g in (groups or GROUPS[stem])]
        self.generator = torch.Generator().manual_seed(1)
        self.rooms: list[tuple[Tensor, int, int]] = []
        kinds = lambda e: _table.KINDS[e.dtype, e.moments or e.dtype]  # noqa: E731
        self.entries = sorted(entries, key=lambda e: (kinds(e), e.group))
        self.rows = [self._row(i, e, size) for i, e in enumerate(self.entries)]
        cells, segments, start = [], [], 0
        for i, (e, row) in enumerate(zip(self.entries, self.rows, strict=True)):
            if not segments or segments[-1][0] != kinds(e):
                segments.append([kinds(e), i, 0, 0])
                start = 0 if restart else start
            segments[-1][2] += 1
            segments[-1][3] += e.n
            cells.append(self._cells(row, kinds(e), e.group, start))
            start += e.n
        self.table = torch.tensor(cells, dtype=torch.int64, device=device).reshape(-1, _table.COLUMNS)
        self.segments = torch.tensor(segments, dtype=torch.int64).reshape(-1, 4)
        self.progress = torch.tensor([e.taken for e in self.entries], dtype=torch.int64, device=device)
        hyper = torch.zeros(len(self.groups), _table.HYPERS, dtype=FP64)
        for g, group in enumerate(self.groups):
            for key, columns in self.rule.columns.items():
                for index, column in columns:
                    hyper[g, column] = float(group[key] if index < 0 else group[key][index])
            hyper[g, _table.EMA_DECAY], hyper[g, _table.SEED] = ema_decay, 2**40 + 11 * g
        self.hyper = hyper.to(device)
        self.outcome = torch.full((2,), 5.0, device=device)

    def _row(self, number: int, e: Entry, size: float) -> Row:
        half = e.dtype in (BF16, FP16)
        wide = FP64 if e.dtype == FP64 else FP32
        random = lambda: torch.randn(e.n, generator=self.generator, dtype=FP64)  # noqa: E731
        weight = random()
        param = self._guarded(weight, e.dtype, e.offset)
        grad = self._guarded(random() * size, e.dtype, e.offset + e.skew)
        uses = self.rule.uses(self.groups[e.group])
        moments = [self._guarded(random().abs() * size, e.moments or e.dtype, e.offset) if u else None for u in uses]
        master = None
        if e.master == "fp32":
            param.copy_(_table.visible(weight.float(), e.dtype))
            master = self._guarded(weight, FP32, e.offset)
        elif e.master == "remainder":
            shown, rest = _table.split(weight.float())
            param.copy_(shown)
            master = self._guarded(rest, torch.int16, e.offset)
        ema = self._guarded(weight, wide, e.offset) if e.ema else None
        scalar = lambda v: self._guarded(torch.tensor([v], dtype=FP64), e.step or FP32, 0)[0]  # noqa: E731
        flags = (_table.STEP_FLOAT64 if e.step == FP64 else 0) | (_table.STOCHASTIC if e.stochastic else 0)
        flags |= _table.REMAINDER if e.master == "remainder" else 0
        flags |= _table.FIRST_MOMENTUM if self.rule.stem == "sgd" and number % 2 == 0 else 0
        step = scalar(e.taken) if self.rule.counts and e.step else None
        factor = scalar(0.9**e.taken) if self.rule.factor else None
        assert half or e.master is None
        return Row(param, grad, moments, master, ema, step, factor, flags, stream=number, taken=e.taken)

    def _guarded(self, value: Tensor, dtype: torch.dtype, offset: int) -> Tensor:
        n = value.numel()
        room = torch.full((n + 2 * GUARD + offset,), CANARY, dtype=dtype)
        first = GUARD + offset
        room[first : first + n].copy_(value)
        room = room.to(self.device)
        self.rooms.append((room, first, n))
        return room[first : first + n]

    def _cells(self, row: Row, kind: int, group: int, start: int) -> list[int]:
        address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
        states = [*map(address, row.states), 0, 0, 0][:3]
        cells = [row.param.numel(), kind, group, row.flags, address(row.param), address(row.grad), *states]
        cells += [*map(address, (row.master, row.ema, row.step, row.factor)), row.stream, start]
        return cells + [0] * (_table.COLUMNS - len(cells))

    def run(
        self,
        op: Callable[..., None],
        grad_scale: float | None = None,
        found_inf: float | None = None,
        norm: float | None = None,
        max_norm: float | None = None,
        steps: int = 1,
    ) -> Problem:
        """`op`, so many times, on new gradients from the second time on."""
        number = lambda v: None if v is None else torch.full((1,), v, device=self.device)  # noqa: E731
        given = (number(grad_scale), number(found_inf), number(norm), max_norm)
        for i in range(steps):
            for row in self.rows if i else ():
                row.grad.copy_(torch.randn(row.grad.shape, generator=self.generator))
            op(self.table, self.segments, self.progress, self.hyper, self.outcome, *given)
        return self

    def reference(self, *args: Any) -> None:
        _table.step_table(self.rule, *args)

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"progress": self.progress, "outcome": self.outcome}
        for i, row in enumerate(self.rows):
            found = {"param": row.param, "grad": row.grad, "master": row.master, "ema": row.ema, "step": row.step}
            if self.entries[i].master == "remainder":
                found["master"] = _table.join(row.param.cpu(), row.master.cpu())
            found |= {"factor": row.factor, **{f"state {k}": s for k, s in enumerate(row.states)}}
            named |= {f"{name} {i} of {self.entries[i]}": t for name, t in found.items() if t is not None}
        return named

    def check_guards(self) -> None:
        for room, first, n in self.rooms:
            assert bool((room[:first] == CANARY).all()), "written before the start of a tensor"
            assert bool((room[first + n :] == CANARY).all()), "written behind the end of a tensor"


def assert_same(ours: Problem, theirs: Problem, ulps: int | None = None) -> None:
    """Equal to the bit, NaN being NaN, or to so many units in the last place of the largest number of a tensor.

    By default to the bit for SGD, and to 2 where there are square roots, which torch leaves to MKL: not always rounded
    correctly.
    """
    ulps = (0 if ours.rule.stem == "sgd" else 2) if ulps is None else ulps
    ours.check_guards()
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        a, b = a.detach().cpu(), b.detach().cpu()
        if not a.is_floating_point():
            assert torch.equal(a, b), name
            continue
        different = ~((a == b) | (a.isnan() & b.isnan()))
        if ulps and b.numel():
            scale = b.double().nan_to_num(0, 0, 0).abs().max().item()
            different &= ~((a.double() - b.double()).abs() <= ulps * torch.finfo(b.dtype).eps * scale)
        assert not different.any(), f"{name}: {int(different.sum())} differ: {a[different][:4]}, {b[different][:4]}"
