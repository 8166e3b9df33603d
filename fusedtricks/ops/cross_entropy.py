"""Cross-entropy for hard, smoothed, mixed and soft targets.

Every target is a vector q of coefficients, one per class, and with z = scale * cap(logits), lse = log sum exp(z):

    loss = sum_c q_c (lse - z_c) + z_loss share lse^2
    d loss / d z_c = (Q + 2 z_loss share lse) softmax(z)_c - q_c,   Q = sum_c q_c

A pair of labels (a, b, lam), whose special case (y, y, 1) is the hard target, has
q_c = sum over the halves h that are not ignored of  m_h w_c (on [c = y_h] + off),  m = (lam, 1 - lam); class
probabilities t have q_c = w_c (on t_c + off). (on, off) is label smoothing, see `_loss.smoothing`. `share` is the sum
of the m_h that are kept, and 1 for probabilities. "mean" divides by the sum over rows of m_h w[y_h], for probabilities
by the number of rows.

Everything is computed from z - max(z), so the error does not grow with a shift of the logits. Terms with q_c = 0 are
left out by selection, so a logit of -inf costs nothing unless the target asks for it, and rows whose halves are all
ignored are inert whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, apply, differentiating, leaf, readable, seen, transforming
from fusedtricks.ops import _loss
from fusedtricks.ops._loss import Options, Target
from fusedtricks.ops._norm import FLOATS, accumulate_dtype, laid_out_like
from fusedtricks.ops._target import MixedTarget

# logits (*, C), any strides, R rows in logical order. target: labels (*), any of int64, int32, uint8, or probabilities
# (*, C). other, lam: the second label and the mixing weight of pairs; lam is () or (*). weight (C,) and lam are fp32
# (fp64 for fp64), as are all results but dlogits. reduction: 0 none, 1 mean, 2 sum.
_INPUTS = "Tensor target, Tensor? other, Tensor? lam, Tensor? weight"
_OPTIONS = "int ignore_index, float on, float off, float z_loss, float softcap, float scale, int reduction"
# loss: () or (*). stats (3, R): max(z), sum exp(z - max), Q. total (): what "mean" divides by. dlogits: the gradient of
# a scalar loss if need_dlogits, with the strides of empty_like(logits). rank (1 or 2, R) int32 if need_rank: how many
# classes come before the label, ties in order of the classes; C where ignored. What is not wanted is empty.
cross_entropy_fwd = Op(
    f"cross_entropy_fwd(Tensor logits, {_INPUTS}, {_OPTIONS}, bool need_dlogits, bool need_rank) "
    "-> (Tensor loss, Tensor stats, Tensor total, Tensor dlogits, Tensor rank)",
    stem="cross_entropy",
)
# dlse (*): the gradient of lse, if it was returned.
cross_entropy_bwd = Op(
    f"cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor logits, {_INPUTS}, Tensor stats, Tensor total, {_OPTIONS}) "
    "-> Tensor dlogits",
    stem="cross_entropy",
)
# The same into the memory of the logits.
cross_entropy_bwd_ = Op(
    f"cross_entropy_bwd_(Tensor dloss, Tensor? dlse, Tensor(a!) logits, {_INPUTS}, Tensor stats, Tensor total, "
    f"{_OPTIONS}) -> ()",
    stem="cross_entropy",
)


# ---- reference ------------------------------------------------------------------------------------------------------


def scaled(logits: Tensor, o: Options) -> Tensor:
    """z, in the accumulation dtype."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if o.softcap:
        z = o.softcap * torch.tanh(z / o.softcap)
    return z if o.scale == 1.0 else z * o.scale


