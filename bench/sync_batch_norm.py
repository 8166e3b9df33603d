"""SyncBatchNorm in training over two processes with gloo, on a CPU: sizes, bytes, collectives.

torch.nn.SyncBatchNorm refuses tensors on a CPU. What ours is compared with is what its users write in its place: an
all_reduce of the sums that torch differentiates, and arithmetic. Sizes and bytes are those of one process, which has
one thread; its messages, sent and received, are counted as bytes.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedtricks.nn
from bench import Function, Size, run, timing
from bench.timing import Contestant, Timing

PROCESSES = 2
EPS = 1e-5


@functools.cache
def _module(channels: int) -> torch.nn.Module:
    return fusedtricks.nn.SyncBatchNorm(channels, EPS, track_running_stats=False)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    module = _module(x.shape[1])
    module._parameters.update(weight=weight, bias=bias)
    return module(x)


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Here, as ours does: a torch without it has all the other benchmarks.
    from torch.distributed._functional_collectives import all_reduce

    over, wide = (0, *range(2, x.dim())), x.to(torch.promote_types(x.dtype, torch.float32))
    here = torch.cat((wide.sum(over), wide.square().sum(over), wide.new_full((1,), x.numel() / x.shape[1])))
    sums = all_reduce(here, "sum", dist.group.WORLD)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    scale = weight * torch.rsqrt(square - mean.square() + EPS)
    scale, shift = (t.reshape(1, -1, *(1,) * (x.dim() - 2)) for t in (scale, bias - mean * scale))
    return (wide * scale + shift).to(x.dtype)


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    weight, bias = (torch.randn(size[1], device=device) for _ in range(2))
    torch.manual_seed(1 + dist.get_rank())  # parameters are everybody's, the batch is not
    x = torch.randn(size, dtype=dtype, device=device)
    return tuple(t.requires_grad_() for t in (x, weight, bias))


class SyncBatchNorm(Function):
    processes = PROCESSES

    def bytes(self, mode: str, size: Size, dtype: torch.dtype) -> int:
        """A message is the count and two numbers per channel, or on the way back the two numbers, in fp64."""
        values = 1 + 2 * size[1] + (0 if mode == "forward" else 2 * size[1])
        return super().bytes(mode, size, dtype) + PROCESSES * 8 * values

    def measure(self, mode: str, size: Size, dtype: torch.dtype, device: str, budget: float) -> run.Row:
        on_each = Processes()
        on_each(_check, mode, size, dtype)
        times = on_each(_times, mode, size, dtype, self.bytes(mode, size, dtype), budget)[0]
        name = str(dtype).removeprefix("torch.")
        return run.Row(self.stem, mode, size, name, device, self.bytes(mode, size, dtype), _kernels(), times)


OPERATION = SyncBatchNorm(
    stands_in_for="all_reduce(sums) + arithmetic",
    ours=ours,
    torch=theirs,
    inputs=inputs,
    floors=("3ns, one collective", "5ns, one collective"),
    forward_bytes=lambda n, s: 3 * n * s,
    backward_bytes=lambda n, s: 5 * n * s,
    # ResNet-50, first stage and a late one; cost of a call
    sizes=((16, 64, 56, 56), (16, 256, 14, 14), (2, 64, 7, 7)),
    headline=(16, 64, 56, 56),
)


def _kernels() -> str:
    return run.our_backends("batch_norm", "cpu")[0]


# ---- the processes ---------------------------------------------------------------------------------------------------


@functools.cache
class Processes:
    """Calls a function in each process and returns what each returned. They live as long as this one."""

    def __init__(self) -> None:
        self.folder, context = tempfile.TemporaryDirectory(), multiprocessing.get_context("spawn")
        to_join = (f"file://{self.folder.name}/store", timing.keeps_freed_memory)
        self.pools = [ProcessPoolExecutor(1, context, _join, (rank, *to_join)) for rank in range(PROCESSES)]

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        return [future.result() for future in [pool.submit(work, *args) for pool in self.pools]]


def _join(rank: int, store: str, keep_freed_memory: bool) -> None:
    torch.set_num_threads(1)
    if keep_freed_memory:
        timing.keep_freed_memory()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)


class Collectives(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and func.__name__.startswith("all"):  # to all: others wait and wrap
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _check(mode: str, size: Size, dtype: torch.dtype) -> None:
    run.check(OPERATION, mode, size, dtype, "cpu", _kernels())
    call = OPERATION.call(ours, mode, OPERATION.tensors(mode, size, dtype, "cpu"))
    with Collectives() as seen:
        call()
    assert len(seen.names) == (1 if mode == "forward" else 2), f"one collective per direction, got {seen.names}"


def _times(mode: str, size: Size, dtype: torch.dtype, nbytes: int, budget: float) -> dict[str, Timing]:
    tensors = OPERATION.tensors(mode, size, dtype, "cpu")
    entries = {_kernels(): ours, "torch": theirs}
    calls = {name: Contestant(OPERATION.call(fn, mode, tensors)) for name, fn in entries.items()}
    return timing.interleaved(calls | {"copy": timing.copy(nbytes, "cpu")}, "cpu", budget=budget, agreed=_of_the_first)


def _of_the_first(value: float) -> float:
    """What the first process says, so that all make the same calls."""
    said = torch.tensor([float(value)])
    dist.broadcast(said, 0)
    return said.item()
