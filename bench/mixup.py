"""mixup with a weight per sample and a random permutation: sizes, inputs, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedtricks.functional
from bench import Call, Function, Moved, Size
from fusedtricks._op import Op


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device).requires_grad_()
    return x, torch.rand(size[0], device=device), torch.randperm(size[0], device=device)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_PLACE, IMAGES = "in place", "uint8 images"


def eager(x: Tensor, lam: Tensor, perm: Tensor, mode: str = "", dtype: torch.dtype | None = None) -> Tensor:
    if mode == IMAGES:
        mean, std = (torch.tensor(v, device=x.device).reshape(1, 3, 1, 1) for v in (MEAN, STD))
        x = (((x.float() / 255) - mean) / std).to(dtype)
    own = lam.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    if mode == IN_PLACE:  # as timm does
        partner = x[perm].mul_(1 - own)
        return x.mul_(own).add_(partner)
    return own * x + (1 - own) * x[perm]


def ours(x: Tensor, lam: Tensor, perm: Tensor, mode: str = "", dtype: torch.dtype | None = None) -> Tensor:
    options = {IN_PLACE: {"out": x}, IMAGES: {"normalize": (MEAN, STD), "dtype": dtype}}.get(mode, {})
    return fusedtricks.functional.mixup(x, None, lam, perm, **options)[0]


class Mixing(Function):
    """Weights and permutations are no floating inputs."""

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        torch.manual_seed(0)
        x, *rest = self.inputs(size, dtype, device)
        return (x.detach(), *rest) if mode == "forward" else (x, *rest, torch.randn_like(x))


class Mixup(Mixing):
    """Two more modes: in place, and images as they are stored."""

    modes = (*Function.modes, IN_PLACE, IMAGES)

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        if mode == IMAGES:
            return math.prod(size) * (1 + dtype.itemsize)
        return super().bytes("forward" if mode == IN_PLACE else mode, size, dtype)

    def tensors(self, mode: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        if mode not in (IN_PLACE, IMAGES):
            return super().tensors(mode, size, dtype, device)
        x, *rest = super().tensors("forward", size, dtype, device)
        if mode == IMAGES:
            x = torch.randint(256, size, dtype=torch.uint8, device=device)
        return x, *rest, mode, dtype

    def call(self, fn: Callable[..., Tensor], mode: str, tensors: tuple[Any, ...]) -> Call:
        return super().call(fn, "forward" if mode in (IN_PLACE, IMAGES) else mode, tensors)

    def further(self, mode: str) -> dict[str, Callable[..., Tensor]]:
        return {"torch, not in place": lambda x, lam, perm, *_: eager(x, lam, perm)} if mode == IN_PLACE else {}

    def measures(self, mode: str, size: Size, dtype: torch.dtype) -> bool:
        return mode != IMAGES or size[1:2] == (3,)


OPERATION = Mixup(
    stands_in_for="lam x + (1 - lam) x[perm]",
    ours=ours,
    torch=eager,
    inputs=inputs,
    floors=("2ns", "2ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    # images, hidden layers of a small network, rows of a table, cost of a call
    sizes=((64, 3, 224, 224), (256, 4096), (640_000, 10), (4, 16)),
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
