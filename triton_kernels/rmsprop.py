"""RMSprop in Triton. Notation: fusedtricks/ops/rmsprop.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from . import multi_tensor
from .common import Launch
from .multi_tensor import EPS, LR, RULE0, WEIGHT_DECAY, larger, lerp, lerp_squares


@triton.jit
def prepare(h, t, first, factor):
    alpha, momentum = tl.load(h + RULE0), tl.load(h + RULE0 + 1)
    lr, eps, l2 = tl.load(h + LR), tl.load(h + EPS), tl.load(h + WEIGHT_DECAY)
    return (
        lr.to(tl.float32), (1 - alpha).to(tl.float32), alpha.to(tl.float32), momentum.to(tl.float32),
        eps.to(tl.float32), l2.to(tl.float32), momentum > 0, tl.load(h + RULE0 + 2) != 0,
    ), factor  # fmt: skip


@triton.jit
def update(p, g, s0, s1, s2, c):
    lr, weight, rest, momentum, eps, l2, has_momentum, centered = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = lerp_squares(s0, g, weight, rest)
    s2 = lerp(s2, g, weight, rest)
    # Of a constant gradient it is zero, and rounding may make it less.
    variance = tl.where(centered, larger(s0 - s2 * s2, s0 * 0), s0)
    step = tl.div_rn(g, tl.sqrt_rn(variance) + eps)
    s1 = momentum * s1 + step
    return lr * tl.where(has_momentum, s1, step), s0, s1, s2


@triton.jit
def uses(h):
    return 1 + tl.where(tl.load(h + RULE0 + 1) > 0, 2, 0) + tl.where(tl.load(h + RULE0 + 2) != 0, 4, 0)


RULE = multi_tensor.Rule(prepare, update, uses)
rmsprop_ = multi_tensor.launcher("rmsprop_", RULE)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return multi_tensor.specialisations(RULE)