def halves(target: Target, weight: Tensor | None, classes: int, ignore_index: int, dtype: torch.dtype) -> list[tuple]:
    """(label, kept, m, m w[label]) of each half. A label that is no class has the label 0 and a weight of NaN."""
    first, other, lam = target
    pairs = [(first, 1.0 if lam is None else lam)]
    if other is not None:
        pairs.append((other, 1.0 - lam))
    found = []
    for labels, m in pairs:
        labels = labels.long()
        kept, inside = labels != ignore_index, (labels >= 0) & (labels < classes)
        safe = torch.where(kept & inside, labels, 0)
        m = torch.where(kept, m, 0.0).to(dtype)
        # An index of no dimensions would be read on the host, which vmap refuses.
        mass = m if weight is None else torch.where(kept, m * weight[safe.reshape(-1)].reshape(safe.shape), 0.0)
        found.append((safe, kept, m, torch.where(kept & ~inside, torch.nan, mass)))
    return found


def coefficients(logits: Tensor, target: Target, weight: Tensor | None, o: Options) -> tuple[Tensor, ...]:
    """q (*, C); the mass of each row in "mean"; its share; whether it is dead, that is ignored altogether."""
    dtype, classes = accumulate_dtype(logits.dtype), logits.shape[-1]
    if target.first.is_floating_point():
        q = o.on * target.first.to(dtype) + o.off
        ones = logits.new_ones(logits.shape[:-1], dtype=dtype)
        return q if weight is None else q * weight, ones, ones, torch.zeros_like(ones, dtype=torch.bool)
    parts = halves(target, weight, classes, o.ignore_index, dtype)
    share = sum(m for _, _, m, _ in parts)
    q = (o.off * share).unsqueeze(-1).expand(logits.shape)
    if weight is not None and o.off:
        q = torch.where(weight != 0, q * weight, 0.0)
    for label, _, _, mass in parts:
        q = q.scatter_add(-1, label.unsqueeze(-1), (o.on * mass).unsqueeze(-1))
    alive = [kept & (m != 0) for _, kept, m, _ in parts]
    return q, sum(mass for *_, mass in parts), share, ~(alive[0] | alive[-1])


def top_and_sum(z: Tensor) -> tuple[Tensor, Tensor]:
    """max(z) and sum exp(z - max)."""
    top = z.detach().amax(-1)
    return top, (z - top.unsqueeze(-1)).exp().sum(-1)


def log_sum_exp(stats: Tensor) -> Tensor:
    return stats[0] + stats[1].log()


