"""The rule of Adagrad; the kernels are in multi_tensor.py. Notation: fusedtricks/ops/adagrad.py."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from . import multi_tensor
from .multi_tensor import EPS, LR, RULE, WEIGHT_DECAY

STATES = 1


@triton.jit
def prepare(h, t, first, factor):
    lr = (tl.load(h + LR) / (1 + (t - 1) * tl.load(h + RULE))).to(tl.float32)
    return (lr, tl.load(h + EPS).to(tl.float32), tl.load(h + WEIGHT_DECAY).to(tl.float32)), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    lr, eps, l2 = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = s0 + g * g
    return tl.div_rn(lr * g, tl.sqrt_rn(s0) + eps), s0, s1, s2


def adagrad_(*args: Any) -> None:
    multi_tensor.step("adagrad_", sys.modules[__name__], *args)
