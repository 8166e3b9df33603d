"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2) from the logits of both models.

With u the student's and v the teacher's logits over the temperature T, p = softmax(v) and s = softmax(u),

    KL(p || s) = sum_c p_c (log p_c - log s_c) = sum_c p_c (v_c - u_c) - lse(v) + lse(u)
    loss = alpha T^2 KL + (1 - alpha) CE(student, target)
    d (T^2 KL) / d student_c = T (s_c - p_c)
    d (T^2 KL) / d teacher_c = T p_c (log p_c - log s_c - KL) = T p_c (v_c - u_c - sum_k p_k (v_k - u_k))

and the cross-entropy of labels, pairs of labels and smoothing as in cross_entropy.py. "mean" divides the sum of KL by
the number of samples, that of the cross-entropy by the mass of the labels. Logits are centred by their maximum first.
Terms with p_c = 0 are left out by selection, so logits of -inf on either side are right.

A sparse teacher has k entries (class, value), and its sums run over them: p = softmax(v) of k values, and what an entry
meets of the student is u at its class. Several entries of one class each have a term of their own in KL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from fusedtricks._op import Op, apply, differentiating, readable, seen, transforming
from fusedtricks.ops import _loss
from fusedtricks.ops import cross_entropy as ce
from fusedtricks.ops._loss import Target
from fusedtricks.ops._norm import FLOATS, accumulate_dtype, laid_out_like
from fusedtricks.ops._target import MixedTarget

SparseTeacher = tuple[Tensor, Tensor]

# student, teacher (*, C), any strides and any two floating dtypes, R rows in logical order. With indices, (R, k) of
# int64, int32 or uint8, the student is (R, C) and the teacher (R, k): the values of a sparse one. target, other, lam,
# weight: labels as cross_entropy_fwd takes them, or none at all: alpha T^2 KL alone. lam, weight and all results but
# dstudent are in the accumulation dtype of the student. reduction: 0 none, 1 mean, 2 sum.
_INPUTS = "Tensor student, Tensor teacher, Tensor? indices, Tensor? target, Tensor? other, Tensor? lam, Tensor? weight"
_OPTIONS = "int ignore_index, float on, float off, float temperature, float alpha, int reduction"
# loss: () or (*). stats (7, R): max(student), sum exp(student - max), Q; max(teacher), sum exp((teacher - max) / T),
# sum exp((student - max) / T), KL. total (): what "mean" divides the cross-entropy by. dstudent: the gradient of a
# scalar loss if need_dstudent, with the strides of empty_like(student); else empty.
distillation_fwd = Op(
    f"distillation_fwd({_INPUTS}, {_OPTIONS}, bool need_dstudent) "
    "-> (Tensor loss, Tensor stats, Tensor total, Tensor dstudent)",
    stem="distillation",
)
distillation_bwd = Op(
    f"distillation_bwd(Tensor dloss, {_INPUTS}, Tensor stats, Tensor total, {_OPTIONS}) -> Tensor dstudent",
    stem="distillation",
)


class Options(NamedTuple):
    """The scalars of an operator call. The smoothed target is on * target + off."""

    ignore_index: int
    on: float
    off: float
    temperature: float
    alpha: float
    reduction: int

    @property
    def hard(self) -> _loss.Options:
        """Those of the cross-entropy."""
        return _loss.Options(self.ignore_index, self.on, self.off, 0.0, 0.0, 1.0, self.reduction)


# ---- reference ------------------------------------------------------------------------------------------------------


def over_temperature(logits: Tensor, like: Tensor, temperature: float) -> Tensor:
    return logits.to(accumulate_dtype(like.dtype)) / temperature


class Known(NamedTuple):
    """The classes of a sparse teacher, (R, k) int64, and whether all those of a row are classes, (R, 1). One that is
    not counts as class 0."""

    classes: Tensor
    sound: Tensor

    @staticmethod
    def of(indices: Tensor | None, classes: int) -> Known | None:
        if indices is None:
            return None
        inside = (indices >= 0) & (indices < classes)
        return Known(torch.where(inside, indices, 0).long(), inside.all(-1, keepdim=True))

    def marked(self, student: Tensor) -> Tensor:
        """The student, NaN in rows that are not sound."""
        return torch.where(self.sound, student, torch.nan)