def losses(logits: Tensor, target: Target, weight: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """The loss of each row and its mass, in differentiable operations."""
    q, mass, share, dead = coefficients(logits, target, weight, o)
    z = scaled(logits.masked_fill(dead.unsqueeze(-1), 0.0), o)
    top, total = top_and_sum(z)
    logsum = total.log()
    centred = z - top.unsqueeze(-1)
    inner = torch.where((q != 0) | (centred > -torch.inf), q * centred, 0.0).sum(-1)
    loss = q.sum(-1) * logsum - inner
    return (loss + o.z_loss * share * (top + logsum).square() if o.z_loss else loss), mass


def reduced(loss: Tensor, mass: Tensor, o: Options) -> Tensor:
    return loss if o.reduction == 0 else loss.sum() / mass.sum() if o.reduction == 1 else loss.sum()


def ranks(logits: Tensor, target: Target, o: Options) -> Tensor:
    found, classes = [], logits.shape[-1]
    for label, kept, _, _ in halves(target, None, classes, o.ignore_index, torch.float32):
        mine = logits.gather(-1, label.unsqueeze(-1))
        before = torch.arange(classes, device=logits.device) < label.unsqueeze(-1)
        rank = ((logits > mine) | ((logits == mine) & before)).sum(-1)
        found.append(torch.where(kept & ~mine.squeeze(-1).isnan(), rank, classes).flatten())
    return torch.stack(found).int()


def check_labels(target: Target, classes: int, ignore_index: int) -> None:
    """On a CPU a label out of range is an IndexError; on a GPU, without a sync, its loss and gradient are NaN."""
    for labels in (target.first, target.other):
        if labels is None or labels.is_floating_point() or not seen(labels):
            continue
        wrong = ((labels != ignore_index) & ((labels < 0) | (labels >= classes))).flatten().nonzero()
        if len(wrong):
            row = wrong[0].item()
            raise IndexError(
                f"Target {labels.flatten()[row].item()} is out of bounds: row {row}, expected 0 to {classes - 1} or "
                f"ignore_index {ignore_index}"
            )


@cross_entropy_fwd.reference
def _(
    logits: Tensor, target: Tensor, other: Tensor | None, lam: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, need_dlogits, need_rank = rest
    o, t = Options(*options), Target(target, other, lam)
    check_labels(t, logits.shape[-1], o.ignore_index)
    loss, mass = losses(logits, t, weight, o)
    total, loss = mass.sum(), reduced(loss, mass, o)
    q = coefficients(logits, t, weight, o)[0].sum(-1)
    stats = torch.stack((*top_and_sum(scaled(logits, o)), q)).reshape(3, mass.numel())
    dlogits, rank = logits.new_empty(0), logits.new_empty(0, dtype=torch.int32)
    if need_dlogits:
        dlogits = gradient(torch.ones_like(loss), None, logits, t, weight, stats, total, o)
    if need_rank:
        rank = ranks(logits, t, o)
    return loss, stats, total, dlogits, rank


def gradient(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Target,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    o: Options,
) -> Tensor:
    q, _, share, dead = coefficients(logits, target, weight, o)
    top, normalizer, total_q = stats.reshape(3, *logits.shape[:-1])
    softmax = (scaled(logits, o) - top.unsqueeze(-1)).exp() / normalizer.unsqueeze(-1)
    g = (dloss / total if o.reduction == 1 else dloss).expand(share.shape)
    dz = (g * (total_q + 2 * o.z_loss * share * (top + normalizer.log()))).unsqueeze(-1) * softmax - g.unsqueeze(-1) * q
    dz = dz.masked_fill(dead.unsqueeze(-1), 0.0)
    if dlse is not None:
        dz = dz + dlse.unsqueeze(-1) * softmax
    if o.softcap:
        dz = dz * (1 - torch.tanh(logits.to(dz.dtype) / o.softcap).square())
    return laid_out_like((dz * o.scale).to(logits.dtype), logits)


@cross_entropy_bwd.reference
def _(dloss: Tensor, dlse: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    target, other, lam, weight, stats, total, *options = rest
    return gradient(dloss, dlse, logits, Target(target, other, lam), weight, stats, total, Options(*options))


@cross_entropy_bwd_.reference
def _(dloss: Tensor, dlse: Tensor | None, logits: Tensor, *rest: Any) -> None:
    target, other, lam, weight, stats, total, *options = rest
    logits.copy_(gradient(dloss, dlse, logits, Target(target, other, lam), weight, stats, total, Options(*options)))


# ---- autograd -------------------------------------------------------------------------------------------------------


def target_gradient(
    dloss: Tensor,
    logits: Tensor,
    t: Target,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    loss: Tensor | None,
    o: Options,
) -> Tensor:
    """d loss / d probabilities (*, C), or d loss / d lam, () or (*), which needs `loss`."""
    top, normalizer, _ = stats.reshape(3, *logits.shape[:-1])
    logsum = normalizer.log()
    z = scaled(logits, o) - top.unsqueeze(-1)
    g = dloss / total if o.reduction == 1 else dloss
    if t.first.is_floating_point():
        slope = o.on * (logsum.unsqueeze(-1) - z)
        slope = slope if weight is None else slope * weight
        asked = (o.on * t.first.to(z.dtype) + o.off != 0) | (z > -torch.inf)
        g = g if g.dim() == 0 else g.unsqueeze(-1)
        return torch.where(asked, g * slope, 0.0).to(t.first.dtype)
    row = o.z_loss * (top + logsum).square()
    if o.off:
        w = torch.ones_like(z[..., :1]) if weight is None else weight
        row = row + o.off * (w * (logsum.unsqueeze(-1) - z)).sum(-1)
    slopes = []
    one_each = Target(t.first, t.other, torch.full_like(t.lam, 0.5))
    for label, kept, _, half in halves(one_each, weight, logits.shape[-1], o.ignore_index, z.dtype):
        w = 2 * half
        here = row + o.on * w * (logsum - z.gather(-1, label.unsqueeze(-1)).squeeze(-1))
        here = here - loss * w if o.reduction == 1 else here
        slopes.append(torch.where(kept, here, 0.0))
    return (g * (slopes[0] - slopes[1])).sum_to_size(t.lam.shape)


class _CrossEntropy(torch.autograd.Function):
    """(loss, lse or None, rank or None). `early`: the gradient is made in the forward, in one pass over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        other: Tensor | None,
        lam: Tensor | None,
        weight: Tensor | None,
        o: Options,
        early: bool,
        inplace: bool,
        need_lse: bool,
        need_rank: bool,
    ) -> Any:
        loss, stats, total, dlogits, rank = cross_entropy_fwd(logits, target, other, lam, weight, *o, early, need_rank)
        lse = log_sum_exp(stats).reshape(logits.shape[:-1]) if need_lse else None
        # Of the caller, who may write to it (`loss /= steps`): what the gradient of lam needs of it is a copy.
        kept = loss.clone() if lam is not None and lam.requires_grad else None
        ctx.save_for_backward(logits, target, other, lam, weight, stats, total, kept)
        ctx.o, ctx.early, ctx.inplace, ctx.used = o, early, inplace, False
        ctx.dlogits = dlogits if early else None
        ctx.set_materialize_grads(False)
        if need_rank:
            ctx.mark_non_differentiable(rank)
        return loss, lse, rank if need_rank else None

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError(
                "cross_entropy: a second backward through inplace_backward=True: the first one overwrote the logits"
            )
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets nobody ask again
        logits, target, other, lam, weight, stats, total, loss = saved
        o, need = ctx.o, ctx.needs_input_grad
        if dloss is None and dlse is None:
            return (None,) * 10
        if differentiating():
            return _composed_backward(ctx, saved, dloss, dlse)
        if dloss is None:
            dloss = total.new_zeros(logits.shape[:-1] if o.reduction == 0 else ())
        dlogits = dtarget = dlam = None
        if need[1] or need[3]:
            made = target_gradient(dloss, logits, Target(target, other, lam), weight, stats, total, loss, o)
            dtarget, dlam = (made, None) if need[1] else (None, made)
        args = (target, other, lam, weight, stats, total, *o)
        if need[0] and ctx.early:
            # Handed out once, so that it can become .grad without a copy. A further backward makes it again: same bits.
            made, ctx.dlogits = ctx.dlogits, None
            dlogits = cross_entropy_bwd(torch.ones_like(dloss), None, logits, *args) if made is None else made
            if not readable(dloss):
                dlogits = dlogits * dloss
            elif dloss != 1:
                dlogits.mul_(dloss)
        elif need[0]:
            if ctx.inplace:
                ctx.used = True
                cross_entropy_bwd_(dloss, dlse, logits, *args)
                torch.autograd.graph.increment_version(logits)
                dlogits = logits.detach()
            else:
                dlogits = cross_entropy_bwd(dloss, dlse, logits, *args)
        return dlogits, dtarget, None, dlam, *(None,) * 6


def _composed(logits: Tensor, t: Target, weight: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """Loss and lse in plain PyTorch, differentiable any number of times and by every transform."""
    loss, mass = losses(logits, t, weight, o)
    return reduced(loss, mass, o), log_sum_exp(torch.stack(top_and_sum(scaled(logits, o))))


def _composed_backward(
    ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, other, lam, weight, *_ = saved
    inputs = [logits, target, other, lam]
    wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
    # Fresh nodes: what the gradients depend on are the saved tensors, not the graph behind them.
    inputs = [t.view_as(t) if i in wanted else t for i, t in enumerate(inputs)]
    outputs = _composed(inputs[0], Target(*inputs[1:]), weight, ctx.o)
    outputs = [(y, d) for y, d in zip(outputs, (dloss, dlse), strict=True) if d is not None]
    ys, ds = zip(*outputs, strict=True)
    grads = torch.autograd.grad(ys, [inputs[i] for i in wanted], ds, create_graph=True, allow_unused=True)
    found: list[Tensor | None] = [None] * 10
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = grad
    return tuple(found)


# ---- public ---------------------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor | MixedTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    smoothing_mode: str = "uniform",
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_lse: bool = False,
    topk: Sequence[int] = (),
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
) -> Any:
    """Drop-in for :func:`torch.nn.functional.cross_entropy` that also takes pairs of labels.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), float32, bfloat16, float16 or float64, in any memory layout.
        target: class labels (), (N) or (N, d1, ...) of int64, int32 or uint8; or class probabilities of the input's
            shape; or a :class:`fusedtricks.MixedTarget` (a, b, lam): the loss of a sample is then
            lam CE(a) + (1 - lam) CE(b), at the cost of one hard label.
        weight: (C), a factor for each class.
        size_average, reduce: deprecated in torch, and understood as torch does.
        ignore_index: samples of this label (of a pair: this half) count for nothing, whatever their logits hold.
        reduction: "none", "mean" or "sum". "mean" divides by the sum of weight[label] over what is not ignored, of
            pairs lam weight[a] + (1 - lam) weight[b]; for probabilities by the number of samples.
        label_smoothing: eps in [0, 1].
        smoothing_mode: "uniform" (torch): eps / C over all classes. "others": eps / (C - 1) over the other classes,
            1 - eps on the true one. "lecture": eps / C over the other classes, 1 - eps on the true one.
        z_loss: adds z_loss * lse^2 to the loss of each sample (de Brebisson and Vincent 2016; PaLM, section 5).
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).
        temperature: then they are divided by this.
        return_lse: also return the log-sum-exp of each sample, differentiable, fp32 (fp64 for fp64).
        topk: also return, for each k given, how many samples have their label among the k largest logits: (len(topk),)
            int64, for pairs weighted by lam and so fp32 or fp64.
        out_dtype: dtype of the loss; by default torch's: the input's own, or the wider of it and of probabilities.
            Arithmetic is fp32 (fp64 for fp64) anyway.
        inplace_backward: backward writes the gradient over the logits, saving a tensor of their size. Nobody else may
            need them then: their version is bumped, so that autograd notices, and a second backward raises.
            Has no effect under torch.compile, with `create_graph=True`, or on logits whose elements share memory.

    Returns:
        The loss, () or of the labels' shape; with return_lse or topk a tuple (loss[, lse][, correct]).

    Raises:
        IndexError: a label that is no class, on the CPU. On a GPU, which is not waited for, and where labels are mapped
            over by vmap, such a sample's loss and gradient are NaN.
        ValueError, RuntimeError, TypeError: torch's own for shapes and dtypes that do not fit.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if not isinstance(input, Tensor):
        raise TypeError(f"cross_entropy(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dtype not in FLOATS:
        kind = str(input.dtype).removeprefix("torch.")
        raise NotImplementedError(f'"cross_entropy" not implemented for {kind}; expected a floating dtype')
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    _loss.check_positive("cross_entropy", softcap=softcap, temperature=temperature)
    if isinstance(target, MixedTarget):
        if input.dim() == 0:
            raise RuntimeError("cross_entropy: expected logits of at least one dimension, got none")
        t = _loss.mixed("cross_entropy", input, target)
    elif not isinstance(target, Tensor):
        kind = type(target).__name__
        raise TypeError(f"cross_entropy(): argument 'target' must be Tensor or MixedTarget, not {kind}")
    else:
        torchs = lambda: torch.nn.functional.cross_entropy(  # noqa: E731
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        t = _loss.labels_or_probabilities("cross_entropy", input, target, torchs, ignore_index)
    classes = input.shape[1 if input.dim() > 1 else 0]
    if classes == 0:
        raise IndexError("cross_entropy: expected at least one class, got an input of shape " + str(list(input.shape)))
    if topk and t.first.is_floating_point():
        raise ValueError("cross_entropy: topk needs labels, got class probabilities")
    weight = _loss.check_weight("cross_entropy", weight, classes, input.device)
    if weight is not None:
        weight = weight.to(accumulate_dtype(input.dtype))
    on, off = _loss.smoothing(smoothing_mode, label_smoothing, classes)
    o = Options(ignore_index, on, off, z_loss, softcap or 0.0, 1.0 / temperature, _loss.REDUCTIONS[reduction])
    loss, lse, correct = _run(_loss.class_last(input), t, weight, o, return_lse, tuple(topk), inplace_backward)
    loss = loss.to(_loss.output_dtype(input, out_dtype, t.first))
    if not return_lse and not topk:
        return loss
    return tuple(x for x in (loss, lse, correct) if x is not None)


def _run(
    logits: Tensor, t: Target, weight: Tensor | None, o: Options, need_lse: bool, topk: tuple[int, ...], inplace: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    compiling = torch.compiler.is_compiling()
    if transforming() or (weight is not None and weight.requires_grad and torch.is_grad_enabled()):
        check_labels(t, logits.shape[-1], o.ignore_index)
        loss, lse = _composed(logits, t, weight, o)
        rank = ranks(logits, t, o) if topk else None
        return loss, lse if need_lse else None, _correct(rank, t, topk)
    graded = torch.is_grad_enabled() and (
        logits.requires_grad or t.first.requires_grad or (t.lam is not None and t.lam.requires_grad)
    )
    if graded:
        inplace = inplace and not compiling and logits.requires_grad and not _overlapping(logits)
        early = (
            not (compiling or inplace or need_lse) and logits.requires_grad and o.reduction != 0 and _one_pass(logits)
        )
        loss, lse, rank = apply(_CrossEntropy, logits, *t, weight, o, early, inplace, need_lse, bool(topk))
    else:
        loss, stats, _, _, rank = cross_entropy_fwd(logits, *t, weight, *o, False, bool(topk))
        lse = log_sum_exp(stats).reshape(logits.shape[:-1]) if need_lse else None
    return loss, lse, _correct(rank, t, topk)


def _overlapping(t: Tensor) -> bool:
    """May two elements be one in memory, as after expand? True also of some strange strides where none are."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _one_pass(logits: Tensor) -> bool:
    """Is the gradient best made with the loss? On the CPU a row is still in the caches then. An fp16 gradient waits for
    the loss scale, without which it could underflow. On GPUs the scaling would cost what the second pass does."""
    return logits.device.type == "cpu" and logits.dtype != torch.float16


def _correct(rank: Tensor | None, t: Target, topk: tuple[int, ...]) -> Tensor | None:
    if not topk:
        return None
    hits = [rank < k for k in topk]
    if t.lam is None:
        return torch.stack([h.sum() for h in hits])
    lam = t.lam.detach().expand(t.first.shape).flatten()
    return torch.stack([(torch.where(h[0], lam, 0) + torch.where(h[1], 1 - lam, 0)).sum() for h in hits])


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss`; the keyword-only extras are those of :func:`cross_entropy`."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        smoothing_mode: str = "uniform",
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        return_lse: bool = False,
        topk: Sequence[int] = (),
        out_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.smoothing_mode, self.z_loss, self.softcap, self.temperature = smoothing_mode, z_loss, softcap, temperature
        self.return_lse, self.topk, self.out_dtype = return_lse, tuple(topk), out_dtype
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor | MixedTarget) -> Any:
        if isinstance(input, Proxy):
            return leaf(self, input, target)
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            smoothing_mode=self.smoothing_mode,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            return_lse=self.return_lse,
            topk=self.topk,
            out_dtype=self.out_dtype,
            inplace_backward=self.inplace_backward,
        )
