"""Bugs that have been made in kernels like these. The suite must notice every one of them.

A Python bug replaces the reference of one operator: `wrong(right, *args)` gets the true reference and its arguments.
A C++ bug replaces one expression of csrc/, below csrc/cuda in CUDA_BUGS. Each module here has some of the dictionaries
BUGS, NATIVE_BUGS and CUDA_BUGS.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from parity import dense
from torch import Tensor

from fusedtricks.ops._norm import accumulate_dtype


class Bug(NamedTuple):
    op: str
    wrong: Callable[..., Any]


class NativeBug(NamedTuple):
    file: str
    right: str
    wrong: str
    op: str


def wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def as_if_dense(x: Tensor) -> Tensor:
    """What a kernel reads that takes the pointer and forgets the strides."""
    reach = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided(x.shape, dense(x.shape)) if x.numel() <= reach else x


def partly_written(result: Tensor, count: int) -> Tensor:
    """All but the last `count` elements."""
    if not result.is_contiguous():
        return result
    out, written = torch.empty_like(result), max(result.numel() - count, 0)
    out.view(-1)[:written] = result.view(-1)[:written]
    return out


def write(x: Tensor, offset: int) -> None:
    end = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    x.as_strided((1,), (1,), end + offset).fill_(0)


def overruns(right: Any, x: Tensor, *rest: Any) -> Any:
    result = right(x, *rest)
    if x.numel() and x.storage_offset():
        write(x, 1)
    return result


def in_place(right: Any, dy: Tensor, *rest: Any) -> Any:
    result = right(dy, *rest)
    if dy.numel():
        write(dy, 0)
    return result


def first(right: Any, change: Callable[[Tensor], Tensor], *args: Any) -> Any:
    y, *rest = right(*args)
    return change(y), *rest


def _collect(attribute: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        here = getattr(importlib.import_module(f"{__name__}.{module}"), attribute, {})
        found |= {f"{module}: {name}": bug for name, bug in here.items()}
    return found


BUGS: dict[str, Bug] = _collect("BUGS")
NATIVE_BUGS: dict[str, NativeBug] = _collect("NATIVE_BUGS")
CUDA_BUGS: dict[str, NativeBug] = _collect("CUDA_BUGS")
