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
from sweep import cast, forward_backward, outputs
from torch import Tensor

Values = Sequence[Tensor | None]
# The rows that are published; the suite has more.
LAYOUTS = ("plain", "offset by one", "row-sliced", "transposed")
SIZE, IMAGES = (256, 769), (16, 16, 769)


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


def _relative(value: Tensor, truth: Tensor) -> float | None:
    error = (value.detach().cpu().double() - truth).abs().max().item()
    return error / max(truth.abs().max().item(), 1e-300) if math.isfinite(error) else None


def _inputs(case: Any, adversary: Adversary | None) -> tuple[tuple, Values]:
    torch.manual_seed(0)
    fewest = min(len(size) for size, *_ in case.shapes.values())
    shape = adversary.shape if adversary else (SIZE if fewest < 3 else IMAGES, *case.shapes[case.shape][1:])
    values = case.inputs(*shape)
    return shape, adversary.change(*values) if adversary else values


def _peers(operation: Any, case: Any) -> dict[str, Callable[..., Any]]:
    # Of what takes labels or a seed, the case has other arguments than `ours`, as which a peer is called.
    peers = {} if case.fixed else operation.peers
    return {name: load() for name, load in peers.items() if importlib.util.find_spec(name)}


def errors(operation: Any, dtype: torch.dtype, device: str) -> list[Error]:
    """Every ordinary layout and every adversary of one operation in one dtype, result by result."""
    if operation.stem not in CASES:  # no function of tensors: an optimizer, which says itself what it is off by
        return operation.errors(dtype, device)
    case, rows = CASES[operation.stem], []
    wanted = [i for i, name in enumerate(case.names) if name not in case.fixed]
    inputs = [(f"ordinary, {layout}", None, layout) for layout in LAYOUTS]
    inputs += [(name, a, "plain") for name, a in case.adversaries.items() if dtype in a.dtypes]
    for label, adversary, layout in inputs:
        (_, *rest), given = _inputs(case, adversary)
        values = [v.to(dtype).contiguous() if i in wanted else v for i, v in enumerate(given)]
        if any((v.isfinite() != g.isfinite()).any() for v, g in zip(values, given, strict=True)):
            continue  # too large for the dtype
        exact = [cast(v, torch.float64) for v in values]
        ys = outputs(case.call(case.torch_fn, exact, *rest))
        dys = [torch.randn_like(y, memory_format=torch.contiguous_format).to(dtype) for y in ys]
        truth = forward_backward(case, case.torch_fn, exact, wanted, [dy.double() for dy in dys], *rest)
        values, dys = ([t.to(device) for t in tensors] for tensors in (values, dys))
        values[0] = _laid_out(values[0], layout)
        found = {"ours": forward_backward(case, case.fn, values, wanted, dys, *rest)}
        found["torch"] = forward_backward(case, case.torch_fn, values, wanted, dys, *rest)
        if device != "cpu":
            for name, peer in _peers(operation, case).items():
                # A peer takes no normalized_shape: the declaration in bench/ binds its other arguments.
                call = lambda fn, t, *_: fn(*t)  # noqa: E731
                bound = type("Bound", (), {"call": staticmethod(call)})
                found[name] = forward_backward(bound, peer, values, wanted, dys)
        results = [*(f"y{i or ''}" for i in range(len(ys))), *(f"d{case.names[i]}" for i in wanted)]
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
