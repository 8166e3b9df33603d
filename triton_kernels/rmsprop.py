"""The rule of RMSprop; the kernels are in multi_tensor.py. Notation: fusedtricks/ops/rmsprop.py."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from . import multi_tensor
from .multi_tensor import EPS, LR, RULE, WEIGHT_DECAY, larger, lerp, lerp_squares

STATES = 3


@triton.jit
def prepare(h, t, first, factor):
    alpha, momentum = tl.load(h + RULE), tl.load(h + RULE + 1).to(tl.float32)
    lr, eps, l2 = (
        tl.load(h + LR).to(tl.float32),
        tl.load(h + EPS).to(tl.float32),
        tl.load(h + WEIGHT_DECAY).to(tl.float32),
    )
    return (lr, (1 - alpha).to(tl.float32), alpha.to(tl.float32), momentum, eps, l2, tl.load(h + RULE + 2) != 0), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    lr, weight, rest, momentum, eps, l2, centered = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp_squares(s0, g * g, weight, rest)
    s2 = tl.where(centered, lerp(s2, g, weight, rest), s2)
    # Of a constant gradient it is zero, and rounding may make it less.
    variance = tl.where(centered, larger(s0 - s2 * s2, tl.zeros_like(s0)), s0)
    step = tl.div_rn(g, tl.sqrt_rn(variance) + eps)
    s1 = momentum * s1 + step
    return lr * tl.where(momentum > 0, s1, step), s0, s1, s2


def rmsprop_(*args: Any) -> None:
    multi_tensor.step("rmsprop_", sys.modules[__name__], *args)
