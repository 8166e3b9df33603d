"""What every kernel is held to: the comparison, memory whose every byte is watched, and poisoned allocations."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

# ---- comparison ------------------------------------------------------------------------------------------------------


def largest(value: Tensor) -> float:
    """The largest finite magnitude."""
    return value.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if value.numel() else 0.0


def assert_same_kind(kernel: Tensor, truth: Tensor, *, dtype: torch.dtype, strides: Sequence[int], name: str) -> None:
    """Shape, dtype, strides, and the places of infinities and NaN, where `truth` in `dtype` has them."""
    assert kernel.shape == truth.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    assert kernel.dtype == dtype, f"{name}: dtype {kernel.dtype}, expected {dtype}"
    # The stride of a dimension of one element, or of no elements, is never used.
    used = [d for d, size in enumerate(kernel.shape) if size > 1] if kernel.numel() else []
    assert [kernel.stride(d) for d in used] == [strides[d] for d in used], (
        f"{name}: strides {kernel.stride()}, expected {tuple(strides)} for shape {tuple(kernel.shape)}"
    )
    rounded = truth.to(dtype)
    if torch.isfinite(kernel).all() and torch.isfinite(rounded).all():
        return
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (kind(kernel) != kind(rounded)).nonzero()
        assert not len(wrong), (
            f"{name}: {kind.__name__} differs from the truth in {len(wrong)} of {kernel.numel()} elements, "
            f"first at {tuple(wrong[0].tolist())}: {kernel[tuple(wrong[0])]}, expected {rounded[tuple(wrong[0])]}"
        )


def assert_within(kernel: Tensor, truth: Tensor, budget: float, *, name: str) -> None:
    error = (kernel.double() - truth).abs().nan_to_num(0.0, 0.0, 0.0)
    if error.numel() and error.max().item() > budget:
        at = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: off by {error.max():.3e}, allowed {budget:.3e}, at {at} of {tuple(error.shape)}: "
            f"{kernel[at].item():.9g}, truth {truth[at].item():.9g}; "
            f"{(error > budget).sum()} of {error.numel()} elements are off"
        )


def assert_no_worse(
    kernel: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    *,
    strides: Sequence[int] | None = None,
    name: str = "result",
    precision: torch.dtype | None = None,
    ulps: float = 4,
    slack: float = 0.0,
) -> None:
    """No further from the fp64 `truth` than `torch_result`, plus a few ulps of the largest element.

    `torch_result` sets the dtype, and the strides unless they are given. Where it is infinite or NaN and the truth is
    not, it excuses nothing. `precision` is the dtype of the arithmetic where that is narrower than the result's;
    `slack` is a further absolute allowance.
    """
    dtype = torch_result.dtype
    kernel, torch_result = kernel.detach().cpu(), torch_result.detach().cpu()
    strides = torch_result.stride() if strides is None else strides
    assert_same_kind(kernel, truth, dtype=dtype, strides=strides, name=name)
    eps = max(torch.finfo(d).eps for d in (dtype, precision or dtype))
    budget = largest(torch_result.double() - truth) + ulps * eps * max(1.0, largest(truth)) + slack
    assert_within(kernel, truth, budget, name=name)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the elements, so that NaN equals the same NaN and -0 differs from 0."""
    plain = tensor.detach().cpu().contiguous()
    # One element counts as contiguous whatever its stride.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def assert_bitwise_equal(first: Tensor, second: Tensor, *, name: str = "result") -> None:
    assert first.shape == second.shape, f"{name}: shapes {tuple(first.shape)} and {tuple(second.shape)}"
    if torch.equal(bits(first), bits(second)):
        return
    differing = (bits(first) != bits(second)).reshape(-1, first.element_size()).any(1)
    raise AssertionError(
        f"{name}: {differing.sum()} of {first.numel()} elements differ, first at flat index {differing.int().argmax()}"
    )


# ---- layouts and guarded memory --------------------------------------------------------------------------------------


def dense(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(s, 1) for s in size[d + 1 :]) for d in range(len(size)))


def _channels_last(size: Sequence[int]) -> tuple[int, ...]:
    memory_format = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(size, device="meta", memory_format=memory_format).stride()