def divergence(student: Tensor, teacher: Tensor, known: Known | None, temperature: float) -> Tensor:
    """KL of each row, in differentiable operations."""
    u, v = (over_temperature(t, student, 1.0) for t in (student, teacher))
    u, v = ((t - t.detach().amax(-1, keepdim=True)) / temperature for t in (u, v))
    e, met = v.exp(), u if known is None else u.gather(-1, known.classes)
    # Selected before the product: the gradient of what is left out is 0 as well.
    difference = torch.where(e > 0, v, 0.0) - torch.where(e > 0, met, 0.0)
    total = e.sum(-1)
    return (e * difference).sum(-1) / total + (u.exp().sum(-1) / total).log()


def composed(
    student: Tensor, teacher: Tensor, indices: Tensor | None, t: Target | None, weight: Tensor | None, o: Options
) -> tuple[Tensor, ...]:
    """(loss, KL of the rows, total) in plain PyTorch, differentiable any number of times and by every transform."""
    known = Known.of(indices, student.shape[-1])
    student = student if known is None else known.marked(student)
    kl = divergence(student, teacher, known, o.temperature)
    loss = o.alpha * o.temperature**2 * (kl.mean() if o.reduction == 1 else kl.sum() if o.reduction == 2 else kl)
    if t is None:
        return loss, kl, kl.new_ones(())
    row, mass = ce.losses(student, t, weight, o.hard)
    if o.alpha != 1:
        loss = loss + (1 - o.alpha) * ce.reduced(row, mass, o.hard)
    return loss, kl, mass.sum()


def statistics(
    student: Tensor, teacher: Tensor, indices: Tensor | None, t: Target | None, weight: Tensor | None, o: Options
) -> Tensor:
    """The first six rows of stats."""
    if indices is not None:
        student = Known.of(indices, student.shape[-1]).marked(student)
    z, v = (over_temperature(logits, student, 1.0) for logits in (student, teacher))
    top, total = ce.top_and_sum(z)
    q = torch.zeros_like(top) if t is None else ce.coefficients(student, t, weight, o.hard)[0].sum(-1)
    of_teacher, of_student = (ce.top_and_sum(logits / o.temperature)[1] for logits in (v, z))
    # What is NaN of a teacher is NaN in the whole row, also where the teacher does not know the class.
    of_student = torch.where(of_teacher.isnan(), torch.nan, of_student)
    return torch.stack((top, total, q, v.amax(-1), of_teacher, of_student))


def check_indices(indices: Tensor, classes: int) -> None:
    """As `check_labels`: an IndexError on a CPU; on a GPU, without a sync, loss and gradient of the row are NaN."""
    if not seen(indices):
        return
    wrong = ((indices < 0) | (indices >= classes)).nonzero()
    if len(wrong):
        row, at = wrong[0].tolist()
        raise IndexError(
            f"Index {indices[row, at].item()} of the teacher is out of bounds: row {row}, expected 0 to {classes - 1}"
        )


