"""mixup (Zhang, Cisse, Dauphin, Lopez-Paz 2018, arXiv:1710.09412) of a batch with a permutation of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import Op, differentiating, transforming
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _mixing, _norm
from fusedtricks.ops._target import MixedTarget

# y[i] = lam[i] x[i] + (1 - lam[i]) x[perm[i]]. lam has one element or N, fp32 (fp64 for fp64). y has the strides of
# empty_like(x). scale and shift (C,), fp32, are for uint8 x: of channel c, y becomes scale[c] y + shift[c] in `dtype`.
mixup_fwd = Op(
    "mixup_fwd(Tensor x, Tensor lam, Tensor perm, Tensor? scale, Tensor? shift, ScalarType dtype) -> Tensor",
    stem="mixup",
)
mixup_fwd_ = Op("mixup_fwd_(Tensor(a!) x, Tensor lam, Tensor perm) -> ()", stem="mixup")
# dx[i] = lam[i] dy[i] + (1 - lam[j]) dy[j], where perm[j] = i.
mixup_bwd = Op("mixup_bwd(Tensor dy, Tensor lam, Tensor perm) -> Tensor", stem="mixup")


def mix(x: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
    """The formula, in the arithmetic of lam."""
    lam, wide = _mixing.per_sample(lam, x), x.to(lam.dtype)
    return lam * wide + (1 - lam) * wide[perm]


@mixup_fwd.reference
def _(x: Tensor, lam: Tensor, perm: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    _mixing.check_values("mixup_fwd", lam, perm)
    y = mix(x, lam, perm)
    if scale is not None:
        channels = (-1, *(1,) * (x.dim() - 2))
        y = y * scale.reshape(channels) + shift.reshape(channels)
    return _norm.laid_out_like(y.to(dtype), x)


@mixup_fwd_.reference
def _(x: Tensor, lam: Tensor, perm: Tensor) -> None:
    _mixing.check_values("mixup_fwd_", lam, perm)
    x.copy_(mix(x, lam, perm))


@mixup_bwd.reference
def _(dy: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
    _mixing.check_values("mixup_bwd", lam, perm)
    own, wide, back = _mixing.per_sample(lam, dy), dy.to(lam.dtype), _mixing.inverse(perm)
    dx = own * wide + (1 - own.expand(perm.numel(), *own.shape[1:])[back]) * wide[back]
    return _norm.laid_out_like(dx.to(dy.dtype), dy)


class _Mixup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor, perm: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(lam, perm)
        if inplace:
            mixup_fwd_(x, lam, perm)
            ctx.mark_dirty(x)
            ctx.strides = _norm.strides_like(x)
            return x
        y = mixup_fwd(x, lam, perm, None, None, x.dtype)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        backward = _MixupBackward.apply if differentiating() else mixup_bwd
        dx = backward(dy, *ctx.saved_tensors)
        return _norm.laid_out(dx, ctx.strides), None, None, None


class _MixupBackward(torch.autograd.Function):
    """Linear, and the transpose of the forward: its own backward is the forward."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
        ctx.save_for_backward(lam, perm)
        return mixup_bwd(dy, lam, perm)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return _Mixup.apply(ddx, *ctx.saved_tensors, False), None, None


_node = pair(_Mixup, mixup_fwd, mixup_bwd, laid_out=("x",))


def run(x: Tensor, lam: Tensor, perm: Tensor, inplace: bool = False) -> Tensor:
    if transforming():
        y = mix(x, lam, perm).to(x.dtype)
        return x.copy_(y) if inplace else y
    lam, perm = lam.contiguous(), perm.contiguous()
    if not inplace and (y := recorded(_node, x, lam, perm, None, None, x.dtype)) is not None:
        return y
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mixup.apply(x, lam, perm, inplace)
    if not inplace:
        return mixup_fwd(x, lam, perm, None, None, x.dtype)
    mixup_fwd_(x, lam, perm)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)
    return x


def mixup(
    x: Tensor,
    target: Tensor | None,
    lam: Tensor | float,
    perm: Tensor,
    *,
    out: Tensor | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, MixedTarget | Tensor | None]:
    """Mixes each sample with its partner: mixed[i] = lam[i] x[i] + (1 - lam[i]) x[perm[i]].

    Each sample is read once and written once, whatever the permutation. Differentiable in x (hidden-layer mixup).

    Args:
        x: (N, *), float32, bfloat16, float16 or float64, any strides; or uint8 images (N, C, *).
        target: class indices (N, *); one-hot or class probabilities (N, C), floating; or None.
        lam: weights in [0, 1] of a sample itself: a number or a 0-dim tensor for the batch, or (N,).
        perm: (N,) int64, the partner of each sample.
        out: x itself, to mix in place. Safe for every permutation.
        normalize: (mean, std) of each channel, for uint8 x: pixels are divided by 255, then (pixel - mean) / std, as
            torchvision's ToDtype(scale=True) and Normalize do, and mixed, in one pass. Without it they are divided by
            255 alone.
        dtype: of the result, for uint8 x; default float32.

    Returns:
        (mixed, target). mixed has the shape, dtype and memory format of x. target is MixedTarget(target, target[perm],
        lam) for class indices, a mixed (N, C) for probabilities, None for None.

    Raises:
        RuntimeError: perm of another length or dtype; lam of another shape; a target of another length; tensors on
            different devices; on the CPU also a perm that is no permutation and a lam outside [0, 1]. x is then
            untouched. On a GPU these two would need a host sync and are not looked at: a partner outside the batch
            makes its sample NaN, and nothing outside is read.
        ValueError: lam, as a number, outside [0, 1]; normalize or dtype without uint8; an out that is not x.
    """
    lam = _mixing.check("mixup", x, target, lam, perm)
    if x.dtype == torch.uint8:
        if out is not None:
            raise ValueError("mixup: uint8 images cannot be mixed in place, since the result is floating")
        mixed = _mixup_images(x, lam, perm, normalize, dtype or torch.float32)
    else:
        if normalize is not None or dtype is not None:
            raise ValueError(f"mixup: normalize and dtype are for uint8 images, but x is {x.dtype}")
        if x.dtype not in _norm.FLOATS:
            raise RuntimeError(f"mixup: expected x of a floating dtype or uint8, but got {x.dtype}")
        if out is not None and out is not x:
            raise ValueError("mixup: out, where it is given, must be x itself")
        if out is not None:
            _mixing.check_in_place("mixup", x)
        mixed = run(x, lam, perm, inplace=out is not None)
    return mixed, mix_target(target, lam, perm)


