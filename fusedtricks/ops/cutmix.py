"""CutMix (Yun et al. 2019, arXiv:1905.04899) of a batch with a permutation of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import Op, differentiating, seen, transforming
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _mixing, _norm, mixup
from fusedtricks.ops._target import MixedTarget

# box (1, 4) or (N, 4), int64: top, bottom, left, right of each sample's box, bottom and right exclusive, in the last
# two dimensions of x. y[i] is x[perm[i]] inside the box of i and x[i] outside; y has the strides of empty_like(x).
cutmix_fwd = Op("cutmix_fwd(Tensor x, Tensor perm, Tensor box) -> Tensor", stem="cutmix")
# dx[i] is dy[i] outside the box of i, else 0, plus dy[j] inside the box of j, where perm[j] = i.
cutmix_bwd = Op("cutmix_bwd(Tensor dy, Tensor perm, Tensor box) -> Tensor", stem="cutmix")


def inside(x: Tensor, box: Tensor) -> Tensor:
    """(1 or N, 1..., H, W): True inside the box."""
    top, bottom, left, right = (edge.reshape(-1, *(1,) * (x.dim() - 1)) for edge in box.unbind(-1))
    row = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    column = torch.arange(x.shape[-1], device=x.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def cut(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    return torch.where(inside(x, box), x[perm], x)


@cutmix_fwd.reference
def _(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    _mixing.check_values("cutmix_fwd", None, perm)
    return _norm.laid_out_like(cut(x, perm, box), x)


@cutmix_bwd.reference
def _(dy: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    _mixing.check_values("cutmix_bwd", None, perm)
    mask, back = inside(dy, box), _mixing.inverse(perm)
    theirs = mask.expand(dy.shape[0], *mask.shape[1:])[back]
    dx = torch.where(mask, 0, dy) + torch.where(theirs, dy[back], 0)
    return _norm.laid_out_like(dx, dy)


class _CutMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
        ctx.save_for_backward(perm, box)
        y = cutmix_fwd(x, perm, box)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        backward = _CutMixBackward.apply if differentiating() else cutmix_bwd
        dx = backward(dy, *ctx.saved_tensors)
        return _norm.laid_out(dx, ctx.strides), None, None


class _CutMixBackward(torch.autograd.Function):
    """Linear, and the transpose of the forward: its own backward is the forward."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, perm: Tensor, box: Tensor) -> Tensor:
        ctx.save_for_backward(perm, box)
        return cutmix_bwd(dy, perm, box)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return _CutMix.apply(ddx, *ctx.saved_tensors), None, None


_node = pair(_CutMix, cutmix_fwd, cutmix_bwd, laid_out=("x",))


def run(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    if transforming():
        return cut(x, perm, box)
    perm, box = perm.contiguous(), box.contiguous()
    if (y := recorded(_node, x, perm, box)) is not None:
        return y
    return _CutMix.apply(x, perm, box) if torch.is_grad_enabled() and x.requires_grad else cutmix_fwd(x, perm, box)


def draw_box(lam: Tensor, H: int, W: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A box (1 or N, 4) of area (1 - lam) H W around a uniformly drawn centre, clipped; and the lam of its real area.

    Source: Yun et al. 2019, equation 2 and algorithm 1: sides H sqrt(1 - lam) and W sqrt(1 - lam).
    """
    side = (1 - lam.reshape(-1).double()).clamp(0, 1).sqrt()
    centre = _mixing.uniform((2, side.numel()), lam, generator, torch.float64)
    edges = []
    for of, size in zip(centre, (H, W), strict=True):
        middle, half = (of * size).long(), (side * size).long() // 2
        edges += [(middle - half).clamp(0, size), (middle + half).clamp(0, size)]
    top, bottom, left, right = edges
    area = ((bottom - top) * (right - left)).double() / max(H * W, 1)
    return torch.stack(edges, -1), (1 - area).to(torch.float32).reshape(lam.shape)


def cutmix(
    x: Tensor,
    target: Tensor | None,
    lam: Tensor | float,
    perm: Tensor,
    *,
    box: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, MixedTarget | Tensor | None]:
    """Pastes a box of each sample's partner x[perm[i]] into the sample.

    Args:
        x: (N, *, H, W), any dtype and strides. Differentiable where it is floating.
        target: class indices (N, *); one-hot or class probabilities (N, C), floating; or None.
        lam: in [0, 1], the part of a sample that is left to it: a number or a 0-dim tensor (one box for the batch), or
            (N,). The boxes are drawn from it.
        perm: (N,) int64, the partner of each sample.
        box: (4,) or (N, 4) int64, top, bottom, left and right (exclusive), instead of boxes drawn from lam.
        generator: where the centres are drawn, on the device of x.

    Returns:
        (mixed, target) as :func:`mixup` gives them, with lam corrected to the area the clipped box really has.

    Raises:
        RuntimeError: as :func:`mixup`; x of fewer than 3 dimensions; a box of another shape or dtype.
    """
    lam = _mixing.check("cutmix", x, target, lam, perm)
    if x.dim() < 3:
        raise RuntimeError(f"cutmix: expected images (N, *, H, W), but got {x.dim()} dimensions")
    if seen(lam):
        _mixing.check_lam("cutmix", lam)  # no kernel sees it
    box, lam = boxes(x, lam, box, generator)
    return run(x, perm, box), mixup.mix_target(target, lam, perm)


def boxes(x: Tensor, lam: Tensor, box: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(1 or N, 4) boxes inside the image, and the lam of their areas."""
    H, W = x.shape[-2:]
    if box is None:
        return draw_box(lam, H, W, generator)
    fits = box.shape == (4,) or box.shape == (x.shape[0], 4)  # torch.compile finds no dynamic shape in a tuple of them
    if not fits or box.dtype != torch.int64 or box.device != x.device:
        raise RuntimeError(
            f"cutmix: expected box to be int64 of shape (4,) or ({x.shape[0]}, 4) on {x.device}, but got {box.dtype} "
            f"of shape {tuple(box.shape)} on {box.device}"
        )
    clipped = torch.cat((box[..., :2].clamp(0, H), box[..., 2:].clamp(0, W)), -1)
    sides = (clipped[..., 1] - clipped[..., 0]).clamp_min(0), (clipped[..., 3] - clipped[..., 2]).clamp_min(0)
    return clipped.reshape(-1, 4), 1 - (sides[0] * sides[1]).float() / max(H * W, 1)


def mix_all(
    x: Any, target: Tensor | None, lam: Tensor, perm: Tensor, generator: torch.Generator | None
) -> tuple[Any, Any]:
    """Every image of a tuple by the same draw, which the size of the first decides."""
    first = x[0] if isinstance(x, (tuple, list)) else x
    box, lam = boxes(first, lam, None, generator)
    return _mixing.each(x, lambda t: run(t, perm, box)), mixup.mix_target(target, lam, perm)


class CutMix(_mixing.Mixing):
    """Applies :func:`cutmix` to every batch in training: x, target -> mixed, target. Arguments as of `Mixup`."""

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        per_sample: bool = False,
        prob: float = 1.0,
        partner: str = "random",
        generator: torch.Generator | None = None,
    ):
        super().__init__(alpha, per_sample, False, prob, partner, generator)

    def forward(self, x: Any, target: Tensor | None) -> tuple[Any, Any]:
        first = x[0] if isinstance(x, (tuple, list)) else x
        if not self.training or self.plain():
            return x, _mixing.unmixed(target, first)
        perm = self.draw_perm(first, target)
        return mix_all(x, target, self.draw_lam(first, self.alpha), perm, self.generator)
