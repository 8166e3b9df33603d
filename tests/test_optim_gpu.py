"""The optimizers on a real GPU: parity, graphs, syncs. `make gpu-check` and CI with a GPU run it."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_cases import NAMES, make

import fusedtricks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
each_name = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
SIZES = ((20_000,), (7,), (0,), (3, 333), ())


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, device="cuda").to(dtype)) for s in SIZES]


def require(name: str, backend: str) -> None:
    if backend not in getattr(fusedtricks.optim, name).rule.op.available():
        pytest.skip(f"no {backend} kernel")


@each_name
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity_with_torch_on_the_cpu(name: str, backend: str, dtype: torch.dtype) -> None:
    require(name, backend)
    ours = parameters(dtype)
    truth = [torch.nn.Parameter(p.detach().double().cpu()) for p in ours]
    options = {"eps": 1e-2} if name != "SGD" else {}
    half = {"state_dtype": torch.float32, "master_weights": "fp32"} if dtype == torch.bfloat16 else {}
    a, b = make(name, ours, max_grad_norm=1.0, **options, **half), make(name, truth, theirs=True, **options)
    for _ in range(4):
        for p, q in zip(ours, truth, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double().cpu()
        torch.nn.utils.clip_grad_norm_(truth, 1.0)
        with fusedtricks.backend(backend):
            a.step()
        b.step()
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for p, q in zip(ours, truth, strict=True):
        torch.testing.assert_close(p.detach().double().cpu(), q.detach(), rtol=limit, atol=limit)


@each_name
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_obeys_later_changes(name: str, backend: str) -> None:
    require(name, backend)
    capturable = {"capturable": True} if name not in ("SGD", "Adagrad") else {}
    ps = parameters()
    for p in ps:
        p.grad = torch.randn_like(p)
    o = make(name, ps, **capturable)
    with fusedtricks.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                o.step()
        torch.cuda.current_stream().wait_stream(side)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
        eager = make(name, twins, **capturable)
        eager.load_state_dict(copy.deepcopy(o.state_dict()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o.step()
        for i in range(20):
            for p, q in zip(ps, twins, strict=True):
                p.grad.normal_()
                q.grad = p.grad.clone()
            for optimizer in (o, eager):
                group = optimizer.param_groups[0]
                group["lr"], group["weight_decay"] = 0.1 / (i + 1), 0.01 * i
                if "betas" in group:
                    group["betas"] = (0.8 + 0.005 * i, 0.99)
            o.push_hyperparameters()
            graph.replay()
            eager.step()
    for p, q in zip(ps, twins, strict=True):
        assert torch.equal(p, q)


@each_name
def test_capture_without_gradients_raises(name: str) -> None:
    capturable = {"capturable": True} if name not in ("SGD", "Adagrad") else {}
    ps = parameters()
    for p in ps[1:]:
        p.grad = torch.randn_like(p)
    o = make(name, ps, **capturable)
    o.step()
    with pytest.raises(RuntimeError, match="1 parameters have no gradient"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        o.step()


@each_name
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sync_never(name: str, backend: str) -> None:
    require(name, backend)
    ps = parameters()
    o = make(name, ps, max_grad_norm=1.0)
    with fusedtricks.backend(backend):
        for _ in range(2):
            for p in ps:
                p.grad = torch.randn_like(p)
            o.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for p in ps:
                p.grad = torch.randn_like(p)
            o.found_inf = torch.zeros(1, device="cuda")
            o.grad_scale = torch.ones(1, device="cuda")
            o.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
