"""Adagrad in Triton. Notation: fusedtricks/ops/adagrad.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from . import multi_tensor
from .common import Launch
from .multi_tensor import EPS, LR, RULE0, WEIGHT_DECAY


@triton.jit
def prepare(h, t, first, factor):
    rate = tl.load(h + LR) / (1 + (t - 1) * tl.load(h + RULE0))
    return (rate.to(tl.float32), tl.load(h + EPS).to(tl.float32), tl.load(h + WEIGHT_DECAY).to(tl.float32)), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    rate, eps, l2 = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = s0 + g * g
    return tl.div_rn(rate * g, tl.sqrt_rn(s0) + eps), s0, s1, s2


@triton.jit
def uses(h):
    return 1


RULE = multi_tensor.Rule(prepare, update, uses)
adagrad_ = multi_tensor.launcher("adagrad_", RULE)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return multi_tensor.specialisations(RULE)
