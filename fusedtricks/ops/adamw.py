"""Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), AMSGrad (Reddi,
Kale and Kumar 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedtricks.ops import _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import EPS, LR, RULE, Rule

BETA1, BETA2, AMSGRAD = RULE, RULE + 1, RULE + 2


class Scalars(NamedTuple):
    beta1: float
    beta2: float
    rate: float
    eps: float
    l2: float
    decay: float
    amsgrad: bool


def prepare(h: Sequence[float], t: float, first: bool, factor: float) -> tuple[Scalars, float]:
    """Both sides of the fraction are multiplied by sqrt(1 - beta2^t), which saves a rounding."""
    root = math.sqrt(1 - h[BETA2] ** t)
    rate = h[LR] / (1 - h[BETA1] ** t) * root
    return Scalars(h[BETA1], h[BETA2], rate, h[EPS] * root, *_table.decays(h), bool(h[AMSGRAD])), factor


def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Scalars) -> Tensor:
    """With g += l2 p: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, v^ = v or its running maximum,
    u = lr / (1 - beta1^t) m / (sqrt(v^) / sqrt(1 - beta2^t) + eps) + decay p."""
    if c.l2:
        g = g + c.l2 * p
    s[0] = _table.lerp(s[0], g, 1 - c.beta1, c.beta1)
    s[1] = _table.lerp_squares(s[1], g, 1 - c.beta2, c.beta2)
    second = s[1]
    if c.amsgrad:
        second = s[2] = torch.maximum(s[2], s[1])
    u = c.rate * s[0] / (second.sqrt() + c.eps)
    return _table.with_decay(u, p, c.decay) if c.decay else u


ADAMW_RULE = Rule(
    stem="adamw",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    uses=lambda group: (True, True, bool(group["amsgrad"])),
    columns={**_table.COMMON, "betas": ((0, BETA1), (1, BETA2)), "amsgrad": ((-1, AMSGRAD),)},
    shape=frozenset({"amsgrad"}),
    prepare=prepare,
    update=update,
)
adamw_ = ADAMW_RULE.op


class Adam(FusedOptimizer, torch.optim.Adam):
    """Drop-in for :class:`torch.optim.Adam`, weight decay through the gradient. See :class:`FusedOptimizer`."""

    rule = ADAMW_RULE
    sparse_refusal = "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """Drop-in for :class:`torch.optim.AdamW`, weight decay beside the update. See :class:`FusedOptimizer`."""

    rule = ADAMW_RULE
    sparse_refusal = "Adam does not support sparse gradients, please consider SparseAdam instead"
