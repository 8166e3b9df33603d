"""What only a real GPU can show: graphs, streams, syncs, devices, repeatability. `make gpu-check` picks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sweep
import torch
from cases import CASES, Case
from parity import assert_bitwise_equal, assert_no_worse
from torch import Tensor

import fusedtricks
from fusedtricks._op import Op

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

GPU_BACKENDS = ("cuda", "triton", "reference")

each_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_shape = pytest.mark.parametrize(
    ("case", "shape"), [pytest.param(c, s, id=f"{c.stem}-{s}") for c in CASES.values() for s in c.gpu]
)


def require(case: Case, backend: str) -> None:
    missing = [op.name for op in case.operators if backend not in op.available()]
    if missing:
        pytest.skip(f"no {backend} kernel for {', '.join(missing)}")


def usual(case: Case) -> str:
    return "usual" if "usual" in case.gpu else next(iter(case.gpu))


def tensors_of(case: Case, shape: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    """The inputs of a call; the floating ones are leaves."""
    values = zip(case.names, case.inputs(*case.gpu[shape]), strict=True)
    return [v.to(device) if n in case.fixed else v.to(device, dtype).requires_grad_() for n, v in values]


def forward_backward(case: Case, fn: Callable[..., Any], tensors: Sequence[Tensor], shape: str) -> list[Tensor]:
    ys = sweep.outputs(case.call(fn, tensors, *case.gpu[shape][1:]))
    # Not expanded, and the same in every call.
    line = lambda y: torch.linspace(-1, 1, y.numel() + 1, device=y.device, dtype=torch.float32)[1:]  # noqa: E731
    dys = [line(y).view_as(y).to(y.dtype) for y in ys]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [t for t in tensors if t.requires_grad], dys)]


def check(case: Case, ours: Sequence[Tensor], tensors: Sequence[Tensor], shape: str) -> None:
    theirs = forward_backward(case, case.torch_fn, tensors, shape)
    exact = [t.detach().double().requires_grad_() if t.requires_grad else t for t in tensors]
    truth = forward_backward(case, case.torch_fn, exact, shape)
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_no_worse(a, b, t.cpu(), name=f"result {i}")


@each_backend
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_small(case: Case, backend: str, shape: str, dtype: torch.dtype) -> None:
    """Forward and backward once: what compute-sanitizer looks at."""
    require(case, backend)
    tensors = tensors_of(case, shape, dtype)
    with fusedtricks.backend(backend):
        ours = forward_backward(case, case.fn, tensors, shape)
    check(case, ours, tensors, shape)


@each_backend
@each_shape
def test_graphs_replay_on_new_inputs(case: Case, backend: str, shape: str) -> None:
    require(case, backend)
    tensors = tensors_of(case, shape)
    with fusedtricks.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                forward_backward(case, case.fn, tensors, shape)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_backward(case, case.fn, tensors, shape)
    for _ in range(3):
        with torch.no_grad():
            for t in tensors:
                if t.requires_grad:
                    t.normal_()
        graph.replay()
        check(case, [t.clone() for t in captured], tensors, shape)


@each_backend
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_graphs_with_numbers_of_the_host(name: str, backend: str) -> None:
    """Those of `normalize`, and the size that boxes are clipped to: no sync, and at every replay they are the same."""
    if backend not in Op.registry[f"{name}_fwd"].available():
        pytest.skip(f"no {backend} kernel")
    images = torch.randint(0, 256, (6, 3, 8, 9), device="cuda", dtype=torch.uint8)
    perm, lam = torch.arange(6, device="cuda").roll(1), torch.rand(6, device="cuda")
    box = torch.tensor([-3, 2, 1, 99], device="cuda")
    normalize = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)

    def call() -> Tensor:
        if name == "mixup":
            return fusedtricks.functional.mixup(images, None, lam, perm, normalize=normalize)[0]
        return fusedtricks.functional.cutmix(images, None, 0.5, perm, box=box)[0]

    with fusedtricks.backend(backend):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            first = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(3):
            litter = [torch.full((n,), -1.0, pin_memory=pin) for n in range(1, 9) for pin in (True, False) * 20]
            graph.replay()
            torch.cuda.synchronize()
            del litter
            assert_bitwise_equal(captured, first)


@each_backend
@each_shape
def test_graphs_pools_get_everything_back(case: Case, backend: str, shape: str) -> None:
    """Nothing lasting is made in a pool of memory: mode "reduce-overhead" warms up in one, and raises."""
    require(case, backend)
    tensors, pool = tensors_of(case, shape), torch.cuda.MemPool()
    side = torch.cuda.Stream()  # seen for the first time
    side.wait_stream(torch.cuda.current_stream())
    with fusedtricks.backend(backend), torch.cuda.stream(side), torch.cuda.use_mem_pool(pool):
        forward_backward(case, case.fn, tensors, shape)
    torch.cuda.synchronize()
    kept = [b["size"] for s in pool.snapshot() for b in s["blocks"] if b["state"] == "active_allocated"]
    assert not kept


@pytest.mark.parametrize("size", [(257, 17), (3, 20000)], ids=["rows in registers", "split rows"])
def test_graphs_of_torch_compile(size: tuple[int, int]) -> None:
    """Mode "reduce-overhead" calls once in its pool, captures, and replays."""
    layer = fusedtricks.nn.LayerNorm(size[1], device="cuda")
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for i in range(5):
        x = torch.full(size, float(i), device="cuda").add_(torch.arange(size[1], device="cuda")).requires_grad_()
        dy = torch.sin(x.detach())
        ours = torch.autograd.grad(compiled(x), [x, *layer.parameters()], dy)
        theirs = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
        for a, b in zip(ours, theirs, strict=True):
            assert_bitwise_equal(a, b)


@each_case
@each_backend
def test_sync_never(case: Case, backend: str) -> None:
    """A hidden .item() or a copy to the host stalls the training step."""
    require(case, backend)
    shape = usual(case)
    tensors = tensors_of(case, shape)
    with fusedtricks.backend(backend):
        forward_backward(case, case.fn, tensors, shape)  # the first call may compile
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_backward(case, case.fn, tensors, shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_backend
@each_shape
def test_determinism_of_many_runs(case: Case, backend: str, shape: str) -> None:
    require(case, backend)
    tensors = tensors_of(case, shape)
    with fusedtricks.backend(backend):
        first = forward_backward(case, case.fn, tensors, shape)
        for _ in range(20):
            for a, b in zip(first, forward_backward(case, case.fn, tensors, shape), strict=True):
                assert_bitwise_equal(b, a)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_determinism_past_32_bits(backend: str) -> None:
    """One draw for the whole batch makes it one sample, whose elements an int32 does not count."""
    require(CASES["shake_shake"], backend)
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    forward, backward = (Op.registry[f"shake_shake_{way}"].implementation(backend) for way in ("fwd", "bwd"))
    zeros, share = torch.zeros((2, 2**30 + 24), dtype=torch.bfloat16, device="cuda"), torch.full((1,), 0.25).cuda()
    ones = torch.ones_like(zeros)
    assert bool((forward(zeros, ones, share) == 0.75).all())
    del zeros
    one, two = backward(ones, share)
    assert bool((one == 0.25).all())
    assert bool((two == 0.75).all())


@each_case
@each_backend
def test_graphs_and_side_stream_order(case: Case, backend: str) -> None:
    """Work goes to the current stream: on another one it would run before the values it needs are written."""
    require(case, backend)
    shape = usual(case)
    tensors = tensors_of(case, shape)
    with fusedtricks.backend(backend):
        forward_backward(case, case.fn, tensors, shape)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            for t in tensors:
                if t.requires_grad:
                    t.mul_(2).add_(1)
        with torch.cuda.stream(side):
            ours = forward_backward(case, case.fn, tensors, shape)
        torch.cuda.synchronize()
    check(case, ours, tensors, shape)


@each_case
@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_small_on_a_second_device(case: Case, backend: str) -> None:
    """The current device is another one than the tensors'."""
    require(case, backend)
    shape = usual(case)
    tensors = tensors_of(case, shape, device="cuda:1")
    with fusedtricks.backend(backend), torch.cuda.device(0):
        ours = forward_backward(case, case.fn, tensors, shape)
    assert all(t.device == tensors[0].device for t in ours)
    check(case, ours, tensors, shape)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_small_on_two_devices_at_once_is_refused() -> None:
    """Not read from the wrong one's memory."""
    x, there = torch.randn(4, 8, 6, 6, device="cuda:0"), torch.randn(4, 8, 6, 6, device="cuda:1")
    seed, alpha = (torch.ones(1, dtype=d, device="cuda:1") for d in (torch.int64, torch.float32))
    perm, box = torch.arange(4, device="cuda:1"), torch.tensor([[0, 2, 0, 2]], device="cuda:1")
    counted = [torch.zeros(8, device="cuda:0"), torch.ones(8, device="cuda:0"), torch.zeros((), dtype=torch.int64)]
    calls = {
        "dropout_fwd": (x, seed, 32768, 1),
        "shake_shake_fwd": (x, there, alpha.to(x.device)),
        "mixup_fwd": (x, alpha, perm.to(x.device), None, None, x.dtype),
        "cutmix_fwd": (x, perm.to(x.device), box),
        "dropout_add_layer_norm_fwd": (x, there, None, None, None, 65536, 1e-5, 1, True),
        "batch_norm_fwd": (x, None, None, None, *counted, 0.1, 1e-5, 0, 0.0, True, False),
    }
    for name, args in calls.items():
        op = Op.registry[name]
        if "cuda" in op.available():
            with pytest.raises(RuntimeError, match="device of"):
                op.implementation("cuda")(*args)
