"""Linear layer and cross-entropy in one, without the (N, C) logits: a few rows at a time.

The gradients of x, weight and bias are made in the forward, chunk by chunk, from the operators of cross_entropy: of a
scalar loss they are known up to one factor. What backward keeps is therefore the gradients themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import differentiating, transforming
from fusedtricks.ops import _loss
from fusedtricks.ops._loss import Options, Target
from fusedtricks.ops._norm import FLOATS, accumulate_dtype
from fusedtricks.ops._target import MixedTarget
from fusedtricks.ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, halves

CHUNK_BYTES = 32 << 20  # of logits


def rows_at_once(rows: int, classes: int, itemsize: int, given: int | None) -> int:
    return max(1, min(rows, given or CHUNK_BYTES // max(1, classes * itemsize)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor | None, lam: Tensor | None,
        class_weight: Tensor | None, o: Options, chunk: int, need: tuple[bool, ...],
    ) -> Tensor:  # fmt: skip
        wide = accumulate_dtype(x.dtype)
        target = Target(a, b, lam)
        total = sum(m for *_, m in halves(target, class_weight, weight.shape[0], o.ignore_index, wide)).sum()
        # Of each chunk the sum is taken; "mean" divides by the masses of all chunks.
        o_chunk, one = o._replace(reduction=0 if o.reduction == 0 else 2), torch.ones((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if need[0] else None
        # Sums over chunks are kept wide, and rounded once.
        dweight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        dbias = torch.zeros_like(bias, dtype=wide) if need[2] else None
        losses = []
        for first in range(0, x.shape[0], chunk):
            rows = slice(first, first + chunk)
            logits = torch.addmm(bias, x[rows], weight.t()) if bias is not None else x[rows] @ weight.t()
            here = (a[rows], None if b is None else b[rows], lam if lam is None or lam.dim() == 0 else lam[rows])
            loss, stats, mass, *_ = cross_entropy_fwd(logits, *here, class_weight, *o_chunk, False, False)
            losses.append(loss)
            if not any(need):
                continue
            dlogits = cross_entropy_bwd(one, None, logits, *here, class_weight, stats, mass, *o_chunk)
            if dx is not None:
                torch.mm(dlogits, weight, out=dx[rows])
            if dweight is not None:
                dweight += dlogits.t() @ x[rows]
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=wide)
        ctx.o, ctx.need = o, need
        made = (dx, dweight, dbias)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        ctx.save_for_backward(*made, total)
        if o.reduction == 0:
            return torch.cat(losses) if losses else x.new_empty(0, dtype=wide)
        loss = torch.stack(losses).sum() if losses else x.new_zeros((), dtype=wide)
        return loss / total if o.reduction == 1 else loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if differentiating():
            raise NotImplementedError(
                "linear_cross_entropy has no second derivatives; use cross_entropy(linear(x, weight, bias), target)"
            )
        *made, total = ctx.saved_tensors
        factor = dloss / total if ctx.o.reduction == 1 else dloss
        if ctx.o.reduction == 1:
            factor = torch.where(total == 0, 0.0, factor)  # nothing was kept
        grads = [g if g is None else (g * factor).to(d) for g, d in zip(made, ctx.dtypes, strict=True)]
        return *grads, *(None,) * 7


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor | MixedTarget,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_mode: str = "uniform",
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), target) without the logits (N, C) ever existing.

    Args:
        x: (*, D) features. weight: (C, D). bias: (C) or none. All of one floating dtype.
        target: labels (*), or a :class:`fusedtricks.MixedTarget` of such labels.
        class_weight: (C), the `weight` of :func:`cross_entropy`; the other arguments are those of it as well.
        reduction: "mean" or "sum".
        chunk: rows at once; by default as many as 32 MiB of logits hold.

    Returns:
        The loss, (), in the accumulation dtype: fp32 (fp64 for fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: a reduction of "none".
    """
    if transforming():
        raise NotImplementedError("linear_cross_entropy does not support torch.func transforms or forward-mode AD")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"linear_cross_entropy: expected x (*, D) and weight (C, D), got {list(x.shape)} and {list(weight.shape)}"
        )
    classes = weight.shape[0]
    if bias is not None and bias.shape != (classes,):
        raise RuntimeError(f"linear_cross_entropy: expected bias of shape [{classes}], got {list(bias.shape)}")
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1 or not dtypes <= FLOATS:
        raise RuntimeError(f"linear_cross_entropy: expected x, weight and bias of one floating dtype, got {dtypes}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    _loss.check_positive("linear_cross_entropy", softcap=softcap, temperature=temperature)
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(target, MixedTarget):
        lam = (
            target.lam.reshape(-1, *(1,) * (target.a.dim() - 1)).expand(target.a.shape)
            if target.lam.dim()
            else target.lam
        )
        flat_target = MixedTarget(target.a.reshape(-1), target.b.reshape(-1), lam.reshape(-1) if lam.dim() else lam)
        t = _loss.mixed("linear_cross_entropy", flat[:, :1].expand(-1, classes), flat_target)
        if t.lam.requires_grad:
            raise NotImplementedError("linear_cross_entropy has no gradient to lam; use cross_entropy")
    else:
        labels = target.reshape(-1)
        if labels.dtype not in _loss.LABELS or labels.shape[0] != flat.shape[0] or labels.device != x.device:
            raise RuntimeError(
                f"linear_cross_entropy: expected labels of shape {list(x.shape[:-1])}, dtype int64, int32 or uint8 on "
                f"{x.device}, got {list(target.shape)}, {target.dtype} on {target.device}"
            )
        t = Target(labels, None, None)
    class_weight = _loss.check_weight("linear_cross_entropy", class_weight, classes, x.device)
    if class_weight is not None:
        class_weight = class_weight.detach().to(accumulate_dtype(x.dtype))
    on, off = _loss.smoothing(smoothing_mode, label_smoothing, classes)
    o = Options(ignore_index, on, off, z_loss, softcap or 0.0, 1 / temperature, _loss.REDUCTIONS[reduction])
    chunk = rows_at_once(flat.shape[0], classes, x.element_size(), chunk)
    graded = torch.is_grad_enabled()
    need = tuple(graded and v is not None and v.requires_grad for v in (flat, weight, bias))
    return _LinearCrossEntropy.apply(flat, weight, bias, *t, class_weight, o, chunk, need)
