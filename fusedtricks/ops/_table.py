"""What an optimizer step hands to its kernels: the table of parameters, the rule, and the reference over both.

Every optimizer is one operator, `x_(table, segments, progress, hyper, outcome, grad_scale, found_inf, norm, max_norm)`:

    table      (N, COLUMNS) int64 on the parameters' device, a row for each parameter that has a gradient. Kernels reach
               tensors through addresses, so the cost of a step does not grow with the number of Python objects.
    segments   (S, 4) int64 on the CPU: kind, first row, rows and elements of each run of rows of one kind. For kernels
               of a GPU the elements of each row are rounded up to whole tiles, here and in START.
    progress   (N + 1,) int64: steps taken since the row was made, or as many as its `step` says; a counter, left at 0.
    hyper      (groups, HYPERS) float64: lr, weight decay, ...; one launch serves all groups.
    outcome    (2,) float32, written: norm of the gradients; 1 if the step was skipped.
    grad_scale, found_inf   one element each, as torch.amp.GradScaler sets them: gradients are divided by the first and
               written back; nothing is done where the second is not zero.
    norm       one element: norm of the unscaled gradients, where it has been computed elsewhere. max_norm: clip to it.

All tensors that a row points to have the shape and strides of the parameter, which is dense. csrc/math/optimizer.h has
the same columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _philox

NUMEL, KIND, GROUP, FLAGS, PARAM, GRAD, STATE = range(7)
MASTER, EMA, STEP, FACTOR, STREAM, START = range(STATE + 3, STATE + 9)
COLUMNS = 16

LR, WEIGHT_DECAY, EPS, MAXIMIZE, DECOUPLED, RULE = range(6)
EMA_DECAY, SEED = RULE + 3, RULE + 4
HYPERS = 12

FIRST_MOMENTUM, STEP_FLOAT64, REMAINDER, STOCHASTIC = 1, 2, 4, 8

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# kind: dtypes of the parameter (and its gradient) and of the moments.
KINDS = {
    (p, s): DTYPES.index(p) + 4 * DTYPES.index(s)
    for p, s in [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
}
SCHEMA = (
    "(Tensor table, Tensor segments, Tensor(a!) progress, Tensor hyper, Tensor(b!) outcome, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? norm, float? max_norm) -> ()"
)

Group = Mapping[str, Any]
# The keys of a group that most rules have, and their columns: see Rule.columns.
COMMON = {
    "lr": ((-1, LR),),
    "weight_decay": ((-1, WEIGHT_DECAY),),
    "eps": ((-1, EPS),),
    "maximize": ((-1, MAXIMIZE),),
    "decoupled_weight_decay": ((-1, DECOUPLED),),
}


@dataclass
class Row:
    """One parameter with what its step reads and writes; tensors of the parameter's shape, of any strides."""

    param: Tensor
    grad: Tensor
    states: list[Tensor | None]
    master: Tensor | None = None
    ema: Tensor | None = None
    step: Tensor | None = None
    factor: Tensor | None = None
    flags: int = 0
    stream: int = 0
    taken: int = 0  # steps since the row was made, or as many as `step` says


@dataclass(frozen=True)
class Rule:
    """How one optimizer updates.

    `states` names up to three moments, in the order of the table; `uses(group)` says which a group needs. `columns`
    maps keys of a group to hyper-parameters: {key: [(index into its value or -1, column)]}. A change of a key in
    `shape` asks for other states. `prepare(h, t, first, factor)` gives the scalars of step t and the factor after it,
    in double; `update(p, g, states, scalars)` what to take from p, replacing the entries of `states`.
    """

    stem: str
    states: tuple[str, ...]
    uses: Callable[[Group], tuple[bool, ...]]
    columns: Mapping[str, Sequence[tuple[int, int]]]
    shape: frozenset[str]
    prepare: Callable[[Sequence[float], float, bool, float], tuple[Any, float]]
    update: Callable[[Tensor, Tensor, list[Tensor | None], Any], Tensor]
    counts: bool = True  # has a `step`
    factor: str | None = None  # name of the running product, a 0-dim state that starts at 1
    op: Op = field(init=False)

    def __post_init__(self) -> None:
        op = Op(f"{self.stem}_{SCHEMA}", stem=self.stem, cuda="cuda")
        op.reference(lambda *args: step_table(self, *args))
        object.__setattr__(self, "op", op)


