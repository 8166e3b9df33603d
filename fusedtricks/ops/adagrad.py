"""Adagrad (Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad

from fusedtricks.ops import _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import EPS, LR, RULE, WEIGHT_DECAY, Rule

LR_DECAY = RULE


class Scalars(NamedTuple):
    lr: float
    eps: float
    l2: float


def prepare(h: Sequence[float], t: float, first: bool, factor: float) -> tuple[Scalars, float]:
    return Scalars(h[LR] / (1 + (t - 1) * h[LR_DECAY]), h[EPS], h[WEIGHT_DECAY]), factor


def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Scalars) -> Tensor:
    """With g += l2 p: s = s + g^2, u = lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)."""
    if c.l2:
        g = g + c.l2 * p
    s[0] = s[0] + g * g
    return c.lr * g / (s[0].sqrt() + c.eps)


ADAGRAD_RULE = Rule(
    stem="adagrad",
    states=("sum",),
    uses=lambda group: (True,),
    columns={**_table.COMMON, "lr_decay": ((-1, LR_DECAY),)},
    shape=frozenset(),
    prepare=prepare,
    update=update,
)
adagrad_ = ADAGRAD_RULE.op


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Drop-in for :class:`torch.optim.Adagrad`. See :class:`FusedOptimizer`."""

    rule = ADAGRAD_RULE
    initial_state = "initial_accumulator_value"
    sparse_refusal = "`fused` does not support sparse grad or complex param"

    def _sparse_step(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        options = {key: group[key] for key in ("lr", "weight_decay", "lr_decay", "eps", "maximize")}
        torch_adagrad(
            [p], [p.grad], [state["sum"]], [state["step"]], fused=False, has_sparse_grad=True, foreach=False, **options
        )
