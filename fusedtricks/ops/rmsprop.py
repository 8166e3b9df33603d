"""RMSprop (Hinton, "Neural Networks for Machine Learning", lecture 6e; centered: Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedtricks.ops import _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import EPS, LR, RULE, WEIGHT_DECAY, Rule

ALPHA, MOMENTUM, CENTERED = RULE, RULE + 1, RULE + 2


class Scalars(NamedTuple):
    lr: float
    alpha: float
    momentum: float
    eps: float
    l2: float
    centered: bool


def prepare(h: Sequence[float], t: float, first: bool, factor: float) -> tuple[Scalars, float]:
    return Scalars(h[LR], h[ALPHA], h[MOMENTUM], h[EPS], h[WEIGHT_DECAY], bool(h[CENTERED])), factor


def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Scalars) -> Tensor:
    """With g += l2 p: v = alpha v + (1 - alpha) g^2, minus the square of the mean gradient if centered;
    u = lr g / (sqrt(v) + eps), or lr times the momentum buffer b = momentum b + g / (sqrt(v) + eps)."""
    if c.l2:
        g = g + c.l2 * p
    s[0] = variance = _table.lerp_squares(s[0], g, 1 - c.alpha, c.alpha)
    if c.centered:
        s[2] = _table.lerp(s[2], g, 1 - c.alpha, c.alpha)
        # Of a constant gradient it is zero, and rounding may make it less.
        variance = torch.maximum(variance - s[2] * s[2], torch.zeros_like(variance))
    step = g / (variance.sqrt() + c.eps)
    if c.momentum > 0:
        step = s[1] = c.momentum * s[1] + step
    return c.lr * step


RMSPROP_RULE = Rule(
    stem="rmsprop",
    states=("square_avg", "momentum_buffer", "grad_avg"),
    uses=lambda group: (True, group["momentum"] > 0, bool(group["centered"])),
    columns={
        **_table.COMMON,
        "alpha": ((-1, ALPHA),),
        "momentum": ((-1, MOMENTUM),),
        "centered": ((-1, CENTERED),),
    },
    shape=frozenset({"momentum", "centered"}),
    prepare=prepare,
    update=update,
)
rmsprop_ = RMSPROP_RULE.op


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """Drop-in for :class:`torch.optim.RMSprop`. See :class:`FusedOptimizer`."""

    rule = RMSPROP_RULE
