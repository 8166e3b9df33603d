"""Bugs of cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seeded_bugs import Bug, NativeBug, as_if_dense, in_place, partly_written

OFF, REDUCTION = 2, 6  # among the options


def _forward(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """A forward whose labels, lam and weight are changed first."""

    def wrong(right: Any, logits: Tensor, target: Tensor, other: Any, lam: Any, weight: Any, *rest: Any) -> Any:
        return right(logits, *change(target, other, lam, weight), *rest)

    return wrong


def _backward(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    def wrong(right: Any, dloss: Tensor, dlse: Any, logits: Tensor, *rest: Any) -> Any:
        targets, (stats, total), options = rest[:4], rest[4:6], list(rest[6:])
        targets, stats, options = change(targets, stats, options)
        return right(dloss, dlse, logits, *targets, stats, total, *options)

    return wrong


def _without_smoothing(targets: Any, stats: Tensor, options: list[Any]) -> tuple[Any, ...]:
    options[OFF] = 0.0
    return targets, stats, options


def _second_label_forgotten(targets: Any, stats: Tensor, options: list[Any]) -> tuple[Any, ...]:
    first, other, lam, weight = targets
    return (first, other if other is None else first, lam, weight), stats, options


def _shifted_maximum(targets: Any, stats: Tensor, options: list[Any]) -> tuple[Any, ...]:
    """exp(z) without its maximum: overflows, or loses everything."""
    return targets, torch.stack((stats[0] * 0, stats[1], stats[2])), options


def _mean_over_rows(right: Any, logits: Tensor, *rest: Any) -> Any:
    loss, stats, total, *others = right(logits, *rest)
    if rest[4 + REDUCTION] == 1 and total.numel():
        rows = max(1, logits.numel() // logits.shape[-1])
        loss = loss * total / rows
    return loss, stats, total, *others


def _labels_in_16_bits(target: Tensor, *rest: Any) -> tuple[Any, ...]:
    return target if target.is_floating_point() else target.bfloat16().to(target.dtype), *rest


def _kept_although_ignored(target: Tensor, other: Any, lam: Any, weight: Any) -> tuple[Any, ...]:
    return target, other if other is None else torch.where(other < 0, 0, other), lam, weight


def _halves_swapped(a: Tensor, b: Any, lam: Any, weight: Any) -> tuple[Any, ...]:
    return (a, b, lam, weight) if b is None else (b, a, lam, weight)


def _partly(right: Any, *args: Any) -> Any:
    return partly_written(right(*args), 1)


def _as_if_dense(right: Any, dloss: Tensor, dlse: Any, logits: Tensor, *rest: Any) -> Any:
    return right(dloss, dlse, as_if_dense(logits), *rest)


BUGS = {
    "lam weighs the partner": Bug("cross_entropy_fwd", _forward(_halves_swapped)),
    "mean divides by the rows": Bug("cross_entropy_fwd", _mean_over_rows),
    "labels travel in 16 bits": Bug("cross_entropy_fwd", _forward(_labels_in_16_bits)),
    "an ignored half counts": Bug("cross_entropy_fwd", _forward(_kept_although_ignored)),
    "weights forgotten": Bug("cross_entropy_fwd", _forward(lambda a, b, lam, w: (a, b, lam, None))),
    "no smoothing in the gradient": Bug("cross_entropy_bwd", _backward(_without_smoothing)),
    "second label not in the gradient": Bug("cross_entropy_bwd", _backward(_second_label_forgotten)),
    "exponentials without their maximum": Bug("cross_entropy_bwd", _backward(_shifted_maximum)),
    "strides of the logits forgotten": Bug("cross_entropy_bwd", _as_if_dense),
    "last element not written": Bug("cross_entropy_bwd", _partly),
    "incoming gradient overwritten": Bug("cross_entropy_bwd", in_place),
}

NATIVE_BUGS = {
    "loss of the second label forgotten": NativeBug(
        "math/cross_entropy.h", "if (t.at_b != A(0)) inner += t.at_b * zb;", "", "cross_entropy"
    ),
    "ignored labels keep their mass": NativeBug(
        "math/cross_entropy.h",
        "const A share_a = kept_a ? lam : A(0), share_b",
        "const A share_a = lam, share_b",
        "cross_entropy",
    ),
}
