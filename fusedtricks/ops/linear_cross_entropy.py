"""Linear layer and cross-entropy in one, without the (N, C) logits: a few rows at a time.

Of a scalar loss the gradients are known up to one factor, so they are made in the forward, chunk by chunk, and are what
backward keeps. Where that factor is not one number (reduction "none"), where it matters before the rounding (the loss
scale of fp16) and for gradients of the target, backward makes the logits of each chunk once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedtricks._op import apply, differentiating, transforming
from fusedtricks.ops import _loss
from fusedtricks.ops import cross_entropy as ce
from fusedtricks.ops._loss import Options, Target
from fusedtricks.ops._norm import FLOATS, accumulate_dtype
from fusedtricks.ops._target import MixedTarget
from fusedtricks.ops.cross_entropy import cross_entropy_bwd_, cross_entropy_fwd

CHUNK_BYTES = 32 << 20  # of logits


def rows_at_once(rows: int, classes: int, itemsize: int, given: int | None) -> int:
    return max(1, min(rows, given or CHUNK_BYTES // max(1, classes * itemsize)))


def chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, rows, size))


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
    """Those of a chunk, in the memory that every chunk has in turn."""
    out = memory[: x.shape[0]]
    return torch.addmm(bias, x, weight.t(), out=out) if bias is not None else torch.mm(x, weight.t(), out=out)


def part(t: Target, rows: slice) -> Target:
    first, other, lam = t
    return Target(
        first[rows], None if other is None else other[rows], lam if lam is None or lam.dim() == 0 else lam[rows]
    )


class _Gradients:
    """Those of x, weight and bias. Sums over chunks are kept wide, and rounded once."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, need: tuple[bool, ...]):
        wide = accumulate_dtype(x.dtype)
        self.dx = torch.empty_like(x) if need[0] else None
        self.dweight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        self.dbias = torch.zeros_like(bias, dtype=wide) if need[2] else None

    def add(self, dlogits: Tensor, x: Tensor, weight: Tensor, rows: slice) -> None:
        if self.dx is not None:
            torch.mm(dlogits, weight, out=self.dx[rows])
        if self.dweight is not None and self.dweight.dtype == x.dtype:
            self.dweight.addmm_(dlogits.t(), x[rows])
        elif self.dweight is not None:
            self.dweight += dlogits.t() @ x[rows]
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.dx, self.dweight, self.dbias))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, other: Tensor | None,
        lam: Tensor | None, class_weight: Tensor | None, o: Options, chunk: int, need: tuple[bool, ...],
    ) -> Tensor:  # fmt: skip
        wide, target, rows = accumulate_dtype(x.dtype), Target(first, other, lam), x.shape[0]
        ctx.o, ctx.chunk, ctx.need = o, chunk, need
        ctx.again = any(need[3:]) or (any(need) and (o.reduction == 0 or x.dtype == torch.float16))
        early = any(need) and not ctx.again
        # Of each chunk the sum is taken; "mean" divides by the masses of all chunks.
        of_chunk = o._replace(reduction=0 if o.reduction == 0 else 2)
        one = torch.ones((), dtype=wide, device=x.device)
        total = torch.zeros((), dtype=wide, device=x.device)
        grads = _Gradients(x, weight, bias, need[:3] if early else (False,) * 3)
        losses, stats, memory = [], [], x.new_empty(min(chunk, rows), weight.shape[0])
        for here in chunks(rows, chunk):
            logits, t = logits_of(x[here], weight, bias, memory), part(target, here)
            loss, stat, mass, *_ = cross_entropy_fwd(logits, *t, class_weight, *of_chunk, False, False)
            losses.append(loss)
            total = total + mass
            if ctx.again:
                stats.append(stat)
            if early:
                cross_entropy_bwd_(one, None, logits, *t, class_weight, stat, mass, *of_chunk)
                grads.add(logits, x, weight, here)
        if o.reduction == 0:
            loss = torch.cat(losses) if losses else x.new_empty(0, dtype=wide)
        else:
            loss = torch.stack(losses).sum() if losses else x.new_zeros((), dtype=wide)
            loss = loss / total if o.reduction == 1 else loss
        kept = loss.clone() if need[4] else None  # as in cross_entropy
        ctx.save_for_backward(
            x, weight, bias, *target, class_weight, total, kept, *grads, *(stats if ctx.again else ())
        )
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets nobody ask again
        if differentiating():
            return _composed_backward(ctx, saved, dloss)
        x, weight, bias, *target, class_weight, total, loss, dx, dweight, dbias = saved[:12]
        found: list[Tensor | None] = [None] * 10
        if ctx.again:
            found[:6] = _made_again(ctx, dloss, x, weight, bias, Target(*target), class_weight, total, loss, saved[12:])
            return tuple(found)
        factor = of_rows = dloss
        if ctx.o.reduction == 1:
            factor = of_rows = torch.where(total == 0, 0.0, dloss / total)  # nothing was kept
            if class_weight is not None and not target[0].is_floating_point():
                # Or what was kept weighs nothing, which is 0 / 0.
                kept = _kept(Target(*target), weight.shape[0], ctx.o)
                factor = torch.where((total == 0) & kept.any(), torch.nan, factor)
                of_rows = torch.where(kept.unsqueeze(-1), factor, 0.0)
        for i, (made, by, like) in enumerate(
            zip((dx, dweight, dbias), (of_rows, factor, factor), (x, weight, bias), strict=True)
        ):
            found[i] = None if made is None else (made * by).to(like.dtype)
        return tuple(found)