def mix_target(target: Tensor | None, lam: Tensor, perm: Tensor) -> MixedTarget | Tensor | None:
    """A MixedTarget of class indices; one-hot and probability targets are mixed themselves."""
    if target is None:
        return None
    if target.is_floating_point():
        return run(target, lam.to(_norm.accumulate_dtype(target.dtype)), perm)
    return MixedTarget(target, target[perm], lam)


def _mixup_images(
    x: Tensor,
    lam: Tensor,
    perm: Tensor,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
    dtype: torch.dtype,
) -> Tensor:
    """255 goes into the scale: with mean m and std s of a channel, pixel v becomes v / (255 s) - m / s."""
    if x.dim() < 2:
        raise RuntimeError(f"mixup: expected uint8 images (N, C, *), but got {x.dim()} dimensions")
    if dtype not in _norm.FLOATS:
        raise ValueError(f"mixup: expected a floating dtype, but got {dtype}")
    C = x.shape[1]
    mean, std = ((0.0,) * C, (1.0,) * C) if normalize is None else normalize
    mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (mean, std))
    if mean.numel() != C or std.numel() != C or not bool((std > 0).all()):
        raise ValueError(
            f"mixup: expected normalize to be the mean and the positive std of {C} channels, but got {mean.tolist()} "
            f"and {std.tolist()}"
        )
    scale, shift = 1 / (255 * std), -mean / std
    scale, shift = (_on_device(v.to(torch.float32), x.device) for v in (scale, shift))
    return mixup_fwd(x, lam.contiguous(), perm.contiguous(), scale, shift, dtype)


def _floating(x: Tensor) -> Tensor:
    """uint8 images in the dtype and range that mixup gives them."""
    return x if x.dtype != torch.uint8 else mixup(x, None, 1.0, torch.arange(x.shape[0], device=x.device))[0]


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Without a sync. A captured graph copies them at every replay, so its pool keeps them."""
    capturing = device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    if capturing and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Mixup(_mixing.Mixing):
    """Mixes every batch in training with a permutation of itself: x, target -> mixed, target. See :func:`mixup`.

    In eval, and in the warm-up that `set_warmup(batches)` asks for, x is returned as it is and the target as
    MixedTarget(target, target, 1), or as it is where it is no class indices. lam ~ Beta(alpha, alpha) and the
    permutation are drawn on the device of x; nothing is copied to the host.

    Args:
        alpha: of the Beta distribution, positive.
        per_sample: a lam for each sample instead of one for the batch.
        fold: lam = max(lam, 1 - lam), so that a sample outweighs its partner.
        prob: with which a batch (or a sample, with per_sample) is mixed at all; else its lam is 1.
        partner: "random", "flip" (sample i with N - 1 - i) or "same_class" (class indices of shape (N,)).
        cutmix_alpha: not None: batches are also given to :func:`cutmix`, with lam ~ Beta(cutmix_alpha, cutmix_alpha).
        switch_prob: with which a batch is, where cutmix_alpha is given. Decided on the host, from torch's CPU generator
            or `generator` if that is on the CPU.
        generator: where everything else is drawn, on the device of x; default: torch's own.

    x may be a tuple or a list of tensors of one batch, which are then mixed by the same draw. uint8 images that are
    mixed become float32 in [0, 1], whether by mixup or by cutmix.

    Source: Zhang et al. 2018, section 2; timm's Mixup for the options.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        per_sample: bool = False,
        fold: bool = False,
        prob: float = 1.0,
        partner: str = "random",
        cutmix_alpha: float | None = None,
        switch_prob: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        super().__init__(alpha, per_sample, fold, prob, partner, generator)
        if cutmix_alpha is not None and not 0 < cutmix_alpha < float("inf"):
            raise ValueError(f"{type(self).__name__}: expected a finite cutmix_alpha > 0, but got {cutmix_alpha}")
        if not 0 <= switch_prob <= 1:
            raise ValueError(f"{type(self).__name__}: expected switch_prob in [0, 1], but got {switch_prob}")
        self.cutmix_alpha, self.switch_prob = cutmix_alpha, switch_prob

    def forward(self, x: Any, target: Tensor | None) -> tuple[Any, Any]:
        first = x[0] if isinstance(x, (tuple, list)) else x
        if not self.training or self.plain():
            return x, _mixing.unmixed(target, first)
        perm = self.draw_perm(first, target)
        if self.cutmix_alpha is not None and self.draw_once(self.switch_prob):
            from fusedtricks.ops import cutmix  # which itself needs mixup, for its targets

            lam = self.draw_lam(first, self.cutmix_alpha)
            mixed, target = cutmix.mix_all(x, target, lam, perm, self.generator)
            return _mixing.each(mixed, _floating), target
        lam = self.draw_lam(first, self.alpha)
        mixed = _mixing.each(x, lambda t: mixup(t, None, lam, perm)[0])
        return mixed, mix_target(target, lam, perm)
