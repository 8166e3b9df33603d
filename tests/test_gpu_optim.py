"""The optimizers on a real GPU: parity, graphs, syncs, launches, repeatability. `make gpu-check` picks by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optim_tables import ALIGNMENTS, BF16, FP32, FP64, RULES, Entry, Problem, assert_same, every_kind
from parity import assert_bitwise_equal
from torch import Tensor

import fusedtricks
from fusedtricks import optim

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
DEVICE = "cuda"
TILE = 8192
# The GPU contracts multiplications and additions, and its pow differs from the CPU's in its last bits.
ULPS = 8
CAPTURABLE = {"adamw", "nadam", "rmsprop"}  # torch's classes that have the flag ask for it
CLASSES = {"adamw": "AdamW", "nadam": "NAdam", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
MANY = [*every_kind(45), *ALIGNMENTS, Entry(0), Entry(3 * TILE + 5, offset=1), Entry(TILE, BF16, stochastic=True)]

each_stem = pytest.mark.parametrize("stem", RULES)
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


def kernel(stem: str, backend: str) -> Callable[..., None]:
    op = RULES[stem].op
    if backend not in op.available():
        pytest.skip(f"no {backend} kernel for {op.name}")
    return op.implementation(backend)


@each_stem
@each_backend
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "grad_scale": 2.0, "found_inf": 0.0}], ids=["plain", "all"])
def test_small(stem: str, backend: str, options: dict[str, Any]) -> None:
    """Every kind, feature and alignment: what compute-sanitizer looks at."""
    # Triton leaves a table with float64 parameters to the reference.
    entries = [e for e in MANY if backend == "cuda" or e.dtype != FP64]
    ours = Problem(stem, entries, device=DEVICE).run(kernel(stem, backend), steps=2, **options)
    theirs = Problem(stem, entries)
    assert_same(ours, theirs.run(theirs.reference, steps=2, **options), ulps=ULPS)


@each_stem
@each_backend
def test_small_found_inf(stem: str, backend: str) -> None:
    ours = Problem(stem, MANY, device=DEVICE).run(kernel(stem, backend), found_inf=2.0, grad_scale=8.0)
    before = Problem(stem, MANY).tensors()
    assert ours.outcome[1].item() == 1
    for name, t in ours.tensors().items():
        assert name == "outcome" or torch.equal(t.cpu(), before[name]), f"{name} was written"


@each_stem
@each_backend
def test_determinism_of_many_runs(stem: str, backend: str) -> None:
    entries = [e for e in MANY if e.dtype != FP64] + [Entry(300 * TILE + 7)]
    first = Problem(stem, entries, device=DEVICE).run(kernel(stem, backend), max_norm=1.0, steps=2)
    for _ in range(10):
        assert_same(Problem(stem, entries, device=DEVICE).run(kernel(stem, backend), max_norm=1.0, steps=2), first, 0)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = FP32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in (5, 1000, 3 * TILE + 1, 64, 1)]
    return [torch.nn.Parameter(v.to(DEVICE, dtype)) for v in values]


def set_grads(params: Sequence[torch.nn.Parameter], seed: int) -> None:
    """In place from the second time on, as a captured step needs it."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


def make(stem: str, params: Sequence[torch.nn.Parameter], **options: Any) -> optim.FusedOptimizer:
    half = len(params) // 2
    return getattr(optim, CLASSES[stem])([{"params": params[:half]}, {"params": params[half:], "lr": 0.02}], **options)


def capturable(stem: str) -> dict[str, bool]:
    return {"capturable": True} if stem in CAPTURABLE else {}


def results(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    states = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*params, *states)]