def _kept(target: Target, classes: int, o: Options) -> Tensor:
    """Which rows are not ignored altogether."""
    alive = [kept & (m != 0) for _, kept, m, _ in ce.halves(target, None, classes, o.ignore_index, torch.float32)]
    return alive[0] | alive[-1]


def _made_again(
    ctx: Any, dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Target,
    class_weight: Tensor | None, total: Tensor, loss: Tensor | None, stats_of: tuple[Tensor, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, weight, bias, class probabilities, nothing, and lam, from logits made once more."""
    o, need = ctx.o, ctx.need
    grads, of_target = _Gradients(x, weight, bias, need[:3]), []
    memory = x.new_empty(min(ctx.chunk, x.shape[0]), weight.shape[0])
    for stats, here in zip(stats_of, chunks(x.shape[0], ctx.chunk), strict=True):
        logits, t = logits_of(x[here], weight, bias, memory), part(target, here)
        d, row = (v if v is None or o.reduction != 0 else v[here] for v in (dloss, loss))
        if any(need[3:]):
            of_target.append(ce.target_gradient(d, logits, t, class_weight, stats, total, row, o))
        if any(need[:3]):
            cross_entropy_bwd_(d.contiguous(), None, logits, *t, class_weight, stats, total, *o)
            grads.add(logits, x, weight, here)
    made = [None if g is None else g.to(x.dtype) for g in grads]
    dtarget = dlam = None
    if need[3]:
        dtarget = torch.cat(of_target) if of_target else torch.zeros_like(target.first)
    elif need[4]:
        one = target.lam.dim() == 0
        dlam = sum(of_target, torch.zeros_like(target.lam)) if one else torch.cat([*of_target, target.lam[:0]])
    return [*made, dtarget, None, dlam]


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, t: Target, class_weight: Tensor | None, o: Options
) -> Tensor:
    """In plain PyTorch, with all logits: differentiable any number of times and by every transform."""
    return ce.reduced(*ce.losses(torch.nn.functional.linear(x, weight, bias), t, class_weight, o), o)


def _composed_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(saved[:6])
    wanted = [i for i in range(6) if ctx.needs_input_grad[i]]
    # Fresh nodes: what the gradients depend on are the saved tensors, not the graph behind them.
    inputs = [t.view_as(t) if i in wanted else t for i, t in enumerate(inputs)]
    loss = _composed(*inputs[:3], Target(*inputs[3:]), saved[6], ctx.o)
    found: list[Tensor | None] = [None] * 10
    grads = torch.autograd.grad(loss, [inputs[i] for i in wanted], dloss, create_graph=True)
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = grad
    return tuple(found)


# ---- public ---------------------------------------------------------------------------------------------------------


def _autocast(t: Any) -> Any:
    """As torch's linear takes it: under autocast in its dtype, but for float64."""
    if not isinstance(t, Tensor) or t.dtype not in FLOATS - {torch.float64} or not _loss.autocasting(t.device.type):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _check(x: Any, weight: Any, bias: Any, reduction: str, label_smoothing: float, chunk: Any) -> None:
    op = "linear_cross_entropy"
    for name, given in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(given, Tensor) and not (name == "bias" and given is None):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(given).__name__}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"{op}: expected x (*, D) and weight (C, D), got {list(x.shape)} and {list(weight.shape)}")
    classes = weight.shape[0]
    if classes == 0:
        raise IndexError(f"{op}: expected at least one class, got a weight of shape {list(weight.shape)}")
    if bias is not None and bias.shape != (classes,):
        raise RuntimeError(f"{op}: expected bias of shape [{classes}], got {list(bias.shape)}")
    given = [t for t in (x, weight, bias) if t is not None]
    if len({t.dtype for t in given}) > 1 or not {t.dtype for t in given} <= FLOATS:
        kinds = ", ".join(str(t.dtype).removeprefix("torch.") for t in given)
        raise RuntimeError(f"{op}: expected x, weight and bias of one floating dtype, got {kinds}")
    if len({t.device for t in given}) > 1:
        places = ", ".join(str(t.device) for t in given)
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device, got x, weight, bias on {places}")
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"{op}: chunk must be a positive number of rows, got {chunk!r}")


