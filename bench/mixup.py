"""mixup with a weight per sample and a random permutation: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Function, Moved, Size
from fusedtricks._op import Op


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device).requires_grad_()
    return x, torch.rand(size[0], device=device), torch.randperm(size[0], device=device)


def eager(x: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
    own = lam.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return own * x + (1 - own) * x[perm]


class Mixing(Function):
    """Weights and permutations are no floating inputs."""

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x, *rest = self.inputs(size, dtype, device)
        return (x.detach(), *rest) if mode == "forward" else (x, *rest, torch.randn_like(x))


OPERATION = Mixing(
    stands_in_for="lam x + (1 - lam) x[perm]",
    ours=lambda x, lam, perm: fusedtricks.functional.mixup(x, None, lam, perm)[0],
    torch=eager,
    inputs=inputs,
    floors=("2ns", "2ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    # images, hidden layers of a small network, cost of a call
    sizes=((64, 3, 224, 224), (256, 4096), (4, 16)),
    headline=(64, 3, 224, 224),
    random=True,
)


def traffic() -> Iterator[Moved]:
    """An arbitrary permutation, forward and backward; and images."""
    fwd, bwd = (Op.registry[f"mixup_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    for N, D in ((64, 4096), (256, 1024), (300, 2048)):
        lam, perm = torch.rand(N), torch.randperm(N)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(N, D).to(dtype)
            floor = 2 * x.numel() * x.element_size()
            forward = lambda x=x, lam=lam, perm=perm: (fwd(x, lam, perm, None, None, x.dtype),)  # noqa: E731
            yield Moved("forward", (N, D), dtype, forward, floor, 1.1)
            yield Moved("backward", (N, D), dtype, lambda x=x, lam=lam, perm=perm: (bwd(x, lam, perm),), floor, 1.1)
