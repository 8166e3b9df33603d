"""What only a real GPU can show: graphs, streams, syncs, devices, repeatability. `make gpu-check` picks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CASES, Case
from parity import assert_bitwise_equal, assert_no_worse
from torch import Tensor

import fusedtricks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

GPU_BACKENDS = ("cuda", "triton", "reference")
# Sizes of the first input, for any operation: narrow rows, rows of a warp, an odd tail, rows longer than a block.
SIZES = {"narrow": (257, 17), "usual": (512, 768), "odd": (65, 1001), "long": (3, 20000)}

each_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_size = pytest.mark.parametrize("size", SIZES)


def require(case: Case, backend: str) -> None:
    missing = [op.name for op in case.operators if backend not in op.available()]
    if missing:
        pytest.skip(f"no {backend} kernel for {', '.join(missing)}")


def tensors_of(case: Case, size: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    """The inputs of a call as leaves."""
    values = case.inputs(SIZES[size], *case.shapes[case.shape][1:])
    return [v.to(device, dtype).requires_grad_() for v in values]


def forward_backward(case: Case, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    y = case.call(fn, tensors, *case.shapes[case.shape][1:])
    # Not expanded, and the same in every call.
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float32).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def check(case: Case, ours: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    theirs = forward_backward(case, case.torch_fn, tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = forward_backward(case, case.torch_fn, exact)
    for name, a, b, t in zip(("y", *(f"d{n}" for n in case.names)), ours, theirs, truth, strict=True):
        assert_no_worse(a, b, t.cpu(), name=name)


@each_case
@each_backend
@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_small(case: Case, backend: str, size: str, dtype: torch.dtype) -> None:
    """Forward and backward once: what compute-sanitizer looks at."""
    require(case, backend)
    tensors = tensors_of(case, size, dtype)
    with fusedtricks.backend(backend):
        ours = forward_backward(case, case.fn, tensors)
    check(case, ours, tensors)


@each_case
@each_backend
@each_size
def test_graphs_replay_on_new_inputs(case: Case, backend: str, size: str) -> None:
    require(case, backend)
    tensors = tensors_of(case, size)
    with fusedtricks.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                forward_backward(case, case.fn, tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_backward(case, case.fn, tensors)
    for _ in range(3):
        with torch.no_grad():
            for t in tensors:
                t.normal_()
        graph.replay()
        check(case, [t.clone() for t in captured], tensors)


@each_case
@each_backend
def test_sync_never(case: Case, backend: str) -> None:
    """A hidden .item() or a copy to the host stalls the training step."""
    require(case, backend)
    tensors = tensors_of(case, "usual")
    with fusedtricks.backend(backend):
        forward_backward(case, case.fn, tensors)  # the first call may compile
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_backward(case, case.fn, tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_case
@each_backend
@each_size
def test_determinism_of_many_runs(case: Case, backend: str, size: str) -> None:
    require(case, backend)
    tensors = tensors_of(case, size)
    with fusedtricks.backend(backend):
        first = forward_backward(case, case.fn, tensors)
        for _ in range(20):
            for a, b in zip(first, forward_backward(case, case.fn, tensors), strict=True):
                assert_bitwise_equal(b, a)


@each_case
@each_backend
def test_graphs_and_side_stream_order(case: Case, backend: str) -> None:
    """Work goes to the current stream: on another one it would run before the values it needs are written."""
    require(case, backend)
    tensors = tensors_of(case, "usual")
    with fusedtricks.backend(backend):
        forward_backward(case, case.fn, tensors)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            for t in tensors:
                t.mul_(2).add_(1)
        with torch.cuda.stream(side):
            ours = forward_backward(case, case.fn, tensors)
        torch.cuda.synchronize()
    check(case, ours, tensors)


@each_case
@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_small_on_a_second_device(case: Case, backend: str) -> None:
    """The current device is another one than the tensors'."""
    require(case, backend)
    tensors = tensors_of(case, "usual", device="cuda:1")
    with fusedtricks.backend(backend), torch.cuda.device(0):
        ours = forward_backward(case, case.fn, tensors)
    assert all(t.device == tensors[0].device for t in ours)
    check(case, ours, tensors)
