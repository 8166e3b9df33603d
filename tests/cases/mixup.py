"""mixup with its weights and its permutation given. A shape is (size, kind of permutation, whether in place)."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case, Shape
from fusedtricks.ops import _mixing, mixup


def permutation(N: int, kind: str) -> Tensor:
    if kind == "roll":  # one cycle
        return torch.arange(N).roll(-1)
    if kind == "flip":  # pairs
        return torch.arange(N).flip(0)
    if kind == "identity":
        return torch.arange(N)
    if kind == "fixed points":
        perm, moved = torch.arange(N), torch.randperm(N)[: N // 2]
        perm[moved] = moved.roll(1)
        return perm
    return torch.randperm(N)


def inputs(size: tuple[int, ...], kind: str = "random", *_: object) -> tuple[Tensor, ...]:
    N = size[0]
    lam = torch.rand(N, dtype=torch.float32).double() if kind != "flip" else torch.rand(()).double()
    return torch.randn(size, dtype=torch.float64), lam, permutation(N, kind)


def weights(x: Tensor, lam: Tensor) -> Tensor:
    return lam.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def ours(x: Tensor, lam: Tensor, perm: Tensor, inplace: bool) -> Tensor:
    return mixup.run(x.clone() if inplace else x, weights(x, lam), perm, inplace)


def expected(x: Tensor, lam: Tensor, perm: Tensor, inplace: bool) -> Tensor:
    own = _mixing.per_sample(weights(x, lam).to(x.dtype), x)
    return own * x + (1 - own) * x[perm]


SHAPES: dict[str, Shape] = {
    "one sample": ((1, 5), "identity"),
    "two samples": ((2, 7), "roll"),
    "one dimension": ((9,), "random"),
    "3-D": ((7, 5, 40), "random"),
    "images": ((6, 3, 4, 18), "random"),
    "volumes": ((3, 2, 2, 3, 17), "roll"),
    "past a chunk": ((5, 2049), "random"),
    "several chunks": ((3, 4, 4099), "fixed points"),
    "many samples": ((300, 17), "random"),
    "pairs, one weight": ((9, 33), "flip"),
    "nobody moves": ((4, 33), "identity"),
    "half move": ((20, 33), "fixed points"),
    # Samples of more than 512 bytes are mixed in another order.
    "long samples, pairs, one weight": ((9, 259), "flip"),
    "long samples, nobody moves": ((4, 259), "identity"),
    "long samples, half move": ((20, 259), "fixed points"),
    "no samples": ((0, 8), "identity"),
    "no elements": ((4, 0), "roll"),
    "images, in place": ((6, 3, 4, 18), "random", True),
    "past a chunk, in place": ((5, 2049), "fixed points", True),
}

CASE = Case(
    fn=ours,
    torch_fn=expected,
    names=("x", "lam", "perm"),
    fixed=("lam", "perm"),
    inputs=inputs,
    call=lambda fn, t, kind="random", inplace=False: fn(*t, inplace),
    shapes=SHAPES,
    shape="3-D",
    layout_shapes=("3-D", "images", "images, in place"),
    small={"samples": ((4, 5), "random"), "one weight": ((3, 2, 4), "flip")},
    large={
        "few samples": ((3, 100_003), "roll"),
        "many samples": ((1031, 65), "random"),
        "in place": ((37, 4097), "random", True),
    },
    growing=(((3, 40), "roll"), ((7, 40), "roll"), ((129, 40), "roll")),
    gpu={"few samples": ((5, 3, 1001), "random"), "many samples": ((300, 130), "random"), "more": ((2050, 33), "roll")},
    rowwise=False,
)
