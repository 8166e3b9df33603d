"""RMSNorm: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size, _norm
from bench.layer_norm import SIZES

EPS = 1e-6


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in (size, size[-1:]))


def apex():
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight: fused_rms_norm_affine(x, weight, x.shape[-1:], EPS)


def liger():
    from liger_kernel.transformers.functional import liger_rms_norm

    # Its default writes dx over dy, which a caller who needs dy again cannot use.
    return lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False)


def quack():
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=EPS)


def traffic() -> Iterator[Moved]:
    return _norm.traffic("rms_norm", parameters=1)


OPERATION = Function(
    stands_in_for="nn.RMSNorm",
    ours=lambda x, weight: fusedtricks.functional.rms_norm(x, x.shape[-1:], weight, EPS),
    torch=lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS),
    inputs=inputs,
    floors=("2ns", "3ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 3 * n * s,
    sizes=SIZES,
    headline=(8192, 768),
    peers={"apex": apex, "liger_kernel": liger, "quack": quack},
)
