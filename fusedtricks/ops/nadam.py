"""NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam"), with the schedule of momenta that torch uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedtricks.ops import _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import EPS, LR, RULE, Rule

BETA1, BETA2, MOMENTUM_DECAY = RULE, RULE + 1, RULE + 2


class Scalars(NamedTuple):
    beta1: float
    beta2: float
    of_grad: float
    of_average: float
    eps: float
    l2: float
    decay: float


def prepare(h: Sequence[float], t: float, first: bool, factor: float) -> tuple[Scalars, float]:
    """mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2); `factor` is the product of the mu so far. Both sides of the
    fraction are multiplied by sqrt(1 - beta2^t), which saves a rounding."""
    mu, following = (h[BETA1] * (1 - 0.5 * 0.96 ** (s * h[MOMENTUM_DECAY])) for s in (t, t + 1))
    factor *= mu
    root = math.sqrt(1 - h[BETA2] ** t)
    of_grad = h[LR] * (1 - mu) / (1 - factor) * root
    of_average = h[LR] * following / (1 - factor * following) * root
    return Scalars(h[BETA1], h[BETA2], of_grad, of_average, h[EPS] * root, *_table.decays(h)), factor


def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Scalars) -> Tensor:
    """With m and v as in Adam: u = (lr (1 - mu_t) / (1 - mu_1...mu_t) g + lr mu_t+1 / (1 - mu_1...mu_t+1) m) /
    (sqrt(v) / sqrt(1 - beta2^t) + eps) + decay p."""
    if c.l2:
        g = g + c.l2 * p
    s[0] = _table.lerp(s[0], g, 1 - c.beta1, c.beta1)
    s[1] = _table.lerp_squares(s[1], g, 1 - c.beta2, c.beta2)
    u = (c.of_grad * g + c.of_average * s[0]) / (s[1].sqrt() + c.eps)
    return _table.with_decay(u, p, c.decay) if c.decay else u


NADAM_RULE = Rule(
    stem="nadam",
    states=("exp_avg", "exp_avg_sq"),
    uses=lambda group: (True, True),
    columns={**_table.COMMON, "betas": ((0, BETA1), (1, BETA2)), "momentum_decay": ((-1, MOMENTUM_DECAY),)},
    shape=frozenset(),
    prepare=prepare,
    update=update,
    factor="mu_product",
)
nadam_ = NADAM_RULE.op


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """Drop-in for :class:`torch.optim.NAdam`, coupled or decoupled weight decay. See :class:`FusedOptimizer`."""

    rule = NADAM_RULE