def _flat_target(x: Tensor, classes: int, target: Any, ignore_index: int) -> Target:
    """The target of the rows of x, checked."""
    op, lead = "linear_cross_entropy", x.shape[:-1]
    if isinstance(target, MixedTarget):
        a, b, lam = target
        for name, labels in (("a", a), ("b", b)):
            if isinstance(labels, Tensor) and labels.shape != lead:
                raise ValueError(f"{op}: MixedTarget.{name} must have shape {list(lead)}, got {list(labels.shape)}")
        # As cross_entropy sees it: classes second, which costs no memory.
        like = x[..., :1].expand(*lead, classes)
        t = _loss.mixed(op, like.movedim(-1, 1) if len(lead) > 1 else like, MixedTarget(a, b, lam))
        return Target(*(v.reshape(-1) if v.dim() or not lead else v for v in t))
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}(): argument 'target' must be Tensor or MixedTarget, not {type(target).__name__}")
    if target.device != x.device:
        raise RuntimeError(
            f"{op}: Expected all tensors to be on the same device, but got x on {x.device}, target on {target.device}"
        )
    if target.dtype in FLOATS and target.shape == (*lead, classes):
        if ignore_index >= 0:
            raise RuntimeError(f"{op}: ignore_index is not supported for class probabilities, got {ignore_index}")
        return Target(target.reshape(-1, classes), None, None)
    if target.dtype not in _loss.LABELS or target.shape != lead:
        raise RuntimeError(
            f"{op}: expected labels of shape {list(lead)} and dtype int64, int32 or uint8, or class probabilities of "
            f"shape {[*lead, classes]}, got shape {list(target.shape)} and dtype {target.dtype}"
        )
    return Target(target.reshape(-1), None, None)


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
        x: (*, D) features. weight: (C, D). bias: (C) or none. All of one floating dtype, as under autocast any but
            float64 become.
        target: labels (*), class probabilities (*, C), or a :class:`fusedtricks.MixedTarget` of labels (*).
        class_weight: (C), the `weight` of :func:`cross_entropy`; the other arguments are those of it as well.
        reduction: "none", "mean" or "sum". "none" makes the logits twice, as do fp16 and a gradient of the target.
        chunk: rows at once; by default as many as 32 MiB of logits hold.

    Returns:
        The loss, () or (*) for "none", in the accumulation dtype: fp32 (fp64 for fp64). Differentiable in x, weight,
        bias, class probabilities and lam. Second derivatives and torch.func transforms work, and need all logits.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. IndexError: a label that is no class, on the CPU.
        ValueError: a reduction or a chunk that is none. NotImplementedError: class_weight that requires grad.
    """
    x, weight, bias = (_autocast(t) for t in (x, weight, bias))
    _check(x, weight, bias, reduction, label_smoothing, chunk)
    _loss.check_positive("linear_cross_entropy", softcap=softcap, temperature=temperature)
    kind, classes, autocast = x.device.type, weight.shape[0], contextlib.nullcontext()
    if _loss.autocasting(kind):
        autocast = torch.autocast(kind, enabled=False)  # chunks are written into memory of that dtype
    t = _flat_target(x, classes, target, ignore_index)
    class_weight = _loss.check_weight("linear_cross_entropy", class_weight, classes, x.device)
    if class_weight is not None:
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("linear_cross_entropy has no gradient to class_weight; use cross_entropy")
        class_weight = class_weight.to(accumulate_dtype(x.dtype))
    on, off = _loss.smoothing(smoothing_mode, label_smoothing, classes)
    o = Options(ignore_index, on, off, z_loss, softcap or 0.0, 1 / temperature, _loss.REDUCTIONS[reduction])
    flat = x.reshape(-1, x.shape[-1])
    with autocast:
        ce.check_labels(t, classes, ignore_index)  # chunks would name the row they see
        if transforming():
            loss = _composed(flat, weight, bias, t, class_weight, o)
        else:
            chunk = rows_at_once(flat.shape[0], classes, x.element_size(), chunk)
            need = tuple(
                torch.is_grad_enabled() and v is not None and v.requires_grad
                for v in (flat, weight, bias, t.first, t.lam)
            )
            loss = apply(_LinearCrossEntropy, flat, weight, bias, *t, class_weight, o, chunk, need)
    return loss.reshape(x.shape[:-1]) if o.reduction == 0 else loss