# name: (fewest dimensions, strides of a size, elements to skip at the start)
LAYOUTS: dict[str, tuple[int, Callable[[Sequence[int]], tuple[int, ...]], int]] = {
    "plain": (0, dense, 0),
    "transposed": (2, lambda size: dense(size[::-1])[::-1], 0),
    "batch swapped": (3, lambda size: (lambda s: (s[1], s[0], *s[2:]))(dense((size[1], size[0], *size[2:]))), 0),
    "offset by one": (0, dense, 1),
    "row-sliced": (1, lambda size: dense((*size[:-1], size[-1] + 3)), 0),
    "every second row": (1, lambda size: (2 * dense(size)[0], *dense(size)[1:]), 0),
    "expanded": (2, lambda size: (0, *dense(size)[1:]), 0),
    "expanded columns": (2, lambda size: (*dense(size)[:-1], 0), 0),
    "channels_last": (4, _channels_last, 0),
}
GRAD_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("plain", "transposed", "offset by one", "row-sliced", "channels_last")},
    "expanded scalar": (0, lambda size: (0,) * len(size), 0),
    "expanded rows": LAYOUTS["expanded"],
}
INPUT_LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name != "expanded columns"}

GUARD_ELEMENTS = 64  # before and after; a multiple of every vector width


class Guarded:
    """`values` in a chosen layout inside a larger buffer that is NaN (integers: the smallest) everywhere else.

    A kernel that reads outside has NaN in its result; one that writes, outside or to its input, changes the bytes.
    """

    def __init__(self, values: Tensor, layout: str = "plain"):
        fewest, strides_of, skip = {**LAYOUTS, **GRAD_LAYOUTS}[layout]
        size = tuple(values.shape)
        strides = strides_of(size) if len(size) >= fewest else dense(size)
        span = 1 + sum(stride * (max(n, 1) - 1) for n, stride in zip(size, strides, strict=True))
        outside = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).min
        self.buffer = values.new_full((span + skip + 2 * GUARD_ELEMENTS,), outside)
        self.tensor = self.buffer.as_strided(size, strides, GUARD_ELEMENTS + skip)
        for d, stride in enumerate(strides):
            if stride == 0 and size[d] > 1:
                values = values.narrow(d, 0, 1)
        self.tensor.as_strided(values.shape, strides, GUARD_ELEMENTS + skip).copy_(values)
        self.before = self.buffer.clone()

    def check(self, name: str = "input") -> None:
        if torch.equal(bits(self.buffer), bits(self.before)):
            return
        changed = (bits(self.buffer) != bits(self.before)).reshape(-1, self.buffer.element_size()).any(1).nonzero()
        raise AssertionError(
            f"{name}: {len(changed)} elements of its memory were written, first at "
            f"{changed[0].item() - self.tensor.storage_offset()} from its start"
        )


# ---- poison ----------------------------------------------------------------------------------------------------------


@functools.cache
def _allocator_flag(name: str) -> ctypes.c_bool:
    library = Path(torch.__file__).parent / "lib" / ("libc10.dylib" if torch.backends.mps.is_built() else "libc10.so")
    return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), f"FLAGS_caffe2_cpu_allocator_do_{name}_fill")


@contextlib.contextmanager
def poisoned(fill: str) -> Iterator[None]:
    """Fresh CPU memory of torch holds zeros ("zero") or a pattern that is NaN in fp32 ("junk").

    It is the allocator that fills, so what C++ kernels allocate is poisoned as well. torch.empty on a GPU is filled
    with NaN for "junk" ("zero": whatever was there).
    """
    flag, deterministic = _allocator_flag(fill), torch.are_deterministic_algorithms_enabled()
    flag.value = True
    if fill == "junk" and torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        flag.value = False
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(deterministic, warn_only=True)


def poison_cuda(sizes: Sequence[int], byte: int) -> None:
    """Leave `byte` where the caching allocator will put the next allocations of these sizes in bytes.

    It hands out the same blocks for the same sequence of sizes, so allocating and freeing them is enough.
    """
    held = [torch.empty(n, dtype=torch.uint8, device="cuda").fill_(byte) for n in sizes for _ in range(2)]
    del held


def written_everywhere(call: Callable[[], Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The results of `call`, run twice on different poison.

    An element that is never written, or depends on memory that is not, differs between the two runs whatever its dtype
    and whatever value the poison happens to have in it.
    """
    with poisoned("junk"):
        first = list(call())
    cuda = [t.numel() * t.element_size() for t in first if t is not None and t.is_cuda]
    poison_cuda(cuda, 0)
    with poisoned("zero"):
        second = call()
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is not None:
            assert_bitwise_equal(a, b, name=f"result {i}: not written, or not the same twice")
    return first
