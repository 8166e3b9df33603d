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
    N, arithmetic = x.shape[0], torch.float64 if x.dtype == torch.float64 else torch.float32
    if perm.shape != (N,) or perm.dtype != torch.int64:
        raise RuntimeError(
            f"{name}: expected perm to be a permutation of the {N} samples, int64 of shape ({N},), but got "
            f"{perm.dtype} of shape {tuple(perm.shape)}"
        )
    if not isinstance(lam, Tensor):
        if not 0 <= lam <= 1:
            raise ValueError(f"{name}: expected lam in [0, 1], but got {lam}")
        lam = torch.full((), lam, dtype=arithmetic, device=x.device)
    if (lam.dim() > 0 and lam.shape != (N,)) or not lam.is_floating_point():
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
    return lam.to(arithmetic)


def uniform(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """In [0, 1), on the device of `like`. torch.compile takes no dynamic shape beside a generator, not even None."""
    given = {} if generator is None else {"generator": generator}
    return torch.rand(shape, dtype=dtype, device=like.device, **given)


def check_values(name: str, lam: Tensor | None, perm: Tensor) -> None:
    """What CPU kernels check; on other devices it would take a host sync."""
    if perm.device.type != "cpu" or is_fake(perm):
        return
    N = perm.numel()
    if not torch.equal(perm.sort().values, torch.arange(N)):
        raise RuntimeError(f"{name}: perm is not a permutation of 0 to {N - 1}")
    if lam is not None:
        check_lam(name, lam)


def check_lam(name: str, lam: Tensor) -> None:
    low, high = (v.item() for v in lam.aminmax()) if lam.numel() else (0.0, 1.0)  # NaN if one is
    if not (low >= 0 and high <= 1):
        raise RuntimeError(f"{name}: expected lam in [0, 1], but got {high if low >= 0 else low}")


def per_sample(lam: Tensor, x: Tensor) -> Tensor:
    """lam shaped to broadcast over the samples of x."""
    return lam.reshape(-1, *(1,) * (x.dim() - 1))


def inverse(perm: Tensor) -> Tensor:
    return torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=perm.device))


def unmixed(target: Tensor | None, x: Tensor) -> Any:
    """The target of a batch that is left as it is."""
    if target is None or target.is_floating_point():
        return target
    return MixedTarget(target, target, torch.ones((), dtype=torch.float32, device=x.device))


def check_in_place(name: str, x: Tensor) -> None:
    """What torch refuses, before anything is written."""
    if x.requires_grad and torch.is_grad_enabled():
        base = x._base if not torch.compiler.is_compiling() and x._is_view() else x
        if base is not None and base.is_leaf and base.requires_grad:
            kind = "leaf Variable" if base is x else "view of a leaf Variable"
            raise RuntimeError(f"a {kind} that requires grad is being used in an in-place operation.")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise RuntimeError(
            f"{name}: unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )


class Mixing(torch.nn.Module):
    """What the modules Mixup and CutMix share: when and with whom a batch is mixed."""

    PARTNERS = ("random", "flip", "same_class")

    def __init__(
        self, alpha: float, per_sample: bool, fold: bool, prob: float, partner: str, generator: torch.Generator | None
    ):
        super().__init__()
        if not 0 < alpha < float("inf"):
            raise ValueError(f"{type(self).__name__}: expected a finite alpha > 0, but got {alpha}")
        if not 0 <= prob <= 1:
            raise ValueError(f"{type(self).__name__}: expected prob in [0, 1], but got {prob}")
        if partner not in self.PARTNERS:
            raise ValueError(
                f"{type(self).__name__}: expected partner to be one of {', '.join(self.PARTNERS)}, but got {partner!r}"
            )
        self.alpha, self.per_sample, self.fold, self.prob, self.partner = alpha, per_sample, fold, prob, partner
        self.generator = generator
        self.warmup = 0

    def set_warmup(self, batches: int) -> None:
        """Leave the next `batches` batches of training plain: their lam is 1."""
        self.warmup = batches

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, per_sample={self.per_sample}, fold={self.fold}, prob={self.prob}, "
            f"partner={self.partner!r}"
        )

    def plain(self) -> bool:
        """Is this batch one of the warm-up? Counts it."""
        self.warmup, plain = max(self.warmup - 1, 0), self.warmup > 0
        return plain

    def draw_lam(self, x: Tensor, alpha: float) -> Tensor:
        """lam ~ Beta(alpha, alpha), fp32, drawn on the device of x: () or (N,)."""
        shape = (x.shape[0],) if self.per_sample else ()
        concentration = torch.full((*shape, 2), alpha, dtype=torch.float32, device=x.device)
        lam = torch._sample_dirichlet(concentration, generator=self.generator)[..., 0].clamp(0, 1)
        if self.fold:
            lam = torch.maximum(lam, 1 - lam)
        if self.prob < 1:
            mixes = uniform(shape, x, self.generator) < self.prob
            lam = torch.where(mixes, lam, 1.0)
        return lam

    def draw_perm(self, x: Tensor, target: Any) -> Tensor:
        N = x.shape[0]
        if self.partner == "flip":
            return torch.arange(N, device=x.device).flip(0)
        if self.partner == "random":
            return torch.randperm(N, device=x.device, generator=self.generator)
        if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (N,):
            raise RuntimeError(f"{type(self).__name__}: partners of the same class need class indices of shape ({N},)")
        return same_class(target, self.generator)

    def draw_once(self, prob: float) -> bool:
        """True with probability `prob`, decided on the host by its own generator, so without a sync."""
        host = self.generator if self.generator is not None and self.generator.device.type == "cpu" else None
        return bool(torch.rand((), dtype=torch.float32, generator=host) < prob)


def same_class(target: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A permutation that gives each sample a random one of its class, never itself where the class has two."""
    N = target.shape[0]
    shuffled = torch.randperm(N, device=target.device, generator=generator)
    order = shuffled[torch.argsort(target[shuffled], stable=True)]
    labels = target[order].contiguous()
    first, end = torch.searchsorted(labels, labels), torch.searchsorted(labels, labels, right=True)
    following = torch.arange(1, N + 1, device=target.device)
    following = torch.where(following < end, following, first)
    return torch.empty_like(order).scatter_(0, order, order[following])


def each(x: Any, mix: Callable[[Tensor], Tensor]) -> Any:
    """`mix` of a tensor, or of every tensor of a tuple or list."""
    return type(x)(mix(t) for t in x) if isinstance(x, (tuple, list)) else mix(x)
