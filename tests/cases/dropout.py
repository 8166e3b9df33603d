"""The operator with its seed given; what draws the seed is in test_dropout.py. A shape is (size, dimensions of a
group, whether in place): the truth is torch's own arithmetic on the mask of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cases import Case, Shape
from fusedtricks.ops import dropout


def inputs(size: tuple[int, ...], *_: object) -> tuple[Tensor, Tensor]:
    return torch.randn(size, dtype=torch.float64), torch.randint(-(2**63), 2**63 - 1, (1,))


def group_of(size: torch.Size, dims: int) -> int:
    return math.prod(size[len(size) - dims :])


def ours(x: Tensor, seed: Tensor, keep: int, group: int, inplace: bool) -> Tensor:
    return dropout.run(x.clone() if inplace else x, seed, keep, group, inplace)


def expected(x: Tensor, seed: Tensor, keep: int, group: int, inplace: bool) -> Tensor:
    return torch.where(dropout.kept(x.shape, seed, keep, group), x / (keep / 65536), 0.0)


SHAPES: dict[str, Shape] = {
    "one element": ((1,), 0),
    "no dimensions": ((), 0),
    **{f"{n} elements around a register of bits": ((n,), 0) for n in (7, 8, 9, 63, 65, 127, 129)},
    "past a chunk": ((2051,), 0),
    "several chunks a row, odd": ((3, 4099), 0),
    "3-D": ((3, 5, 40), 0),
    "images": ((2, 3, 4, 18), 0),
    "nothing": ((2, 0, 8), 0),
    "channels of sequences": ((3, 5, 40), 1),
    "channels of images": ((2, 19, 4, 6), 2),
    "channels of volumes": ((2, 3, 2, 3, 17), 3),
    "channels past a chunk": ((2, 3, 2500), 1),
    "channels of images, in place": ((2, 19, 4, 6), 2, True),
    "a value per channel": ((4, 300, 1), 1),
}

CASE = Case(
    fn=ours,
    torch_fn=expected,
    names=("x", "seed"),
    fixed=("seed",),
    inputs=inputs,
    call=lambda fn, t, dims, inplace=False, keep=0.7: fn(
        t[0], t[1], dropout.keep_of(1 - keep), group_of(t[0].shape, dims), inplace
    ),
    shapes=SHAPES,
    shape="3-D",
    layout_shapes=("3-D", "images", "channels of images, in place"),
    small={"elements": ((3, 5), 0), "channels": ((2, 3, 4), 1)},
    large={"one row": ((300_007,), 0), "rows": ((37, 4097), 0), "channels": ((9, 33, 1001), 1)},
    growing=(((3, 40), 0), ((7, 40), 0), ((129, 40), 0)),
    gpu={"elements": ((513, 1001), 0), "channels": ((9, 33, 1001), 1), "images": ((2, 19, 4, 6), 2)},
    options={"keep=1/65536": {"keep": 1 / 65536}, "keep=0.999": {"keep": 0.999}, "keep=1/2": {"keep": 0.5}},
    rowwise=False,
)