def warm_up(captured: Any, ours: list[Any], eager: Any, theirs: list[Any]) -> None:
    """Three steps of both with the same gradients, those that a capture follows on a stream beside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            set_grads(ours, i)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for i in range(3):
        set_grads(theirs, i)
        eager.step()


@each_stem
@each_backend
def test_graphs_obey_changed_hyperparameters(stem: str, backend: str) -> None:
    """A captured step with another lr and weight decay at every replay gives the bits of the eager steps."""
    kernel(stem, backend)
    ours, theirs = parameters(), parameters()
    with fusedtricks.backend(backend):
        options = {"max_grad_norm": 1.0, "ema_decay": 0.9, **capturable(stem)}
        captured, eager = (make(stem, p, lr=0.01, **options) for p in (ours, theirs))
        warm_up(captured, ours, eager, theirs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for i in range(20):
            for optimizer in (captured, eager):
                for group in optimizer.param_groups:
                    group["lr"], group["weight_decay"] = 0.01 / (i + 1), 0.1 * i
            set_grads(ours, 10 + i)
            set_grads(theirs, 10 + i)
            captured.push_hyperparameters()
            graph.replay()
            eager.step()
    for a, b in zip(results(captured), results(eager), strict=True):
        assert_bitwise_equal(a, b)


@each_backend
@pytest.mark.parametrize("stem", ["adamw", "nadam", "sgd"])
def test_graphs_read_a_tensor_lr(stem: str, backend: str) -> None:
    """On the GPU, where the kernel reads it: no push before a replay, no wait before a step."""
    kernel(stem, backend)
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.01, device=DEVICE)
    with fusedtricks.backend(backend):
        captured = getattr(optim, CLASSES[stem])(ours, lr=lr, foreach=False, **capturable(stem))
        eager = getattr(optim, CLASSES[stem])(theirs, lr=0.01)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):
                set_grads(ours, i)
                set_grads(theirs, i)
                captured.step()
                eager.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        torch.cuda.synchronize()
        for i in range(5):
            set_grads(ours, 10 + i)
            set_grads(theirs, 10 + i)
            lr.fill_(2.0**-i)
            eager.param_groups[0]["lr"] = 2.0**-i
            graph.replay()
            eager.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        eager.step()
    # Before the loop the rates were 0.01 and what float32 makes of it.
    for a, b in zip(results(captured), results(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stem", ["adamw", "sgd"])
@each_backend
def test_graphs_and_eager_steps_in_turn(stem: str, backend: str) -> None:
    """Each with gradients of its own; then an eager step without one of them, after which the table is another."""
    kernel(stem, backend)
    ours, theirs = parameters(), parameters()
    with fusedtricks.backend(backend):
        captured, eager = (make(stem, p, lr=0.01, **capturable(stem)) for p in (ours, theirs))
        warm_up(captured, ours, eager, theirs)
        of_graph, others = [p.grad for p in ours], [torch.empty_like(p) for p in ours]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for i in range(8):
            for p, replayed, other in zip(ours, of_graph, others, strict=True):
                p.grad = other if i % 2 else replayed
            for params in (ours, theirs):
                set_grads(params, 10 + i)
            if i == 5:
                ours[0].grad = theirs[0].grad = None
            if i % 2:
                captured.step()
                for n in (1, 2, 12, 80, 200) * 20:
                    torch.full((n,), -1, device=DEVICE)  # where freed tables were
            else:
                graph.replay()
            eager.step()
    for a, b in zip(results(captured), results(eager), strict=True):
        assert_bitwise_equal(a, b)


@each_stem
@each_backend
def test_graphs_late_pushes_change_no_earlier_step(stem: str, backend: str) -> None:
    """A host that runs ahead brings every step the rate it had then."""
    kernel(stem, backend)
    ours, theirs = parameters(), parameters()
    with fusedtricks.backend(backend):
        a, b = (make(stem, p, lr=0.01) for p in (ours, theirs))
        for optimizer, params in ((a, ours), (b, theirs)):
            set_grads(params, 0)
            optimizer.step()
            torch.cuda.synchronize()
            for i in range(6):
                if optimizer is a:
                    torch.cuda._sleep(20_000_000)
                else:
                    torch.cuda.synchronize()
                optimizer.param_groups[0]["lr"] = 2.0**-i
                optimizer.step()
    for x, y in zip(results(a), results(b), strict=True):
        assert_bitwise_equal(x, y)


def test_graphs_refuse_parameters_without_gradients() -> None:
    params = parameters()
    optimizer = make("adamw", params, lr=0.01, capturable=True)
    set_grads(params, 0)
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    with pytest.raises(RuntimeError, match="have no gradient"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@each_stem
@each_backend
def test_sync_never(stem: str, backend: str) -> None:
    """Neither in a stable step nor after a change of lr, with a scaler's tensors and clipping."""
    kernel(stem, backend)
    params = parameters(BF16)
    with fusedtricks.backend(backend):
        optimizer = make(stem, params, lr=0.01, max_grad_norm=1.0, master_weights="remainder")
        optimizer.grad_scale, optimizer.found_inf = torch.full((), 2.0, device=DEVICE), torch.zeros((), device=DEVICE)
        for i in range(2):
            set_grads(params, i)
            optimizer.step()  # the first may compile
        torch.cuda.set_sync_debug_mode("error")
        try:
            for lr in (0.01, 0.02, 0.03):
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_stem
@each_backend
@pytest.mark.parametrize(("options", "launches"), [({}, 1), ({"max_grad_norm": 1.0}, 2)], ids=["plain", "clipping"])
def test_small_number_of_launches(stem: str, backend: str, options: dict[str, Any], launches: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    kernel(stem, backend)
    params = parameters()
    with fusedtricks.backend(backend):
        optimizer = make(stem, params, lr=0.01, **options)
        for i in range(2):
            set_grads(params, i)
            optimizer.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            optimizer.step()
            torch.cuda.synchronize()
    on_device = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    assert len(kernels) == launches, kernels


@each_backend
def test_grad_scaler(backend: str) -> None:
    """An overflow skips the step, count and all; the next one is as if it had not been."""
    kernel("adamw", backend)
    ours, theirs = parameters(), parameters()
    with fusedtricks.backend(backend):
        a, b = (make("adamw", p, lr=0.01) for p in (ours, theirs))
        scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
        for i, overflow in enumerate((False, True, False)):
            set_grads(theirs, i)
            scale = scaler.scale(torch.ones((), device=DEVICE))
            set_grads(ours, i)
            for p in ours:
                p.grad.mul_(scale if not overflow else float("inf"))
            scaler.step(a)
            scaler.update()
            assert bool(a.step_skipped) == overflow
            if not overflow:
                b.step()
    for x, y in zip(results(a), results(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@each_backend
def test_on_the_stream_of_the_caller(backend: str) -> None:
    """Trap 24: gradients that come late on a side stream; the step on that stream, another device current."""
    kernel("sgd", backend)
    params, side = parameters(), torch.cuda.Stream()
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    with fusedtricks.backend(backend):
        optimizer = make("sgd", params, lr=0.02)
        optimizer.step()  # the first may compile
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for p in params:
                p.grad.fill_(1.0)
            last = torch.cuda.device_count() - 1
            with torch.cuda.device(last) if last else contextlib.nullcontext():
                optimizer.step()
        side.synchronize()
    for p, value in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), value - 0.02)


@each_backend
def test_more_elements_than_int32(backend: str) -> None:
    """Trap 17, with 8.6 GB of bfloat16."""
    kernel("sgd", backend)
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("needs 11 GB of free memory")
    p = torch.nn.Parameter(torch.zeros(count, dtype=BF16, device=DEVICE))
    small = torch.nn.Parameter(torch.zeros(7, dtype=BF16, device=DEVICE))
    p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
    with fusedtricks.backend(backend):
        optim.SGD([p, small], lr=1.0).step()
    for part in (p.detach()[:16], p.detach()[-16:], p.detach()[count // 2 :: 2**20], small.detach()):
        assert (part == -1).all()


@each_backend
def test_a_tensor_lr_of_several_devices(backend: str) -> None:
    """Trap 19: groups on a GPU, another device, and the GPU again in another dtype share one lr, which stays there."""
    kernel("adamw", backend)
    other = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    lr = torch.tensor(0.25, device=DEVICE)
    kinds = ((DEVICE, FP32), (other, FP32), (DEVICE, BF16))
    results = []
    for value in (lr, 0.25):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5).to(device, dtype)) for device, dtype in kinds]
        optimizer = optim.AdamW([{"params": [p], "lr": value} for p in params], foreach=False)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            with fusedtricks.backend(backend):
                optimizer.step()
        results.append([p.detach().cpu() for p in params])
        assert optimizer.param_groups[2]["lr"] is value
    assert lr.device.type == DEVICE
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)
