"""cutmix with its boxes and its permutation given. A shape is (size, whether each sample has a box)."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case, Shape
from fusedtricks.ops import cutmix


def inputs(size: tuple[int, ...], per_sample: bool) -> tuple[Tensor, ...]:
    N, H, W = size[0], *size[-2:]
    lam = torch.rand(N if per_sample else ())
    return torch.randn(size, dtype=torch.float64), torch.randperm(N), cutmix.draw_box(lam, H, W)[0]


def expected(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    return torch.where(cutmix.inside(x, box), x[perm], x)


SHAPES: dict[str, Shape] = {
    "one sample": ((1, 4, 5), False),
    "no channels": ((6, 5, 40), True),
    "images": ((5, 3, 9, 18), True),
    "images, one box": ((5, 3, 9, 18), False),
    "more channels": ((3, 2, 2, 7, 17), True),
    "wide": ((4, 2, 3, 700), True),
    "many samples": ((130, 1, 3, 5), True),
    "no samples": ((0, 1, 4, 8), False),
    "no elements": ((4, 2, 0, 3), True),
}

CASE = Case(
    fn=lambda x, perm, box: cutmix.run(x, perm, box),
    torch_fn=expected,
    names=("x", "perm", "box"),
    fixed=("perm", "box"),
    inputs=inputs,
    call=lambda fn, t, *_: fn(*t),
    shapes=SHAPES,
    shape="images",
    layout_shapes=("no channels", "images, one box", "images"),
    small={"boxes": ((3, 4, 5), True), "one box": ((2, 2, 3, 4), False)},
    large={"images": ((13, 3, 65, 66), True), "one box": ((13, 3, 65, 66), False)},
    growing=(((3, 5, 40), False), ((7, 5, 40), False), ((129, 5, 40), False)),
    gpu={"images": ((5, 3, 33, 65), True), "one box": ((5, 3, 33, 64), False)},
    rowwise=False,
)
