"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2): composed from cross_entropy.

KL(p || s) = sum_c p_c (log p_c - z_c) + lse, with p the teacher's and s the student's distribution at temperature T and
z the student's logits over T. Terms with p_c = 0 are left out by selection, so logits of -inf on either side are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedtricks.ops import _loss
from fusedtricks.ops._norm import accumulate_dtype
from fusedtricks.ops._target import MixedTarget
from fusedtricks.ops.cross_entropy import cross_entropy

SparseTeacher = tuple[Tensor, Tensor]


def _negative_entropy(log_p: Tensor) -> Tensor:
    """sum p log p over the last dimension."""
    p = log_p.exp()
    return torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)


def _kl_dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    wide = accumulate_dtype(student.dtype)
    dim = 1 if student.dim() > 1 else 0
    log_p = torch.log_softmax(teacher.to(wide) / temperature, dim)
    cross = cross_entropy(student, log_p.exp(), reduction="none", temperature=temperature, out_dtype=wide)
    return cross + _negative_entropy(log_p.movedim(dim, -1))


def _kl_sparse(student: Tensor, indices: Tensor, values: Tensor, temperature: float) -> Tensor:
    wide = accumulate_dtype(student.dtype)
    log_p = torch.log_softmax(values.to(wide) / temperature, -1)
    p = log_p.exp()
    # The label is any class: it is the log-sum-exp that is wanted.
    _, lse = cross_entropy(student, indices[:, 0], reduction="none", temperature=temperature, return_lse=True)
    z = student.gather(1, indices).to(wide) / temperature
    return lse - torch.where(p > 0, p * torch.where(p > 0, z, 0.0), 0.0).sum(1) + _negative_entropy(log_p)


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
        teacher_logits: the same shape; or, for a student (N, C), a pair (indices (N, k) int64, values (N, k)): the k
            classes a sparse teacher knows, all others having the logit -inf.
        target: labels, class probabilities or a :class:`fusedtricks.MixedTarget`, as :func:`cross_entropy` takes them;
            without one the loss is alpha T^2 KL alone.
        temperature: T, in KL alone. T^2 keeps the size of the gradient when T changes.
        alpha: the share of the teacher.
        weight, ignore_index, label_smoothing: those of the cross-entropy with the target; KL counts every sample.
        reduction: "mean" (KL: over samples), "sum" or "none", of either term.

    Returns:
        The loss in the student's dtype, () or one number a sample. Differentiable in both logits.

    Raises:
        RuntimeError: teacher and student of different shapes. ValueError: a temperature that is not positive.
    """
    _loss.check_positive("distillation_loss", temperature=temperature)
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if isinstance(teacher_logits, Tensor):
        if teacher_logits.shape != student_logits.shape:
            raise RuntimeError(
                f"distillation_loss: expected teacher_logits of the student's shape {list(student_logits.shape)}, got "
                f"{list(teacher_logits.shape)}"
            )
        kl = _kl_dense(student_logits, teacher_logits, temperature)
    else:
        indices, values = teacher_logits
        rows = student_logits.shape[:1]
        if (
            student_logits.dim() != 2
            or indices.dim() != 2
            or indices.shape != values.shape
            or indices.shape[:1] != rows
        ):
            raise RuntimeError(
                "distillation_loss: a sparse teacher needs a student (N, C), indices (N, k) and values (N, k), got "
                f"{list(student_logits.shape)}, {list(indices.shape)} and {list(values.shape)}"
            )
        kl = _kl_sparse(student_logits, indices.long(), values, temperature)
    kl = kl.mean() if reduction == "mean" else kl.sum() if reduction == "sum" else kl
    loss = alpha * temperature**2 * kl
    if target is not None:
        loss = loss + (1 - alpha) * cross_entropy(
            student_logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            out_dtype=kl.dtype,
        )
    return loss.to(_loss.output_dtype(student_logits, None))


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