# ---- formulas that rules share ---------------------------------------------------------------------------------------


def lerp(start: Tensor, end: Tensor, weight: float, rest: float) -> Tensor:
    """start + weight (end - start), from whichever end is nearer; `rest` is 1 - weight.

    An fp32 decay rate of 0.999 is off by 1e-8, which its sum over a thousand steps makes 1e-5; an fp32 weight is not.
    """
    return start + weight * (end - start) if weight < 0.5 else end + rest * (start - end)


def lerp_squares(start: Tensor, g: Tensor, weight: float, rest: float) -> Tensor:
    """The same from an average of squares to g^2. Where that overflows, its share may not; infinity stays infinity."""
    average = lerp(start, g * g, weight, rest)
    return torch.where(average < torch.inf, average, rest * start + weight * g * g)


def with_decay(u: Tensor, p: Tensor, decay: float) -> Tensor:
    """`u` and what decoupled weight decay takes from p: nothing from infinite weights, which stay."""
    return torch.where(p.isfinite(), u + decay * p, u)


def decays(h: Sequence[float]) -> tuple[float, float]:
    """Factors of the parameter in the gradient (coupled) and beside the update (decoupled)."""
    return (0.0, h[LR] * h[WEIGHT_DECAY]) if h[DECOUPLED] else (h[WEIGHT_DECAY], 0.0)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- weights of more bits than the parameter -------------------------------------------------------------------------


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bfloat16, rounded with ties away from zero, and the 16 bits that it lacks, as int16."""
    bits = torch.where(weight.isnan(), torch.nan, weight).contiguous().view(torch.int32)
    upper = (bits.to(torch.int64) + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, bits.to(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """What `split` took apart: the sign of the remainder tells which way the parameter was rounded."""
    lower = remainder.contiguous().to(torch.int64) & 0xFFFF
    upper = (param.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF) - (lower >> 15)
    return ((upper << 16 | lower) & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


def round_stochastically(weight: Tensor, seed: int, stream: int) -> Tensor:
    """fp32 to bfloat16, up with the probability of what is cut off."""
    dense = weight.contiguous() if not _in_memory_order(weight) else weight
    flat = torch.as_strided(dense, (dense.numel(),), (1,))
    random = _philox.random16(torch.tensor(seed, device=weight.device), flat.numel(), 0, stream)
    bits = flat.view(torch.int32).to(torch.int64)
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = (torch.where(finite, bits + random, bits) >> 16).to(torch.int16).view(torch.bfloat16)
    rounded = torch.where(flat.isnan(), torch.nan, upper)
    return torch.as_strided(rounded, dense.shape, dense.stride())


def _in_memory_order(t: Tensor) -> bool:
    return t.stride() == torch.empty_like(t, device="meta").stride()


def visible(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Master weights as the parameter shows them."""
    return split(weight)[0] if dtype == torch.bfloat16 else weight.to(dtype)


# ---- the reference ---------------------------------------------------------------------------------------------------


def update_row(rule: Rule, row: Row, h: Sequence[float], unscale: float, factor: float, write: bool) -> None:
    """One step of one parameter. `factor` multiplies the gradient; with `write` the gradient keeps `unscale` of it."""
    tensors = (row.param, row.grad, *row.states)
    if any(t is not None and (t.is_conj() or t.is_neg()) for t in (*tensors, row.master, row.ema)):
        param, grad, master, ema, *states = map(_resolved, (row.param, row.grad, row.master, row.ema, *row.states))
        plain = replace(row, param=param, grad=grad, states=states, master=master, ema=ema)
        update_row(rule, plain, h, unscale, factor, write)
        row.taken = plain.taken
        written = [(row.param, param), (row.master, master), (row.ema, ema), *zip(row.states, states, strict=True)]
        for t, new in [*written, *([(row.grad, grad)] if write else [])]:
            if t is not new:
                t.copy_(new)
        return
    param, grad, *states = (torch.view_as_real(t) if t is not None and t.is_complex() else t for t in tensors)
    dtype = accumulate_dtype(param.dtype)
    first = bool(row.flags & FIRST_MOMENTUM) and row.taken == 0
    # The count, which is exact where float32 is not, unless somebody changed what it was written to.
    if row.step is not None and torch.tensor(row.taken, dtype=row.step.dtype, device="cpu").item() != row.step.item():
        row.taken = int(row.step.item())
    row.taken = t = row.taken + 1
    before = 1.0 if row.factor is None else row.factor.item()
    scalars, after = rule.prepare(h, t, first, before)
    if row.step is not None:
        row.step.fill_(t)
    if row.factor is not None:
        row.factor.fill_(after)
    if param.numel() == 0:
        return
    scaled = grad.to(dtype)
    g = scaled * factor
    if write:
        grad.copy_(scaled * unscale)
    if h[MAXIMIZE]:
        g = -g
    remainder = bool(row.flags & REMAINDER)
    p = param.to(dtype)
    if row.master is not None:
        p = join(param, row.master) if remainder else row.master
    moments = [None if s is None else s.to(dtype) for s in states]
    p = p - rule.update(p, g, moments, scalars)
    if row.master is None and row.flags & STOCHASTIC:
        param.copy_(round_stochastically(p, int(h[SEED]) + t, row.stream))
    elif row.master is None:
        param.copy_(p)
    else:
        param.copy_(visible(p, param.dtype))
        row.master.copy_(split(p)[1] if remainder else p)
    if row.ema is not None:
        ema = torch.view_as_real(row.ema) if row.ema.is_complex() else row.ema
        ema.copy_(lerp(ema, p, 1 - h[EMA_DECAY], h[EMA_DECAY]))
    for state, moment in zip(states, moments, strict=True):
        if state is not None:
            state.copy_(moment)


