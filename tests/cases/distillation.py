"""Distillation with labels and pairs; the rest is in tests/test_distillation.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedtricks
from cases import Adversary, Case, Shape
from cases._norm import randn
from cases.cross_entropy import torchs as cross_entropy
from fusedtricks import MixedTarget


def torchs(
    student: Tensor, teacher: Any, target: Any = None, temperature: float = 1.0, alpha: float = 0.5, **options: Any
) -> Tensor:
    """The definition in torch's operations."""
    indices, teacher = (None, teacher) if isinstance(teacher, Tensor) else teacher
    student = student.to(torch.promote_types(student.dtype, teacher.dtype))
    dim = 1 if student.dim() > 1 else 0
    log_p, log_s = ((t / temperature).log_softmax(dim) for t in (teacher, student))
    log_s = log_s if indices is None else log_s.gather(1, indices.long())
    # F.kl_div of logarithms is NaN where a class of probability 0 has a logit of -inf.
    kept = log_p > -torch.inf
    kl = (log_p.exp() * (torch.where(kept, log_p, 0.0) - torch.where(kept, log_s, 0.0))).sum(dim)
    reduction = options.get("reduction", "mean")
    loss = alpha * temperature**2 * (kl.mean() if reduction == "mean" else kl.sum() if reduction == "sum" else kl)
    return loss if target is None else loss + (1 - alpha) * cross_entropy(student, target, **options)


def known(kind: str) -> int:
    """How many classes a sparse teacher knows: "sparse 5"."""
    _, sparse, count = kind.partition("sparse ")
    return int(count.split()[0]) if sparse else 0


def inputs(size: tuple[int, ...], kind: str) -> tuple[Tensor, ...]:
    classes = size[1] if len(size) > 1 else size[0]
    a, b = (torch.randint(classes, (*size[:1], *size[2:]) if len(size) > 1 else ()) for _ in range(2))
    if "ignored" in kind and a.numel():
        a.view(-1)[::3], b.view(-1)[::4] = -100, -100
    return 2 * randn(*size), 2 * randn(*((size[0], known(kind)) if known(kind) else size)), a, b


def call(fn: Any, t: Any, kind: str, weighted: bool = False, **options: Any) -> Any:
    student, teacher, a, b = t
    if known(kind):
        # The label of a sample is among its classes, and one of them comes twice.
        steps = torch.arange(known(kind), device=a.device) // 2 * 3 + torch.arange(known(kind), device=a.device) % 2
        steps[-1] = steps[0]
        teacher = (((a.clamp(min=0)[:, None] + steps) % student.shape[1]).int(), teacher)
    options = {"reduction": "none", "temperature": 2.0, **options}
    if weighted:
        classes = student.shape[1] if student.dim() > 1 else student.shape[0]
        options["weight"] = torch.linspace(0.5, 2, classes, dtype=student.dtype, device=student.device)
    if "pair" not in kind:
        return fn(student, teacher, None if kind == "none" else a, **options)
    lam = ((a + 2 * b) % 7).double() / 7
    lam = lam.flatten(1).sum(1) % 1 if lam.dim() > 1 else lam
    return fn(student, teacher, MixedTarget(a, b, lam), **options)


SHAPES: dict[str, Shape] = {
    "one element": ((1, 1), "hard"),
    "one dimension": ((40,), "hard"),
    **{f"C={c} as a tile": ((70, c), "pair ignored") for c in (2, 16)},
    **{f"C={c} around a register": ((5, c), "pair") for c in (31, 32, 33)},
    "C=1000": ((3, 1000), "hard"),
    "C=1001, no vector, no target": ((3, 1001), "none"),
    "C=4099 blocks and a rest": ((2, 4099), "pair ignored"),
    "C=20000 longer than a block": ((2, 20000), "hard"),
    "rows past a block of rows": ((257, 33), "pair ignored"),
    "no rows": ((0, 8), "pair"),
    "image": ((2, 5, 9, 8), "pair ignored"),
    "volume": ((2, 3, 2, 3, 4), "hard"),
    **{f"sparse teacher, C={c}": ((70, c), "pair ignored sparse 3") for c in (2, 16)},
    "sparse teacher, C=1001": ((5, 1001), "pair ignored sparse 64"),
    "sparse teacher of all classes": ((3, 33), "none sparse 40"),
    "sparse teacher, C=20000": ((2, 20000), "hard sparse 100"),
    "sparse teacher, rows past a block of rows": ((257, 33), "hard sparse 5"),
}


