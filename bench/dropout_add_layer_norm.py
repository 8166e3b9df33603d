"""LayerNorm(dropout(x) + residual): sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op

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


def traffic() -> Iterator[Moved]:
    """With a gradient through both outputs, parameters of the dtype of x, all gradients wanted."""
    fwd, bwd = (Op.registry[f"dropout_add_layer_norm_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    reference = Op.registry["dropout_add_layer_norm_fwd"].implementation("reference")
    seed = torch.tensor([1])
    for size in ((512, 1024), (128, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            x, residual, dy, dz = (torch.randn(size).to(dtype) for _ in range(4))
            weight, bias = (torch.randn(size[1]).to(dtype) for _ in range(2))
            n = x.numel() * x.element_size()
            forward = lambda x=x, r=residual, w=weight, b=bias: fwd(x, r, w, b, seed, 60000, 1e-5, 1, True)  # noqa: E731
            yield Moved("forward", size, dtype, forward, 4 * n, 1.1)
            _, z, stats = reference(x, residual, weight, bias, seed, 60000, 1e-5, 1, True)
            backward = lambda dy=dy, dz=dz, z=z, w=weight, stats=stats: bwd(  # noqa: E731
                dy, dz, z, w, stats, seed, 60000, 1, True, True, True, True, True
            )
            # dy, dz and z are read, dx and dresidual written.
            yield Moved("backward", size, dtype, backward, 5 * n, 1.1)
