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
    small: dict[str, Shape]  # finite differences are taken here
    large: dict[str, Shape]  # several blocks of every kind: run-to-run and thread-to-thread equality is tested here
    growing: tuple[Shape, ...]  # sizes of one dynamic compilation
    gpu: dict[str, Shape]  # every regime of the GPU kernels, for what only a GPU can show
    optional: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()  # names that keep their dtype and take no gradient: labels, permutations, seeds
    # By how much rounding of the arithmetic may grow in a shape, or for a gradient layout ("dy ..."), whose true result
    # is nothing but cancellation.
    amplified: dict[str, float] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    adversaries: dict[str, Adversary] = field(default_factory=dict)
    modules: tuple[tuple[type, type], ...] = ()  # (ours, torch's)
    op_db: tuple[str, ...] = ()  # OpInfo names whose samples fit `fn`
    family: str = ""  # "norm": what is tested of row norms alone holds for it
    rowwise: bool = True  # are rows of the result functions of the same row of the first input alone?
    complete: bool = False  # is every file of the stem there?
    stem: str = ""

    @property
    def floating(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.fixed)

    @property
    def operators(self) -> list[Op]:
        return [op for op in Op.registry.values() if op.stem == self.stem]


def _discover() -> tuple[dict[str, Case], dict[str, tuple[str, ...]]]:
    """The cases, and for operations that are no function of tensors (optimizers) the TESTS that stand in for one."""
    cases, tested = {}, {}
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
        module = importlib.import_module(f"{__name__}.{name}")
        if hasattr(module, "TESTS"):
            tested[name] = module.TESTS
        else:
            object.__setattr__(module.CASE, "stem", name)
            cases[name] = module.CASE
    return cases, tested


CASES: dict[str, Case] = {}
TESTED: dict[str, tuple[str, ...]] = {}  # stem -> names of test files
for _into, _found in zip((CASES, TESTED), _discover(), strict=True):
    _into.update(_found)
