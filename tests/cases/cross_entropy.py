"""Cross-entropy of labels and pairs of labels; probabilities and everything else is in tests/test_cross_entropy.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedtricks
from cases import Adversary, Case, Shape
from cases._norm import randn
from fusedtricks import MixedTarget


def torchs(x: Tensor, target: Any, weight: Tensor | None = None, reduction: str = "mean", **options: Any) -> Tensor:
    """torch's cross_entropy, and the definition of a pair's loss in terms of it."""
    if not isinstance(target, MixedTarget):
        return F.cross_entropy(x, target, weight, reduction=reduction, **options)
    ignore = options.get("ignore_index", -100)
    total, mass = 0.0, 0.0
    lam = target.lam.to(x.dtype)
    lam = lam.reshape(-1, *(1,) * (target.a.dim() - 1)) if lam.dim() else lam
    for labels, m in ((target.a, lam), (target.b, 1 - lam)):
        kept = labels != ignore
        w = torch.ones_like(labels, dtype=x.dtype) if weight is None else weight[torch.where(kept, labels, 0)]
        total = total + m * F.cross_entropy(x, labels, weight, reduction="none", **options)
        mass = mass + torch.where(kept, m * w, 0.0)
    return total if reduction == "none" else total.sum() if reduction == "sum" else total.sum() / mass.sum()


def inputs(size: tuple[int, ...], kind: str) -> tuple[Tensor, ...]:
    classes = size[1] if len(size) > 1 else size[0]
    a, b = (torch.randint(classes, (*size[:1], *size[2:]) if len(size) > 1 else ()) for _ in range(2))
    if "ignored" in kind and a.numel():
        a.view(-1)[::3], b.view(-1)[::4] = -100, -100
    return 3 * randn(*size), a, b


def call(fn: Any, t: Any, kind: str, weighted: bool = False, **options: Any) -> Any:
    x, a, b = t
    options = {"reduction": "none", **options}
    if weighted:
        classes = x.shape[1] if x.dim() > 1 else x.shape[0]
        options["weight"] = torch.linspace(0.5, 2, classes, dtype=x.dtype, device=x.device)
    ignore = options.get("ignore_index", -100)
    a, b = (torch.where(labels == -100, ignore, labels) for labels in (a, b))
    if kind == "hard":
        return fn(x, a, **options)
    lam = ((a + 2 * b) % 7).double() / 7
    lam = lam.flatten(1).sum(1) % 1 if lam.dim() > 1 else lam
    if "in place" not in kind:
        return fn(x, MixedTarget(a, b, lam), **options)
    ours = {"inplace_backward": True} if fn is fusedtricks.functional.cross_entropy else {}
    return fn(x, MixedTarget(a, b, lam), **options), fn(x.clone(), MixedTarget(a, b, lam), **options, **ours)


SHAPES: dict[str, Shape] = {
    "one element": ((1, 1), "hard"),
    "one dimension": ((40,), "hard"),
    "one dimension, pair": ((7,), "pair"),
    **{f"C={c} as a tile": ((70, c), "pair ignored") for c in (2, 10, 16, 24)},
    **{f"C={c} around a register": ((5, c), "pair") for c in (25, 31, 32, 33)},
    "C=1000": ((3, 1000), "hard"),
    "C=1001, no vector": ((3, 1001), "pair ignored"),
    "C=4097 block and one": ((2, 4097), "pair"),
    "C=20000 longer than a block": ((2, 20000), "hard"),
    "C=131072 longer than shared memory": ((2, 131072), "pair"),
    "one row": ((1, 129), "hard"),
    "rows past a block of rows": ((257, 33), "pair ignored"),
    "65537 narrow rows, past a 16-bit grid": ((65537, 3), "hard"),
    "no rows": ((0, 8), "pair"),
    "sequence": ((2, 7, 40), "hard"),
    "image": ((2, 5, 9, 8), "pair ignored"),
    "image, a tile and one": ((1, 3, 5, 13), "hard"),
    "volume": ((2, 3, 2, 3, 4), "pair"),
    "in place": ((2, 5, 4, 3), "pair in place"),
}


def shifted(by: float) -> Adversary:
    # The rounding of a shifted logit is part of the input; what is left is the kernel's own.
    return Adversary(((6, 257), "pair"), lambda x, *rest: (x.float().add(by).double(), *rest), dtypes=(torch.float32,))


def confident(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return x.scatter_add(1, a[:, None], torch.full_like(x[:, :1], 20.0)), a, b


def masked(keep: int) -> Adversary:
    """All but one block of the row is -inf; the label is in it."""

    def change(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        x = torch.where(torch.arange(x.shape[1]) // 512 == keep, x, -torch.inf)
        return x, a % 512 + 512 * keep, b % 512 + 512 * keep

    return Adversary(((3, 1536), "pair"), change)


CASE = Case(
    fn=fusedtricks.functional.cross_entropy,
    torch_fn=torchs,
    names=("x", "a", "b"),
    fixed=("a", "b"),
    inputs=inputs,
    call=call,
    shapes=SHAPES,
    shape="image",
    layout_shapes=("rows past a block of rows", "image", "in place"),
    small={"rows": ((3, 5), "pair"), "image": ((2, 3, 2, 2), "pair ignored")},
    large={"narrow": ((4099, 5), "pair"), "rows": ((37, 4097), "hard"), "image": ((3, 7, 33, 31), "pair")},
    growing=tuple(((rows, 40), "hard") for rows in (3, 7, 129)),
    gpu={
        "narrow": ((257, 17), "pair"),
        "usual": ((512, 1000), "hard"),
        "odd": ((65, 1001), "pair ignored"),
        "long": ((3, 50257), "pair"),
    },
    options={
        "mean": {"reduction": "mean"},
        "sum": {"reduction": "sum"},
        "mean, weighted, smoothed": {"reduction": "mean", "weighted": True, "label_smoothing": 0.1},
        "weighted, smoothed": {"weighted": True, "label_smoothing": 0.3},
        "smoothed": {"label_smoothing": 0.1},
        "an ignored class": {"ignore_index": 1, "reduction": "mean", "label_smoothing": 0.1},
    },
    adversaries={
        **{f"shift {s:.0e}": shifted(s) for s in (60.0, -60.0, 1e4, -1e4)},
        "confident": Adversary(((6, 257), "hard"), confident, noise=4 * torch.finfo(torch.float32).eps),
        **{f"-inf but for block {k}": masked(k) for k in range(3)},
    },
    modules=((fusedtricks.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss),),
    op_db=("nn.functional.cross_entropy",),
    rowwise=False,
)