@distillation_fwd.reference
def _(student: Tensor, teacher: Tensor, indices: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    target, other, lam, weight, *options, need_dstudent = rest
    o, t = Options(*options), None if target is None else Target(target, other, lam)
    if t is not None:
        ce.check_labels(t, student.shape[-1], o.ignore_index)
    if indices is not None:
        check_indices(indices, student.shape[-1])
    args = (student, teacher, indices, t, weight)
    loss, kl, total = composed(*args, o)
    stats = torch.cat((statistics(*args, o), kl.unsqueeze(0))).reshape(7, kl.numel())
    dstudent = gradient(torch.ones_like(loss), *args, stats, total, o) if need_dstudent else student.new_empty(0)
    return loss, stats, total, dstudent


def gradient(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    t: Target | None,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    o: Options,
) -> Tensor:
    top, _, _, teacher_top, teacher_sum, student_sum, _ = stats.reshape(7, *student.shape[:-1], 1)
    s, p = (
        (over_temperature(logits, student, 1.0) - at).div(o.temperature).exp() / normalizer
        for logits, at, normalizer in ((student, top, student_sum), (teacher, teacher_top, teacher_sum))
    )
    known = Known.of(indices, student.shape[-1])
    dz = of_rows(dloss, stats, o) * (s - p if known is None else s.scatter_add(-1, known.classes, -p))
    if t is not None and o.alpha != 1:
        g = dloss * (1 - o.alpha)
        dz = dz + ce.gradient(g, None, student.to(dz.dtype), t, weight, stats[:3], total, o.hard)
    return laid_out_like(dz.to(student.dtype), student)


def of_rows(dloss: Tensor, stats: Tensor, o: Options) -> Tensor:
    """alpha T dloss, for each row (*, 1) or for all: what the gradients of T KL are multiplied by."""
    factor = o.alpha * o.temperature / (max(stats.shape[1], 1) if o.reduction == 1 else 1)
    return dloss.unsqueeze(-1) * factor if o.reduction == 0 else dloss * factor


@distillation_bwd.reference
def _(dloss: Tensor, student: Tensor, teacher: Tensor, indices: Tensor | None, *rest: Any) -> Tensor:
    target, other, lam, weight, stats, total, *options = rest
    t = None if target is None else Target(target, other, lam)
    return gradient(dloss, student, teacher, indices, t, weight, stats, total, Options(*options))


# ---- autograd -------------------------------------------------------------------------------------------------------


@library.custom_op("fusedtricks::distillation_bwd_teacher", mutates_args=())
def teacher_gradient(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    stats: Tensor,
    temperature: float,
    alpha: float,
    reduction: int,
) -> Tensor:
    """Rarely asked for, so no kernel makes it. Opaque to torch.compile, whose bits are then those of eager mode."""
    top, _, _, teacher_top, teacher_sum, *_ = stats.reshape(7, *student.shape[:-1], 1)
    if indices is not None:
        known = Known.of(indices, student.shape[-1])
        student = known.marked(student.gather(-1, known.classes))
    u = (over_temperature(student, student, 1.0) - top) / temperature
    v = (over_temperature(teacher, student, 1.0) - teacher_top) / temperature
    p = v.exp() / teacher_sum
    difference = torch.where(p > 0, v, 0.0) - torch.where(p > 0, u, 0.0)
    g = of_rows(dloss, stats, Options(0, 0.0, 0.0, temperature, alpha, reduction))
    made = g * p * (difference - (p * difference).sum(-1, keepdim=True))
    return laid_out_like(made.to(teacher.dtype), teacher)


@teacher_gradient.register_fake
def _(dloss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(teacher)


class _Distillation(torch.autograd.Function):
    """`early`: the student's gradient is made in the forward, in one pass over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        indices: Tensor | None,
        target: Tensor | None,
        other: Tensor | None,
        lam: Tensor | None,
        weight: Tensor | None,
        o: Options,
        early: bool,
    ) -> Tensor:
        given = (student, teacher, indices, target, other, lam, weight)
        loss, stats, total, dstudent = distillation_fwd(*given, *o, early)
        ctx.save_for_backward(*given, stats, total)
        ctx.o, ctx.early, ctx.dstudent = o, early, dstudent if early else None
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets nobody ask again
        student, teacher, indices, *labels, stats, total = saved
        o, need = ctx.o, ctx.needs_input_grad
        if differentiating():
            return _composed_backward(ctx, saved, dloss)
        dteacher = teacher_gradient(dloss, student, teacher, indices, stats, *o[3:]) if need[1] else None
        dstudent = None
        args = (student, teacher, indices, *labels, stats, total, *o)
        if need[0] and ctx.early:
            # Handed out once, so that it can become .grad without a copy. A further backward makes it again: same bits.
            made, ctx.dstudent = ctx.dstudent, None
            dstudent = distillation_bwd(torch.ones_like(dloss), *args) if made is None else made
            if not readable(dloss):
                dstudent = dstudent * dloss
            elif dloss != 1:
                dstudent.mul_(dloss)
        elif need[0]:
            dstudent = distillation_bwd(dloss, *args)
        return dstudent, dteacher, *(None,) * 7


def _composed_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, indices, target, other, lam, weight, *_ = saved
    # Fresh nodes: what the gradients depend on are the saved tensors, not the graph behind them.
    inputs = [t.view_as(t) for t in (student, teacher)]
    wanted = [i for i in range(2) if ctx.needs_input_grad[i]]
    t = None if target is None else Target(target, other, lam)
    loss = composed(*inputs, indices, t, weight, ctx.o)[0]
    found: list[Tensor | None] = [None] * 9
    for i, grad in zip(
        wanted, torch.autograd.grad(loss, [inputs[i] for i in wanted], dloss, create_graph=True), strict=True
    ):
        found[i] = grad
    return tuple(found)


# ---- public ---------------------------------------------------------------------------------------------------------


def _run(
    student: Tensor, teacher: Tensor, indices: Tensor | None, t: Target | None, weight: Tensor | None, o: Options
) -> Tensor:
    if transforming():
        if t is not None:
            ce.check_labels(t, student.shape[-1], o.ignore_index)
        if indices is not None:
            check_indices(indices, student.shape[-1])
        return composed(student, teacher, indices, t, weight, o)[0]
    given = (student, teacher, indices, *(t or (None, None, None)), weight)
    if not (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)):
        return distillation_fwd(*given, *o, False)[0]
    early = not torch.compiler.is_compiling() and student.requires_grad and o.reduction != 0 and ce._one_pass(student)
    return apply(_Distillation, *given, o, early)


def _check(student: Any, teacher: Any, temperature: float, reduction: str, label_smoothing: float) -> None:
    if not isinstance(student, Tensor):
        raise TypeError(f"distillation_loss(): argument 'student_logits' must be Tensor, not {type(student).__name__}")
    _loss.check_positive("distillation_loss", temperature=temperature)
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if isinstance(teacher, Tensor):
        if teacher.shape != student.shape or student.dim() == 0:
            raise RuntimeError(
                f"distillation_loss: expected teacher_logits of the student's shape {list(student.shape)}, at least "
                f"(C), got {list(teacher.shape)}"
            )
        given = (student, teacher)
    else:
        pair = isinstance(teacher, tuple | list) and len(teacher) == 2
        if not pair or not all(isinstance(t, Tensor) for t in teacher):
            raise TypeError(
                "distillation_loss(): argument 'teacher_logits' must be Tensor or a pair of them (indices, values), "
                f"not {type(teacher).__name__}"
            )
        indices, values = teacher
        if indices.device != student.device:
            raise RuntimeError(
                "distillation_loss: Expected all tensors to be on the same device, but got student_logits on "
                f"{student.device} and the indices of a sparse teacher on {indices.device}"
            )
        if (
            student.dim() != 2
            or indices.dim() != 2
            or indices.shape != values.shape
            or indices.shape[0] != student.shape[0]
            or indices.shape[1] == 0
            or indices.dtype not in _loss.LABELS
        ):
            raise RuntimeError(
                "distillation_loss: a sparse teacher needs a student (N, C), indices (N, k) of int64, int32 or uint8 "
                f"and values (N, k), k > 0, got {list(student.shape)}, {list(indices.shape)} of {indices.dtype} and "
                f"{list(values.shape)}"
            )
        given = (student, values)
    for logits in given:
        if logits.dtype not in FLOATS:
            kind = str(logits.dtype).removeprefix("torch.")
            raise NotImplementedError(f'"distillation_loss" not implemented for {kind}; expected a floating dtype')
        if logits.device != student.device:
            raise RuntimeError(
                "distillation_loss: Expected all tensors to be on the same device, but got student_logits on "
                f"{student.device} and teacher_logits on {logits.device}"
            )
    if student.shape[1 if student.dim() > 1 else 0] == 0:
        raise IndexError(f"distillation_loss: expected at least one class, got a student of {list(student.shape)}")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    target: Tensor | MixedTarget | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(student, target).

    Args:
        student_logits: (C), (N, C) or (N, C, d1, ...), floating.
        teacher_logits: the same shape, any floating dtype; or, for a student (N, C), a pair (indices (N, k) of int64,
            int32 or uint8, values (N, k)): the k classes a sparse teacher knows, all others having the logit -inf.
            Classes that a row names more than once get the sum of these probabilities.
        target: labels, class probabilities or a :class:`fusedtricks.MixedTarget`, as :func:`cross_entropy` takes them;
            without one the loss is alpha T^2 KL alone. With labels and pairs of them both terms are made in one pass
            over the logits, of a sparse teacher too; class probabilities, and a lam that requires grad, are a pass of
            their own.
        temperature: T, in KL alone. T^2 keeps the size of the gradient when T changes.
        alpha: the share of the teacher. A term whose share is 0 is left out, whatever its logits hold.
        weight, ignore_index, label_smoothing: those of the cross-entropy with the target; KL counts every sample.
        reduction: "mean" (KL: over samples), "sum" or "none", of either term.

    Returns:
        The loss in the student's dtype, () or one number a sample. Differentiable in both logits.

    Raises:
        RuntimeError: teacher and student of different shapes or devices. ValueError: a temperature that is not
        positive. IndexError: an index of a sparse teacher that is no class, on the CPU; on a GPU, which is not waited
        for, the loss and the gradient of that sample are NaN. Of the target: what :func:`cross_entropy` raises.
    """
    op = "distillation_loss"
    _check(student_logits, teacher_logits, temperature, reduction, label_smoothing)
    student = student_logits
    indices, teacher = (None, teacher_logits) if isinstance(teacher_logits, Tensor) else teacher_logits
    wide, classes = accumulate_dtype(student.dtype), student.shape[1 if student.dim() > 1 else 0]
    on, off = _loss.smoothing("uniform", label_smoothing, classes)
    o = Options(ignore_index, on, off, temperature, alpha, _loss.REDUCTIONS[reduction])
    t = None
    if alpha != 0 and not (weight is not None and weight.requires_grad and torch.is_grad_enabled()):
        if isinstance(target, MixedTarget):
            t = _loss.mixed(op, student, target)
        elif isinstance(target, Tensor) and target.shape != student.shape:
            call_torch = lambda: torch.nn.functional.cross_entropy(student, target, weight)  # noqa: E731
            t = _loss.labels_or_probabilities(op, student, target, call_torch, ignore_index)
        t = None if t is not None and t.lam is not None and t.lam.requires_grad and torch.is_grad_enabled() else t
    if alpha == 0:
        # Nothing of the teacher, whose gradient is zeros and not missing.
        loss = sum(t[:0].sum(dtype=wide) for t in (student, teacher))
        if reduction == "none":
            loss = loss + loss.new_zeros(_loss.class_last(student).shape[:-1])
    else:
        checked = None if t is None else _loss.check_weight(op, weight, classes, student.device)
        weights = None if checked is None else checked.to(wide)
        loss = _run(_loss.class_last(student), _loss.class_last(teacher), indices, t, weights, o)
    if target is not None and t is None:
        hard = ce.cross_entropy(
            student,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            out_dtype=wide,
        )
        loss = loss if alpha == 1 else loss + (1 - alpha) * hard
    return loss.to(_loss.output_dtype(student, None))


class DistillationLoss(torch.nn.Module):
    """Module of :func:`distillation_loss`."""

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.5,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature, self.alpha, self.ignore_index = temperature, alpha, ignore_index
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.register_buffer("weight", weight)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTeacher,
        target: Tensor | MixedTarget | None = None,
    ) -> Tensor:
        return distillation_loss(
            student_logits,
            teacher_logits,
            target,
            self.temperature,
            self.alpha,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}"
