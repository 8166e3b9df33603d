"""Timing that can be compared: everybody's calls alternate in one run, and a copy of the same bytes runs among them."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    call: Callable[[], Any]
    within: Context = contextlib.nullcontext  # entered around a batch of calls, outside the clock


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 10th and 90th percentile; `host` is the CPU time to issue a call to a GPU."""

    median: float
    low: float
    high: float
    host: float | None = None


def copy(nbytes: int, device: str) -> Contestant:
    """A copy that moves `nbytes`: half of them read, half written, into memory that is already there."""
    source = torch.randn(max(nbytes // 8, 1), device=device)
    target = torch.empty_like(source).copy_(source)
    return Contestant(lambda: target.copy_(source))


def interleaved(
    contestants: dict[str, Contestant], device: str, *, budget: float = 1.0, agreed: Callable[[float], float] = float
) -> dict[str, Timing]:
    """Time each contestant in about `budget` seconds each, one round of everybody after the other.

    On a CPU, where several processes call together, `agreed` says what all of them go by.
    """
    return _cpu_rounds(contestants, budget, agreed) if device == "cpu" else _cuda_rounds(contestants, budget)


def _timing(samples: list[float], host: float | None = None) -> Timing:
    deciles = quantiles(samples, n=10, method="inclusive")
    return Timing(median=deciles[4], low=deciles[0], high=deciles[8], host=host)


def _repeat(contestant: Contestant, times: int) -> float:
    with contestant.within():
        start = time.perf_counter()
        for _ in range(times):
            contestant.call()
        return (time.perf_counter() - start) / times


keeps_freed_memory = False


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory as caching allocators do, from here to the end of the process.

    By default it returns large blocks to the system, and whether a call then pays for thousands of page faults changes
    from one call to the next, for everybody.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
    global keeps_freed_memory
    keeps_freed_memory = True


def _cpu_rounds(
    contestants: dict[str, Contestant], budget: float, agreed: Callable[[float], float]
) -> dict[str, Timing]:
    batch = {}
    for name, contestant in contestants.items():
        _repeat(contestant, 2)
        # Long enough that the clock and the switch of contestant do not show.
        batch[name] = int(agreed(max(4, min(5000, round(10e-3 / _repeat(contestant, 3))))))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    stop = time.perf_counter() + budget * len(contestants)
    while agreed(time.perf_counter() < stop or len(next(iter(samples.values()))) < 7):
        for name, contestant in contestants.items():
            contestant.call()  # brings its own data and code back into the caches after the others
            samples[name].append(_repeat(contestant, batch[name]))
    return {name: _timing(s) for name, s in samples.items()}


def _host_seconds(contestant: Contestant) -> float:
    """CPU seconds to issue one call: few enough calls that the GPU's queue never fills."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(_repeat(contestant, 10))
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def _cuda_rounds(contestants: dict[str, Contestant], budget: float) -> dict[str, Timing]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * max(properties.L2_cache_size, 32 << 20), dtype=torch.int8, device="cuda")
    host = {}
    for name, contestant in contestants.items():
        _repeat(contestant, 3)
        host[name] = _host_seconds(contestant)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    stop = time.perf_counter() + budget * len(contestants)
    while time.perf_counter() < stop or len(next(iter(samples.values()))) < 20:
        for name, contestant in contestants.items():
            events = []
            with contestant.within():
                for _ in range(4):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    flush.zero_()
                    # The GPU waits until the call has been issued, so that the events hold its work and not the host's.
                    torch.cuda._sleep(int(3e9 * (host[name] + 20e-6)))
                    start.record()
                    contestant.call()
                    end.record()
                    events.append((start, end))
            torch.cuda.synchronize()
            samples[name] += [start.elapsed_time(end) * 1e-3 for start, end in events]
    return {name: _timing(s, host[name]) for name, s in samples.items()}