def shifted(by: float) -> Adversary:
    """Both models, each by its own; the rounding of the shifted logits is part of the input."""

    def change(student: Tensor, teacher: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return student.float().add(by).double(), teacher.float().sub(by).double(), *rest

    return Adversary(((6, 257), "pair"), change, dtypes=(torch.float32,))


def confident(student: Tensor, teacher: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    far = torch.full_like(student[:, :1], 40.0)
    return student.scatter_add(1, a[:, None], far), teacher.scatter_add(1, a[:, None], far), a, b


def masked(keep: int) -> Adversary:
    """All but one block of both rows is -inf, and of the teacher's some more; the label is where both are finite."""

    def change(student: Tensor, teacher: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        at = torch.arange(student.shape[1])
        student = torch.where(at // 512 == keep, student, -torch.inf)
        return student, torch.where((at // 512 == keep) & (at % 3 != 1), teacher, -torch.inf), a, b

    def labels(student: Tensor, teacher: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return *change(student, teacher, a, b)[:2], a % 512 + 512 * keep, b % 512 + 512 * keep

    return Adversary(((3, 1536), "pair"), labels)


CASE = Case(
    fn=fusedtricks.functional.distillation_loss,
    torch_fn=torchs,
    names=("student", "teacher", "a", "b"),
    fixed=("a", "b"),
    inputs=inputs,
    call=call,
    shapes=SHAPES,
    shape="image",
    layout_shapes=("rows past a block of rows", "sparse teacher, rows past a block of rows", "image"),
    small={"rows": ((3, 5), "pair"), "image": ((2, 3, 2, 2), "none"), "sparse": ((3, 5), "pair sparse 3")},
    large={"narrow": ((4099, 5), "pair"), "rows": ((37, 4097), "hard"), "sparse": ((37, 4097), "hard sparse 64")},
    growing=tuple(((rows, 40), "hard") for rows in (3, 7, 129)),
    gpu={
        "narrow": ((257, 17), "pair"),
        "usual": ((512, 1000), "hard"),
        "odd": ((65, 1001), "none"),
        "long": ((3, 50257), "pair"),
        "sparse": ((512, 1000), "hard sparse 64"),
        "sparse long": ((3, 50257), "pair sparse 100"),
    },
    options={
        "mean": {"reduction": "mean"},
        "sum, T=1": {"reduction": "sum", "temperature": 1.0},
        "mean, weighted, smoothed": {"reduction": "mean", "weighted": True, "label_smoothing": 0.1, "alpha": 0.3},
        "alpha=1": {"alpha": 1.0},
    },
    adversaries={
        **{f"shift {s:.0e}": shifted(s) for s in (60.0, -1e4)},
        # Every addition to the part of a sum that holds the 1 rounds by up to eps / 2. KL is alpha T^2 times the log of
        # the ratio of two such sums, CE 1 - alpha times that of one: 4 eps is 8 such roundings. What is certain is a
        # multiple of it, for sums of about a dozen additions; in 1500 draws the CPU was off by up to 7.2 eps in all.
        "confident": Adversary(((6, 257), "hard"), confident, noise=4 * 2.5 * torch.finfo(torch.float32).eps),
        **{f"-inf but for block {k}": masked(k) for k in (0, 2)},
    },
    rowwise=False,
)
