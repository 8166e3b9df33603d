"""The rule of NAdam; the kernels are in multi_tensor.py. Notation: fusedtricks/ops/nadam.py."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from . import multi_tensor
from .multi_tensor import EPS, LR, RULE, decays, lerp, lerp_squares, power

STATES = 2


@triton.jit
def prepare(h, t, first, factor):
    beta1, beta2 = tl.load(h + RULE), tl.load(h + RULE + 1)
    root, lr, psi = tl.sqrt(1 - power(beta2, t)), tl.load(h + LR), tl.load(h + RULE + 2)
    base = tl.cast(0.96, tl.float64)
    mu, following = beta1 * (1 - 0.5 * power(base, t * psi)), beta1 * (1 - 0.5 * power(base, (t + 1) * psi))
    factor = factor * mu
    of_grad = (lr * (1 - mu) / (1 - factor) * root).to(tl.float32)
    of_average = (lr * following / (1 - factor * following) * root).to(tl.float32)
    l2, decay = decays(h)
    w1, r1, w2, r2 = (1 - beta1).to(tl.float32), beta1.to(tl.float32), (1 - beta2).to(tl.float32), beta2.to(tl.float32)
    return (w1, r1, w2, r2, of_grad, of_average, (tl.load(h + EPS) * root).to(tl.float32), l2, decay), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    weight1, rest1, weight2, rest2, of_grad, of_average, eps, l2, decay = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp(s0, g, weight1, rest1)
    s1 = lerp_squares(s1, g * g, weight2, rest2)
    u = tl.div_rn(of_grad * g + of_average * s0, tl.sqrt_rn(s1) + eps)
    return tl.where(decay != 0, u + decay * p, u), s0, s1, s2


def nadam_(*args: Any) -> None:
    multi_tensor.step("nadam_", sys.modules[__name__], *args)
