"""cutmix with a box per sample and a random permutation: sizes, inputs, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import Moved, Size
from bench.mixup import Mixing
from fusedtricks._op import Op
from fusedtricks.ops import cutmix


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(size, dtype=dtype, device=device).requires_grad_()
    box, _ = cutmix.draw_box(torch.rand(size[0], device=device), *size[-2:])
    return x, torch.randperm(size[0], device=device), box


OPERATION = Mixing(
    stands_in_for="where(inside, x[perm], x)",
    ours=lambda x, perm, box: cutmix.run(x, perm, box),
    torch=lambda x, perm, box: torch.where(cutmix.inside(x, box), x[perm], x),
    inputs=inputs,
    floors=("2ns", "2ns"),
    forward_bytes=lambda n, s: 2 * n * s,
    backward_bytes=lambda n, s: 2 * n * s,
    # images of two sizes, cost of a call
    sizes=((64, 3, 224, 224), (256, 3, 32, 32), (4, 1, 4, 4)),
    headline=(64, 3, 224, 224),
    random=True,
)


def traffic() -> Iterator[Moved]:
    fwd, bwd = (Op.registry[f"cutmix_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    for size in ((64, 3, 32, 32), (256, 1, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            x, perm, box = (t.detach() for t in inputs(size, dtype, "cpu"))
            floor = 2 * x.numel() * x.element_size()
            for direction, run in (("forward", fwd), ("backward", bwd)):
                call = lambda run=run, x=x, perm=perm, box=box: (run(x, perm, box),)  # noqa: E731
                yield Moved(direction, size, dtype, call, floor, 1.1)
