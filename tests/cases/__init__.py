"""One declaration per operation. Every test discovers them; a new operation adds one module here and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import Op

# Tensors of one call in the order of `Case.names`; a parameter that is left out is None.
Tensors = Sequence[Tensor | None]
Shape = tuple[tuple[int, ...], Any]


@dataclass(frozen=True)
class Adversary:
    """Values on which kernels go wrong. `change` gets and returns the fp64 tensors of a call of `shape`.

    `bound` is the largest error of any result allowed in fp32, relative to the largest element of the truth. It does
    not look at torch, which is inaccurate or infinite on some of these. `noise` is the absolute error of the truth.
    """

    shape: Shape
    change: Callable[..., Tensors]
    bound: float = 2e-6
    noise: float = 0.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """What the tests need to know about one operation.

    A shape is (size of the first input, further arguments of `inputs` and `call`); its key, the pytest id, is the
    reason it is there: the kernel regime it reaches.
    """

    fn: Callable[..., Any]
    torch_fn: Callable[..., Any]
    names: tuple[str, ...]
    inputs: Callable[..., Tensors]  # inputs(*shape): fp64 tensors on the CPU
    call: Callable[..., Any]  # call(fn, tensors, *shape[1:], **options), the same for `fn` and `torch_fn`
    shapes: dict[str, Shape]
    shape: str  # the default, where another axis is varied
    layout_shapes: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # By how much rounding of the arithmetic may grow in a shape whose true result is nothing but cancellation.
    amplified: dict[str, float] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    adversaries: dict[str, Adversary] = field(default_factory=dict)
    modules: tuple[tuple[type, type], ...] = ()  # (ours, torch's)
    op_db: tuple[str, ...] = ()  # OpInfo names whose samples fit `fn`
    rowwise: bool = True  # are rows of the result functions of the same row of the first input alone?
    complete: bool = False  # is every file of the stem there?
    stem: str = ""

    @property
    def operators(self) -> list[Op]:
        return [op for op in Op.registry.values() if op.stem == self.stem]


def _discover() -> dict[str, Case]:
    cases = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            case = importlib.import_module(f"{__name__}.{module.name}").CASE
            object.__setattr__(case, "stem", module.name)
            cases[module.name] = case
    return cases


CASES: dict[str, Case] = {}
CASES.update(_discover())