def _resolved(t: Tensor | None) -> Tensor | None:
    """Whose memory holds its values, and not their conjugates or negatives: itself where it does."""
    return None if t is None else t.resolve_conj().resolve_neg()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """As torch.nn.utils.clip_grad_norm_."""
    if max_norm is None:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return coefficient if coefficient < 1 or coefficient != coefficient else 1.0


def step_table(
    rule: Rule,
    table: Tensor,
    segments: Tensor,
    progress: Tensor,
    hyper: Tensor,
    outcome: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> None:
    """The operator in plain PyTorch: rows become tensors again."""
    rows = [(at(cells, table.device), cells) for cells in table.tolist()]
    skip = found_inf is not None and found_inf.item() != 0
    outcome[1] = float(skip)
    unscale = 1.0 if grad_scale is None else 1 / grad_scale.double().item()
    if max_norm is not None and norm is None:
        squares = [r.grad.double().square().sum() for r, _ in rows]
        norm = torch.stack(squares).sum().sqrt() * abs(unscale) if squares else outcome.new_zeros(())
    if max_norm is not None:
        outcome[0] = norm
    if skip:
        return
    factor = unscale * clip_coefficient(0.0 if norm is None else norm.item(), max_norm)
    hypers, taken = hyper.tolist(), progress.tolist()
    for i, (row, cells) in enumerate(rows):
        row.taken = taken[i]
        update_row(rule, row, hypers[cells[GROUP]], unscale, factor, grad_scale is not None)
        taken[i] = row.taken
    progress.copy_(torch.tensor(taken, dtype=torch.int64, device="cpu"))  # with the counter, which stays


def at(cells: Sequence[int], device: torch.device) -> Row:
    """The row's tensors, flat: all of them lie in memory as the parameter does."""
    n, flags = cells[NUMEL], cells[FLAGS]
    dtype, moments = DTYPES[cells[KIND] % 4], DTYPES[cells[KIND] // 4]
    weights = torch.int16 if flags & REMAINDER else torch.float32
    scalar = torch.float64 if flags & STEP_FLOAT64 else torch.float32
    tensor = lambda column, dtype, n=n: _tensor_at(cells[column], n, dtype, device)  # noqa: E731
    zero_dim = lambda column: None if not cells[column] else tensor(column, scalar, 1)[0]  # noqa: E731
    empty = torch.empty(0, dtype=dtype, device=device)
    return Row(
        param=empty if n == 0 else tensor(PARAM, dtype),
        grad=empty if n == 0 else tensor(GRAD, dtype),
        states=[tensor(STATE + k, moments) for k in range(3)],
        master=tensor(MASTER, weights),
        ema=tensor(EMA, accumulate_dtype(dtype)),
        step=zero_dim(STEP),
        factor=zero_dim(FACTOR),
        flags=flags,
        stream=cells[STREAM],
    )


def _tensor_at(address: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if not address or n == 0:
        return None
    size = n * dtype.itemsize
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (n,), (1,))
