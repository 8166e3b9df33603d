"""`python -m bench --accuracy`: errors against float64, ours and others, on ordinary inputs and on those of tests."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import parity
import torch
from cases import CASES, Adversary
from torch import Tensor

Values = Sequence[Tensor | None]
# The rows that are published; the suite has more.
LAYOUTS = ("plain", "offset by one", "row-sliced", "transposed")


@dataclass(frozen=True)
class Error:
    """Error of one result, by implementation; None: not finite. See `measure` for what it is relative to."""

    operation: str
    input: str
    dtype: str
    result: str
    errors: dict[str, float | None]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def measure(stem: str) -> str:
    return "largest error over largest element" if stem in CASES else "relative errors"


def _differentiate(case: Any, fn: Callable[..., Any], tensors: Values, shape: tuple, dy: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    y = case.call(fn, leaves, *shape[1:])
    if dy is None:
        dy = torch.ones_like(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def _relative(value: Tensor, truth: Tensor) -> float | None:
    error = (value.detach().cpu().double() - truth).abs().max().item()
    return error / max(truth.abs().max().item(), 1e-300) if math.isfinite(error) else None


def _inputs(case: Any, adversary: Adversary | None) -> tuple[tuple, Values]:
    torch.manual_seed(0)
    shape = adversary.shape if adversary else ((256, 769), *case.shapes[case.shape][1:])
    values = case.inputs(*shape)
    return shape, adversary.change(*values) if adversary else values


def _peers(operation: Any) -> dict[str, Callable[..., Any]]:
    return {name: load() for name, load in operation.peers.items() if importlib.util.find_spec(name)}


def errors(operation: Any, dtype: torch.dtype, device: str) -> list[Error]:
    """Every ordinary layout and every adversary of one operation in one dtype, result by result."""
    if operation.stem not in CASES:  # no function of tensors: an optimizer, which says itself what it is off by
        return operation.errors(dtype, device)
    case, rows = CASES[operation.stem], []
    inputs = [(f"ordinary, {layout}", None, layout) for layout in LAYOUTS]
    inputs += [(name, a, "plain") for name, a in case.adversaries.items() if dtype in a.dtypes]
    for label, adversary, layout in inputs:
        shape, values = _inputs(case, adversary)
        values = [v.to(dtype).contiguous() if v is not None else None for v in values]
        if any(v is not None and not torch.isfinite(v).all() for v in values):
            continue
        exact = [v.double() if v is not None else None for v in values]
        dy = torch.randn(values[0].shape, dtype=torch.float64).to(dtype)
        truth = _differentiate(case, case.torch_fn, exact, shape, dy.double())
        values = [v.to(device) if v is not None else None for v in values]
        values[0] = _laid_out(values[0], layout)
        found = {"ours": _differentiate(case, case.fn, values, shape, dy.to(device))}
        found["torch"] = _differentiate(case, case.torch_fn, values, shape, dy.to(device))
        if device != "cpu":
            for name, peer in _peers(operation).items():
                # A peer takes no normalized_shape: the declaration in bench/ binds its other arguments.
                call = lambda fn, t, *_: fn(*t)  # noqa: E731
                bound = type("Bound", (), {"call": staticmethod(call)})
                found[name] = _differentiate(bound, peer, values, shape, dy.to(device))
        results = ["y", *(f"d{n}" for n in case.names)]
        for i, result in enumerate(results):
            compared = {who: _relative(v[i], truth[i]) for who, v in found.items()}
            rows.append(Error(operation.stem, label, str(dtype).removeprefix("torch."), result, compared))
    return rows


def _laid_out(value: Tensor, layout: str) -> Tensor:
    _, strides_of, skip = parity.LAYOUTS[layout]
    strides = strides_of(value.shape)
    room = skip + 1 + sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True))
    place = value.new_zeros(max(room, 1)).as_strided(value.shape, strides, skip)
    return place.copy_(value)
