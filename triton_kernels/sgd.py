"""SGD in Triton. Notation: fusedtricks/ops/sgd.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from . import multi_tensor
from .common import Launch
from .multi_tensor import LR, RULE0, decays, with_decay


@triton.jit
def prepare(h, t, first, factor):
    momentum, nesterov = tl.load(h + RULE0), tl.load(h + RULE0 + 2) != 0
    share = (1 - tl.load(h + RULE0 + 1)).to(tl.float32)
    l2, decay = decays(h)
    lr = tl.load(h + LR).to(tl.float32)
    return (lr, momentum.to(tl.float32), share, l2, decay, momentum != 0, first, nesterov), factor


@triton.jit
def update(p, g, s0, s1, s2, c):
    lr, momentum, share, l2, decay, has_momentum, first, nesterov = c
    g = tl.where(l2 != 0, g + l2 * p, g)
    s0 = tl.where(first, g, momentum * s0 + share * g)
    g = tl.where(has_momentum, tl.where(nesterov, g + momentum * s0, s0), g)
    u = lr * g
    return tl.where(decay != 0, with_decay(u, p, decay), u), s0, s1, s2


@triton.jit
def uses(h):
    return tl.where(tl.load(h + RULE0) != 0, 1, 0)


RULE = multi_tensor.Rule(prepare, update, uses)
sgd_ = multi_tensor.launcher("sgd_", RULE)


def specialisations() -> Iterator[tuple[str, Launch]]:
    return multi_tensor.specialisations(RULE)
