"""Bugs of distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seeded_bugs import Bug, NativeBug, as_if_dense

TEMPERATURE = 3  # among the options


def _options(change: Callable[[list[Any]], None]) -> Callable[..., Any]:
    def wrong(right: Any, *args: Any) -> Any:
        args = list(args)
        at = next(i for i, a in enumerate(args) if type(a) is int)
        options = args[at : at + 6]
        change(options)
        return right(*args[:at], *options, *args[at + 6 :])

    return wrong


def _at_one(options: list[Any]) -> None:
    options[TEMPERATURE] = 1.0


def _backward_of_the_other_direction(right: Any, dloss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Any:
    """KL(student || teacher)'s roles: the models swapped, with their statistics."""
    if rest[0] is not None:  # of a sparse teacher there is no other direction
        return right(dloss, student, teacher, *rest)
    *labels, stats, total, i, on, off, temperature, alpha, reduction = rest
    swapped = torch.stack([stats[k] for k in (3, 1, 2, 0, 5, 4, 6)])
    return right(
        dloss, teacher.to(student.dtype), student, *labels, swapped, total, i, on, off, temperature, alpha, reduction
    )


def _next_class(right: Any, dloss: Tensor, student: Tensor, teacher: Tensor, indices: Any, *rest: Any) -> Any:
    return right(dloss, student, teacher, None if indices is None else (indices + 1) % student.shape[-1], *rest)


def _teacher_as_if_dense(right: Any, dloss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Any:
    return right(dloss, student, as_if_dense(teacher), *rest)


BUGS = {
    "no temperature in the gradient": Bug("distillation_bwd", _options(_at_one)),
    "gradient of the swapped models": Bug("distillation_bwd", _backward_of_the_other_direction),
    "strides of the teacher forgotten": Bug("distillation_bwd", _teacher_as_if_dense),
    "gradient of a sparse teacher one class further": Bug("distillation_bwd", _next_class),
}

NATIVE_BUGS = {
    "normalizers left out of the divergence": NativeBug(
        "math/distillation.h", "cross / teacher_sum + log_student_over_teacher", "cross / teacher_sum", "distillation"
    ),
    "one of the entries of a class": NativeBug(
        "cpu/distillation_rows.h", "spread[c] += each[i];", "spread[c] = each[i];", "distillation"
    ),
    "the row before in the gradient": NativeBug(
        "cpu/distillation_rows.h",
        "ev[pass.sparse->classes[i]] = 0;",
        "ev[pass.sparse->classes[i]] += 0;",
        "distillation",
    ),
}

CUDA_BUGS = {
    "entries of a class do not add up": NativeBug(
        "cuda/distillation.cuh",
        "if (a.known.at(entries + i) == c) e += exp(",
        "if (a.known.at(entries + i) == c) e = exp(",
        "distillation",
    ),
    "steps of the gradient forgotten": NativeBug(
        "cuda/distillation.cuh",
        "        store_gradient(value, y + c * a.y_step, a.y_step);",
        "        store_gradient(value, y + c, 1);",
        "distillation",
    ),
    "labels at the temperature of the teacher": NativeBug(
        "cuda/distillation.cuh",
        "value[i] += slope.hard * exp(widen(x[i]) - top);",
        "value[i] += slope.hard * exp((widen(x[i]) - top) * a.over);",
        "distillation",
    ),
}
