"""NAdam in Triton. Notation: fusedtricks/ops/nadam.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from . import multi_tensor
from .common import Launch
from .multi_tensor import EPS, LR, RULE0, decays, lerp, lerp_squares, power, with_decay


@triton.jit
def momentum(beta1, s):
    # Not a cast, which would go through float32.
    return beta1 * (1 - 0.5 * power(tl.full([], 0.96, tl.float64), s))


@triton.jit
def prepare(h, t, first, factor):
    lr, beta1, beta2 = tl.load(h + LR), tl.load(h + RULE0), tl.load(h + RULE0 + 1)
    momentum_decay = tl.load(h + RULE0 + 2)
    root = tl.sqrt(1 - power(beta2, t))
    mu, following = momentum(beta1, t * momentum_decay), momentum(beta1, (t + 1) * momentum_decay)
    factor *= mu
    of_grad = lr * (1 - mu) / (1 - factor) * root
    of_average = lr * following / (1 - factor * following) * root
    l2, decay = decays(h)
    return (
        (1 - beta1).to(tl.float32), beta1.to(tl.float32), (1 - beta2).to(tl.float32), beta2.to(tl.float32),
        of_grad.to(tl.float32), of_average.to(tl.float32), (tl.load(h + EPS) * root).to(tl.float32), l2, decay,
    ), factor  # fmt: skip


@triton.jit
def update(p, g, s0, s1, s2, c):
    weight1, rest1, weight2, rest2, of_grad, of_average, eps, l2, decay = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp(s0, g, weight1, rest1)
    s1 = lerp_squares(s1, g, weight2, rest2)
    u = tl.div_rn(of_grad * g + of_average * s0, tl.sqrt_rn(s1) + eps)
    return tl.where(decay != 0, with_decay(u, p, decay), u), s0, s1, s2


@triton.jit
def uses(h):
    return 3


RULE = multi_tensor.Rule(prepare, update, uses)
nadam_ = multi_tensor.launcher("nadam_", RULE)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return multi_tensor.specialisations(RULE)
