"""Tensors that are spread over processes (torch.distributed.tensor): sequence and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: Tensor) -> bool:
    """By attribute: importing the class takes a second, which only those who use it should pay."""
    return type(t) is not Tensor and hasattr(t, "device_mesh")


def by_rows(norm: Callable[..., Tensor], input: Any, dims: int, *parameters: Any) -> Any:
    """`norm(rows, *parameters)` of the rows that this process holds, as a DTensor that is spread as they are.

    Rows are brought together where they are not whole, and the parameters everywhere; their gradients are left as
    partial sums, as those of torch's own norms are.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    whole = [type(p) is Shard and p.dim < input.dim() - dims for p in input.placements]
    here = [p if w else Replicate() for p, w in zip(input.placements, whole, strict=True)]
    everywhere = [Replicate()] * len(here)
    sums = [Partial() if w else Replicate() for w in whole]

    def local(t: Any, placements: list[Any], of_gradient: list[Any]) -> Any:
        return None if t is None else t.redistribute(placements=placements).to_local(grad_placements=of_gradient)

    y = norm(local(input, here, here), *(local(p, everywhere, sums) for p in parameters))
    strides = torch.empty_like(torch.empty_strided(input.shape, input.stride(), device="meta")).stride()
    return DTensor.from_local(y, input.device_mesh, here, shape=input.shape, stride=strides)
