"""BatchNorm in training: sizes, inputs, bytes. Sizes of four dimensions are NCHW, of five channels_last_3d (NDHWC).

A third mode is the end of a residual branch: batch norm, residual add and relu, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Call, Function, Moved, Size, _batch_norm_traffic

BRANCH = "with add and relu"

SIZES: tuple[Size, ...] = (
    (32, 64, 56, 56),  # ResNet-50, first stage
    (32, 256, 14, 14),  # a late stage: tensors that caches hold
    (128, 256, 14, 14),  # planes that end anywhere in a vector, past the caches
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


def theirs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    return y if residual is None else torch.relu(y + residual)


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    if residual is None:
        return fusedtricks.functional.batch_norm(x, None, None, weight, bias, training=True)
    return fusedtricks.functional.batch_norm_act(x, None, None, weight, bias, residual, training=True)


class BatchNorm(Function):
    modes = (*Function.modes, BRANCH)

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        if mode != BRANCH:
            return super().bytes(mode, size, dtype)
        n = math.prod(size)
        return 10 * n * dtype.itemsize + 3 * n // 8

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        if mode != BRANCH:
            return super().tensors(mode, size, dtype, device)
        x, weight, bias, dy = super().tensors("forward+backward", size, dtype, device)
        residual = torch.randn_like(x)
        # Where rounding decides about the sign, nobody's gradient is right or wrong.
        with torch.no_grad():
            dy.masked_fill_((theirs(x, weight, bias) + residual).abs() < 1e-4, 0.0)
        return x, weight, bias, residual.requires_grad_(), dy

    def call(self, fn: Callable[..., Tensor], mode: str, tensors: tuple[Tensor, ...]) -> Call:
        return super().call(fn, "forward+backward" if mode == BRANCH else mode, tensors)

    def measures(self, mode: str, size: Size, dtype: torch.dtype) -> bool:
        return mode != BRANCH or (dtype == torch.float32 and size in SIZES[:3])


OPERATION = BatchNorm(
    stands_in_for="nn.BatchNorm2d",
    ours=ours,
    torch=theirs,
    inputs=inputs,
    floors=("3ns", "5ns"),
    forward_bytes=lambda n, s: 3 * n * s,
    backward_bytes=lambda n, s: 5 * n * s,
    sizes=SIZES,
    headline=(32, 64, 56, 56),
)
