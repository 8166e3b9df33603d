"""An operator and its backward as one autograd node in C++ (csrc/node.cpp), beside the autograd.Function in Python.

The Function defines what is right. It serves `torch.compile`, forced back ends, torch.func, forward-mode AD, subclasses
of Tensor, and installations without `fusedtricks._node`; and the node asks its backward for gradients that must
themselves be differentiable. All other calls, which are nearly all, spare the host what Python takes for both.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedtricks import _op
from fusedtricks._op import Op

# Where an argument of the backward operator comes from, as csrc/node.cpp numbers it.
GRADIENT, SAVED, NUMBER, CONSTANT, NEED = range(5)


def pair(
    function: type[torch.autograd.Function],
    forward: Op,
    backward: Op,
    *,
    returned: int = 1,
    given: dict[str, Any] | None = None,
    unchanged: str | None = None,
    laid_out: tuple[str, ...] = (),
    contiguous: tuple[str, ...] = (),
) -> Callable[..., Any] | None:
    """A callable that takes what `forward` takes and returns its first `returned` results; None without the library.

    It also takes True for a `seed`, and then draws one on the device of the first argument (ops/_philox.py).

    The names in the two schemas say what an argument of `backward` is: `dy` the gradient of the result `y`, `x` the
    argument or result of `forward` of that name, `need_dx` whether x wants a gradient; and its result `dx` is that
    gradient. A result without a name is y in `forward`, and the gradient of the first argument in `backward`.

    Args:
        function: its backward must take the tensors that `backward` takes as its saved ones, in that order, None for
            those `given` as None; the numbers of `forward` and those `given` as attributes of its context; and
            `strides`, of the arguments `laid_out`. It must return the gradients first, in the order of `forward`.
        given: other arguments of `backward`: another name, or a constant.
        unchanged: an argument whose gradient is that of the first result itself.
        laid_out: arguments whose gradient gets the strides of their `empty_like`, which `backward` does not see to.
        contiguous: gradients that `backward` takes in no other layout.
    """
    if _op._node is None:
        return None
    given = given or {}
    arguments = [a.name for a in forward.default._schema.arguments]
    is_tensor = [isinstance(_inner(a.type), torch.TensorType) for a in forward.default._schema.arguments]
    results = [r.name or "y" for r in forward.default._schema.returns]
    returns = [r.name or f"d{arguments[0]}" for r in backward.default._schema.returns]
    gradient_of = {f"d{name}": i for i, name in enumerate(results[:returned])}
    differentiable = [name for name in arguments if f"d{name}" in returns]
    numbers = [name for name, tensor in zip(arguments, is_tensor, strict=True) if not tensor]
    saved: list[tuple[bool, int]] = []
    sources = []
    for argument in backward.default._schema.arguments:
        value = given.get(argument.name, argument.name)
        name = value if isinstance(value, str) else argument.name
        if name in gradient_of:
            sources.append((GRADIENT, gradient_of[name], name in contiguous))
        elif name in numbers and value is name:
            sources.append((NUMBER, numbers.index(name), False))
        elif name.startswith("need_d"):
            sources.append((NEED, differentiable.index(name.removeprefix("need_d")), False))
        elif name in arguments or name in results:
            kept = value is name
            place = (name in results, (results if name in results else arguments).index(name) if kept else -1)
            sources.append((SAVED, len(saved), False) if kept else (CONSTANT, None, False))
            saved.append(place)
        else:
            sources.append((CONSTANT, given[name], False))
    constants = {k: v for k, v in given.items() if not isinstance(v, str)}

    def differentiate(
        grads: tuple[Tensor | None, ...],
        saved: tuple[Tensor | None, ...],
        values: tuple[Any, ...],
        strides: tuple[tuple[int, ...], ...],
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx = SimpleNamespace(**constants, **dict(zip(numbers, values, strict=True)))
        ctx.saved_tensors, ctx.needs_input_grad = saved, needs
        ctx.strides = strides[0] if len(strides) == 1 else strides
        return function.backward(ctx, *grads)

    return _op._node.make(
        f"{function.__name__}Backward",
        f"{_op._NAMESPACE}::{forward.name}",
        f"{_op._NAMESPACE}::{backward.name}",
        returned,
        [arguments.index(name) for name in differentiable],
        [-1 if name == unchanged else returns.index(f"d{name}") for name in differentiable],
        [differentiable.index(name) for name in laid_out],
        saved,
        [arguments.index(name) for name in numbers],
        sources,
        differentiate,
    )


def _inner(kind: Any) -> Any:
    return kind.getElementType() if isinstance(kind, torch.OptionalType) else kind


def recorded(of: Callable[..., Any] | None, *args: Any) -> Any:
    """What the pair `of` returns, with its gradient recorded where one is wanted; None: Python has to do it."""
    return None if of is None or _op._forced is not None or torch.compiler.is_compiling() else of(*args)
