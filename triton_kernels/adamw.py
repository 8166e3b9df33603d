"""Adam and AdamW in Triton. Notation: fusedtricks/ops/adamw.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from . import multi_tensor
from .common import Launch
from .multi_tensor import EPS, LR, RULE0, decays, larger, lerp, lerp_squares, power, with_decay


@triton.jit
def prepare(h, t, first, factor):
    beta1, beta2 = tl.load(h + RULE0), tl.load(h + RULE0 + 1)
    root = tl.sqrt(1 - power(beta2, t))
    rate = tl.load(h + LR) / (1 - power(beta1, t)) * root
    l2, decay = decays(h)
    eps, amsgrad = tl.load(h + EPS) * root, tl.load(h + RULE0 + 2) != 0
    return (
        (1 - beta1).to(tl.float32), beta1.to(tl.float32), (1 - beta2).to(tl.float32), beta2.to(tl.float32),
        rate.to(tl.float32), eps.to(tl.float32), l2, decay, amsgrad,
    ), factor  # fmt: skip


@triton.jit
def update(p, g, s0, s1, s2, c):
    weight1, rest1, weight2, rest2, rate, eps, l2, decay, amsgrad = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp(s0, g, weight1, rest1)
    s1 = lerp_squares(s1, g, weight2, rest2)
    s2 = tl.where(amsgrad, larger(s2, s1), s1)
    u = tl.div_rn(rate * s0, tl.sqrt_rn(s2) + eps)
    return tl.where(decay != 0, with_decay(u, p, decay), u), s0, s1, s2


@triton.jit
def uses(h):
    return tl.where(tl.load(h + RULE0 + 2) != 0, 7, 3)


RULE = multi_tensor.Rule(prepare, update, uses)
adamw_ = multi_tensor.launcher("adamw_", RULE)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return multi_tensor.specialisations(RULE, with_norm=True)
