"""LayerNorm: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size, _norm

# (rows, columns), each for the regime it reaches.
SIZES: tuple[Size, ...] = (
    (8192, 768),  # transformer base
    (16384, 64),  # one attention head
    (262144, 16),  # one vector per row
    (8192, 1000),  # no multiple of a vector
    (32768, 257),  # rows that begin anywhere in a cache line
    (2048, 4096),  # transformer large
    (512, 16384),  # a row fills a block
    (64, 131072),  # rows longer than any on-chip memory
    (1, 64),  # cost of a call
)


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x, weight, bias = (torch.randn(shape, dtype=dtype, device=device) for shape in (size, size[-1:], size[-1:]))
    return tuple(t.requires_grad_() for t in (x, weight, bias))


def apex():
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], 1e-5)


def liger():
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)


def traffic() -> Iterator[Moved]:
    return _norm.traffic("layer_norm", parameters=2)


OPERATION = Function(
    stands_in_for="nn.LayerNorm",
    ours=lambda x, weight, bias: fusedtricks.functional.layer_norm(x, x.shape[-1:], weight, bias),
    torch=lambda x, weight, bias: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias),
    inputs=inputs,
    floors=("2ns", "3ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 3 * n * s,
    sizes=SIZES,
    headline=(8192, 768),
    peers={"apex": apex, "liger_kernel": liger},
)
