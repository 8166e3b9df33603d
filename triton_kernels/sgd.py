"""The rule of SGD and SGDW; the kernels are in multi_tensor.py. Notation: fusedtricks/ops/sgd.py."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from . import multi_tensor
from .multi_tensor import LR, RULE, decays

STATES = 1


@triton.jit
def prepare(h, t, first, factor):
    momentum, share = tl.load(h + RULE), 1 - tl.load(h + RULE + 1)
    l2, decay = decays(h)
    nesterov = tl.load(h + RULE + 2) != 0
    return (
        tl.load(h + LR).to(tl.float32),
        momentum.to(tl.float32),
        share.to(tl.float32),
        nesterov,
        first,
        l2,
        decay,
    ), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    lr, momentum, share, nesterov, first, l2, decay = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = tl.where(first, g, momentum * s0 + share * g)
    moved = tl.where(nesterov, g + momentum * s0, s0)
    u = lr * tl.where(momentum != 0, moved, g)
    return tl.where(decay != 0, u + decay * p, u), s0, s1, s2


def sgd_(*args: Any) -> None:
    multi_tensor.step("sgd_", sys.modules[__name__], *args)
