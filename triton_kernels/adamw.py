"""The rule of Adam, AdamW and AMSGrad; the kernels are in multi_tensor.py. Notation: fusedtricks/ops/adamw.py."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from . import multi_tensor
from .multi_tensor import EPS, LR, RULE, decays, larger, lerp, lerp_squares, power

STATES = 3


@triton.jit
def prepare(h, t, first, factor):
    beta1, beta2 = tl.load(h + RULE), tl.load(h + RULE + 1)
    root = tl.sqrt(1 - power(beta2, t))
    rate, eps = (
        (tl.load(h + LR) / (1 - power(beta1, t)) * root).to(tl.float32),
        (tl.load(h + EPS) * root).to(tl.float32),
    )
    l2, decay = decays(h)
    w1, r1, w2, r2 = (1 - beta1).to(tl.float32), beta1.to(tl.float32), (1 - beta2).to(tl.float32), beta2.to(tl.float32)
    return (w1, r1, w2, r2, rate, eps, l2, decay, tl.load(h + RULE + 2) != 0), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    weight1, rest1, weight2, rest2, rate, eps, l2, decay, amsgrad = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp(s0, g, weight1, rest1)
    s1 = lerp_squares(s1, g * g, weight2, rest2)
    s2 = tl.where(amsgrad, larger(s2, s1), s2)
    u = tl.div_rn(rate * s0, tl.sqrt_rn(tl.where(amsgrad, s2, s1)) + eps)
    return tl.where(decay != 0, u + decay * p, u), s0, s1, s2


def adamw_(*args: Any) -> None:
    multi_tensor.step("adamw_", sys.modules[__name__], *args)
