"""What mixup and cutmix share: checks of their arguments, the mixed target, and the draw of the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fusedtricks.ops._target import MixedTarget


def check(name: str, x: Tensor, target: Any, lam: Tensor | float, perm: Tensor) -> Tensor:
    """Raise on what cannot be mixed; return lam as a tensor of the arithmetic, on the device of x."""
    if not isinstance(x, Tensor) or not isinstance(perm, Tensor):
        raise TypeError(f"{name}(): x and perm must be Tensors, not {type(x).__name__} and {type(perm).__name__}")
    if x.dim() == 0:
        raise RuntimeError(f"{name}: expected a batch of samples (N, ...), but got a 0-dimensional x")
    N = x.shape[0]
    if perm.shape != (N,) or perm.dtype != torch.int64:
        raise RuntimeError(
            f"{name}: expected perm to be a permutation of the {N} samples, int64 of shape ({N},), but got "
            f"{perm.dtype} of shape {tuple(perm.shape)}"
        )
    if not isinstance(lam, Tensor):
        if not 0 <= lam <= 1:
            raise ValueError(f"{name}: expected lam in [0, 1], but got {lam}")
        lam = torch.full((), lam, dtype=torch.float32, device=x.device)
    if lam.shape not in ((), (N,)) or not lam.is_floating_point():
        raise RuntimeError(
            f"{name}: expected lam to be a number, or floating of shape () or ({N},), but got {lam.dtype} of shape "
            f"{tuple(lam.shape)}"
        )
    for label, t in (("perm", perm), ("lam", lam), ("target", target)):
        if isinstance(t, Tensor) and t.device != x.device:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but got {label} on {t.device} and x on "
                f"{x.device}"
            )
    if target is not None and (not isinstance(target, Tensor) or target.dim() == 0 or target.shape[0] != N):
        got = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise RuntimeError(f"{name}: expected a target for each of the {N} samples, but got {got}")
    return lam.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def check_values(name: str, lam: Tensor | None, perm: Tensor) -> None:
    """What CPU kernels check; on other devices it would take a host sync."""
    if perm.device.type != "cpu" or is_fake(perm):
        return
    N = perm.numel()
    if not torch.equal(perm.sort().values, torch.arange(N)):
        raise RuntimeError(f"{name}: perm is not a permutation of 0 to {N - 1}")
    if lam is not None and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise RuntimeError(f"{name}: expected lam in [0, 1]")


def per_sample(lam: Tensor, x: Tensor) -> Tensor:
    """lam shaped to broadcast over the samples of x."""
    return lam.reshape(-1, *(1,) * (x.dim() - 1))


def inverse(perm: Tensor) -> Tensor:
    return torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=perm.device))


def mixed_target(target: Tensor | None, lam: Tensor, perm: Tensor, mix: Callable[[Tensor], Tensor]) -> Any:
    """A MixedTarget of class indices; one-hot and probability targets are mixed themselves."""
    if target is None:
        return None
    if target.is_floating_point():
        return mix(target)
    return MixedTarget(target, target[perm], lam)
