"""What every Triton launcher shares: row addressing, device and dtype checks, counters, and the launch itself."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Programs of the interpreter run one after the other, so a small device keeps it quick.
INTERPRETED_PROCESSORS = 4


# ---- rows -----------------------------------------------------------------------------------------------------------


def collapse_rows(sizes: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The leading dimensions of K tensors walked together: (size, stride in each tensor) per level, outermost first.

    Dimensions are merged where all K tensors allow it. The order follows the first tensor's strides, so a permuted but
    dense batch is one level.
    """
    levels: list[tuple[int, tuple[int, ...]]] = []
    kept = [d for d, size in enumerate(sizes) if size != 1]
    for d in sorted(kept, key=lambda d: -strides[0][d]):
        here = tuple(s[d] for s in strides)
        if levels and all(outer == sizes[d] * inner for outer, inner in zip(levels[-1][1], here, strict=True)):
            levels[-1] = (levels[-1][0] * sizes[d], here)
        else:
            levels.append((sizes[d], here))
    return levels


def dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))


class Rows(NamedTuple):
    """Row r of tensor k lies at (r // inner) * outer_strides[k] + (r % inner) * inner_strides[k]."""

    levels: int
    inner: int
    outer_strides: tuple[int, ...]
    inner_strides: tuple[int, ...]


def walk_rows(sizes: Sequence[int], *strides: Sequence[int]) -> Rows | None:
    """Two levels of strides are what kernels take; None where more are needed."""
    levels = collapse_rows(sizes, *strides)
    if len(levels) > 2:
        return None
    # A single row gets the stride of dense statistics, so that it shares its compiled kernel with many rows.
    inner, inner_strides = levels[-1] if levels else (1, (1,) * len(strides))
    outer_strides = levels[0][1] if len(levels) == 2 else (0,) * len(strides)
    return Rows(max(len(levels), 1), inner, outer_strides, inner_strides)


def unit_columns(t: Tensor, dims: int) -> bool:
    """Do the trailing `dims` dimensions lie in memory as one run of unit stride?"""
    expected = 1
    for size, stride in zip(reversed(t.shape[t.dim() - dims :]), reversed(t.stride()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def with_unit_columns(t: Tensor, dims: int) -> Tensor:
    """`t` with unit-stride columns, copied only if need be.

    What is expanded over the rows stays expanded: the gradient of `sum()` costs one row and not a tensor.
    """
    if unit_columns(t, dims):
        return t
    one = t
    for d in range(t.dim() - dims):
        if t.stride(d) == 0 and t.shape[d] > 1:
            one = one.narrow(d, 0, 1)
    return one.contiguous().expand(t.shape)


def alignment(*counts: int) -> int:
    """The largest power of two, at most 16, that divides every count of elements: what vector accesses may rely on."""
    return math.gcd(16, *counts)


# ---- checks ---------------------------------------------------------------------------------------------------------


def supported(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """True if Triton serves these tensors, False if the reference must (float64); raises on what nobody serves."""
    tensors = [x, *(t for t in others if t is not None)]
    for t in tensors:
        if not t.is_floating_point():
            raise NotImplementedError(f"{op}: expected floating tensors, got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(f"{op}: expected all tensors on {x.device}, got one on {t.device}")
    if x.device.type not in ("cuda", "meta") and not INTERPRETED:
        raise RuntimeError(
            f"{op}: the Triton back end needs a GPU tensor, got one on {x.device}; "
            "for CPU tensors set TRITON_INTERPRET=1 before Python starts"
        )
    return all(t.dtype in FLOATS for t in tensors)


# ---- device ---------------------------------------------------------------------------------------------------------


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device. Meta tensors plan for 132, an H100 or H200."""
    if device.type == "meta":
        return 132
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[torch.device, int], Tensor] = {}


def lasting_zeros(device: torch.device, count: int, stream: torch.cuda.Stream | None) -> Tensor:
    """int32 zeros that outlive the call, made by a thread of their own.

    A memory pool (torch.cuda.use_mem_pool, torch.compile's mode "reduce-overhead" before it captures) serves the thread
    that opened it. It counts on all of its memory being free again in the end, and gives it to others.
    """

    def make() -> Tensor:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros. The kernel that takes them leaves zeros behind, so no launch pays for a memset.

    Kernels on one stream follow each other and share a buffer. A CUDA graph owns its buffer, because it may be replayed
    on any stream.
    """
    if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = (device, 0 if stream is None else stream.cuda_stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = lasting_zeros(device, triton.next_power_of_2(max(count, 1024)), stream)
    return _counters[key]


def waves(num_warps: int, amd: bool = torch.version.hip is not None) -> int:
    """The warps Triton is asked for: plans count in 32 threads, an AMD wavefront has 64."""
    return max(num_warps // 2, 1) if amd else num_warps


def releasing_lanes(num_warps: int, amd: bool = torch.version.hip is not None) -> int:
    """A lane for every thread of an AMD program, none elsewhere: see `arrive`."""
    return 64 * waves(num_warps, amd) if amd else 0


class Launch(NamedTuple):
    """A kernel with everything its launch needs: what launchers run, and what bench/aot.py compiles without a GPU."""

    kernel: Any
    programs: int
    args: dict[str, Any]
    num_warps: int  # of 32 threads
    registers: int | None = None  # per thread at most; unasked, ptxas spills a few to fit one more program
    contract: bool = True  # may a product be taken into a sum unrounded?

    def options(self, amd: bool = torch.version.hip is not None) -> dict[str, int]:
        limit = {} if amd or self.registers is None else {"maxnreg": self.registers}
        exact = {} if self.contract else {"enable_fp_fusion": False}
        return {"num_warps": waves(self.num_warps, amd), **limit, **exact}

    def checked(self) -> Launch:
        """Raises where arguments are not those of the kernel: the interpreter drops what Triton's launcher refuses."""
        if self.args.keys() != set(self.kernel.arg_names):
            wrong = self.args.keys() ^ set(self.kernel.arg_names)
            raise TypeError(f"{self.kernel.__name__}: arguments missing or unknown: {', '.join(sorted(wrong))}")
        return self

    def __call__(self, device: torch.device) -> None:
        if INTERPRETED:
            self.checked()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                self.kernel[(self.programs,)](**self.args, **self.options())
            except BaseException:
                _counters.clear()  # an interpreted kernel that stops halfway leaves them dirty
                raise


# ---- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def arrive(counter, idle, LANES: tl.constexpr):
    """Count this program in, after all its stores; returns how many came before.

    The barrier orders the stores of every warp before the one thread that counts, and acq_rel publishes them to the
    whole device (and makes those of earlier arrivals visible here). That is transitive on NVIDIA. On AMD a barrier does
    not wait for the stores of other waves (llvm-project pull request 161638), so there each wave first releases its own
    by adding 0 to `idle`: LANES is `releasing_lanes`.
    """
    if LANES > 0:
        tl.atomic_add(idle + tl.zeros([LANES], tl.int32), 0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(counter, count):
    """Wait until `count` programs have arrived. The caller makes sure that they run: see the callers."""
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < count:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit
def clear(counter, count):
    """Zero the counters; called by the last program that uses them."""
    for start in range(0, count, 128):
        at = start + tl.arange(0, 128)
        tl.store(counter + at, 0, mask=at < count)
