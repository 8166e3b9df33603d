"""Stochastic gradient descent with momentum (Sutskever et al. 2013) as torch writes it, and SGDW (Loshchilov and Hutter
2019, arXiv:1711.05101, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from fusedtricks.ops import _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import LR, RULE, Rule

MOMENTUM, DAMPENING, NESTEROV = RULE, RULE + 1, RULE + 2


class Scalars(NamedTuple):
    lr: float
    momentum: float
    share: float
    nesterov: bool
    first: bool
    l2: float
    decay: float


def prepare(h: Sequence[float], t: float, first: bool, factor: float) -> tuple[Scalars, float]:
    scalars = Scalars(h[LR], h[MOMENTUM], 1 - h[DAMPENING], bool(h[NESTEROV]), first, *_table.decays(h))
    return scalars, factor


def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Scalars) -> Tensor:
    """With g += l2 p: b = momentum b + (1 - dampening) g, at first b = g; u = lr b, or lr (g + momentum b) with
    Nesterov's momentum, + decay p, where decay = lr weight_decay: the paper's lambda is their weight_decay times the
    learning rate without its schedule."""
    if c.l2:
        g = g + c.l2 * p
    if c.momentum:
        s[0] = g if c.first else c.momentum * s[0] + c.share * g
        g = g + c.momentum * s[0] if c.nesterov else s[0]
    u = c.lr * g
    return _table.with_decay(u, p, c.decay) if c.decay else u


SGD_RULE = Rule(
    stem="sgd",
    states=("momentum_buffer",),
    uses=lambda group: (group["momentum"] != 0,),
    columns={
        **_table.COMMON,
        "momentum": ((-1, MOMENTUM),),
        "dampening": ((-1, DAMPENING),),
        "nesterov": ((-1, NESTEROV),),
    },
    shape=frozenset({"momentum"}),
    prepare=prepare,
    update=update,
    counts=False,
)
sgd_ = SGD_RULE.op


class SGD(FusedOptimizer, torch.optim.SGD):
    """Drop-in for :class:`torch.optim.SGD`; `decoupled_weight_decay=True` is SGDW. See :class:`FusedOptimizer`."""

    rule = SGD_RULE
    extra_defaults: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": False}
    sparse_refusal = "`_fused_sgd` does not support sparse gradients"

    def _sparse_step(self, group: dict[str, Any], p: Tensor) -> None:
        if group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        buffers = [self.state[p].get("momentum_buffer")] if group["momentum"] != 0 else [None]
        keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        options = {key: group[key] for key in keys}
        torch_sgd([p], [p.grad], buffers, has_sparse_grad=True, foreach=False, fused=False, **options)
        if group["momentum"] != 0:
            self.state[p]["momentum_buffer"] = buffers[0]
