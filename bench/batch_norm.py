"""BatchNorm in training: sizes, inputs, bytes. Sizes of four dimensions are NCHW, of five channels_last_3d (NDHWC)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size, _batch_norm_traffic

SIZES: tuple[Size, ...] = (
    (32, 64, 56, 56),  # ResNet-50, first stage
    (32, 256, 14, 14),  # a late stage: tensors that caches hold
    (8, 3, 224, 224),  # fewer channels than threads or vectors
    (64, 1024, 7, 7),  # planes of no whole vectors
    (8, 3, 1, 224, 224),  # the same few channels, innermost
    (32, 64, 1, 56, 56),
    (100000, 64),  # rows
    (16384, 512),
    (2, 64, 7, 7),  # cost of a call
)


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device)
    if len(size) == 5:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = (torch.randn(size[1], device=device) for _ in range(2))
    return tuple(t.requires_grad_() for t in (x, weight, bias))


def traffic() -> Iterator[Moved]:
    return _batch_norm_traffic.traffic()


OPERATION = Function(
    stands_in_for="nn.BatchNorm2d",
    ours=lambda x, weight, bias: fusedtricks.functional.batch_norm(x, None, None, weight, bias, training=True),
    torch=lambda x, weight, bias: torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True),
    inputs=inputs,
    floors=("3ns", "5ns"),
    forward_bytes=lambda n, s: 3 * n * s,
    backward_bytes=lambda n, s: 5 * n * s,
    sizes=SIZES,
    headline=(32, 64, 56, 56),
)
