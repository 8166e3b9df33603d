"""LayerNorm(dropout(x) + residual): sizes, inputs, bytes."""

from __future__ import annotations

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Size

P = 0.1


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    shapes = (size, size, size[-1:], size[-1:])
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes)


def composed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = torch.nn.functional.dropout(x, P) + residual
    return torch.nn.functional.layer_norm(z, x.shape[-1:], weight, bias)


OPERATION = Function(
    stands_in_for="LayerNorm(dropout(x) + residual)",
    ours=lambda x, residual, weight, bias: fusedtricks.functional.dropout_add_layer_norm(x, residual, weight, bias, P),
    torch=composed,
    inputs=inputs,
    floors=("4ns", "5ns"),
    forward_bytes=lambda n, s: 4 * n * s,
    backward_bytes=lambda n, s: 5 * n * s,
    # transformer base, transformer large, no multiple of a vector, cost of a call
    sizes=((8192, 768), (2048, 4096), (8192, 1000), (1, 64)),
    headline=(8192, 768),
    random=True,
)
