"""SyncBatchNorm over two processes with gloo, against one process on the concatenated batch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sweep import INTERPRETED

import fusedtricks

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="made of operators that the interpreter runs in the parity sweep"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]
close = torch.testing.assert_close
# (samples of each process), what the batch is like
SPLITS = {"even": (4, 4), "uneven": (3, 5), "one sample here": (1, 6), "an empty rank": (0, 5), "nothing": (0, 0)}
SHAPES = {"rows": (7,), "planes": (5, 6, 3)}


def _worker(rank: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_processes(work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (folder, work, args), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _train(rank: int, module: torch.nn.Module, steps: list[tuple[list, list]]) -> dict[str, Any]:
    results, module = [], copy.deepcopy(module)  # what comes from another process lies in memory that all share
    for xs, dys in steps:
        x = xs[rank].requires_grad_()
        y = module(x)
        wanted = [x, *module.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, dys[rank])])
    return {"results": results, "state": module.state_dict()}


def _all(rank: int, runs: list[tuple[torch.nn.Module, list]]) -> list[dict[str, Any]]:
    return [_train(rank, module, steps) for module, steps in runs]


def make(
    split: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype, mean: float, options: dict[str, Any]
) -> tuple[torch.nn.Module, list]:
    channels = shape[0]
    module = fusedtricks.nn.SyncBatchNorm(channels, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    fresh = lambda shift: [(torch.randn(n, *shape) + shift).to(dtype) for n in split]  # noqa: E731
    return module, [(fresh(mean), fresh(0)) for _ in range(2)]


RUNS = {
    **{
        f"{split} {shape}": (SPLITS[split], SHAPES[shape], torch.float32, 1.0, {})
        for split in SPLITS
        for shape in SHAPES
    },
    "bf16": (SPLITS["uneven"], SHAPES["planes"], torch.bfloat16, 1.0, {}),
    "fp64": (SPLITS["uneven"], SHAPES["planes"], torch.float64, 1.0, {"dtype": torch.float64}),
    "a mean of 1e5": (SPLITS["uneven"], SHAPES["planes"], torch.float32, 1e5, {}),
    "not affine": (SPLITS["uneven"], SHAPES["planes"], torch.float32, 1.0, {"affine": False}),
    "no bias": (SPLITS["uneven"], SHAPES["planes"], torch.float32, 1.0, {"bias": False}),
    "cumulative average": (SPLITS["uneven"], SHAPES["rows"], torch.float32, 1.0, {"momentum": None}),
    "untracked": (SPLITS["uneven"], SHAPES["rows"], torch.float32, 1.0, {"track_running_stats": False}),
}


def test_two_processes_are_one_batch() -> None:
    runs = [make(*run) for run in RUNS.values()]
    both = on_two_processes(_all, runs)
    for i, name in enumerate(RUNS):
        module, steps = copy.deepcopy(runs[i])
        options = RUNS[name][4]
        one = torch.nn.BatchNorm1d(module.num_features, **options).double()
        one._check_input_dim = lambda x: None
        one.load_state_dict(module.state_dict())
        results = [ranks[i]["results"] for ranks in both]
        for step, (xs, dys) in enumerate(steps):
            x = torch.cat(xs).detach().double().requires_grad_()
            y = one(x)
            grads = torch.autograd.grad(y, [x, *one.parameters()], torch.cat(dys).double())
            tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[xs[0].dtype]
            said = lambda m, n=name: f"{n}: {m}"  # noqa: E731
            same = lambda a, b: close(a.double(), b.detach(), rtol=tolerance, atol=tolerance, msg=said)  # noqa: E731, B023
            for k, truth in enumerate((y, grads[0])):
                same(torch.cat([r[step][k] for r in results]), truth)
            for k, truth in enumerate(grads[1:], 2):
                same(results[0][step][k] + results[1][step][k], truth)
        for ranks in both:
            for key, value in one.state_dict().items():
                close(ranks[i]["state"][key].double(), value.double(), rtol=1e-5, atol=1e-5, msg=said)


class Formula(torch.nn.Module):
    """What `of` computes from a whole batch. (torch's third derivatives take the statistics for constants.)"""

    def __init__(self, of: torch.nn.Module):
        super().__init__()
        self.eps = of.eps
        for name in ("weight", "bias"):
            p = getattr(of, name)
            setattr(self, name, p if p is None else torch.nn.Parameter(p.detach().double()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        over = (0, *range(2, x.dim()))
        mean = x.mean(over, keepdim=True)
        var = (x - mean).square().mean(over, keepdim=True)
        weight, bias = (p if p is None else p.reshape(mean.shape) for p in (self.weight, self.bias))
        return (x - mean) / (var + self.eps).sqrt() * (1 if weight is None else weight) + (0 if bias is None else bias)


def _derivatives(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor, into_x: bool) -> list[list[torch.Tensor]]:
    """The gradients of a loss, of a penalty on them, and of one on those.

    What a process adds to a penalty is its own samples' part: over the processes they sum to that of the whole batch.
    """
    wanted = [*([x.requires_grad_()] if into_x else []), *module.parameters()]
    loss = (module(x).square() * dy).sum()
    found = []
    for _ in range(3):
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        found.append([g.detach() for g in grads])
        loss = sum((g * torch.linspace(1, 2, g.shape[-1], dtype=g.dtype)).sum() for g in grads)
        if into_x:
            loss = loss + (grads[0].flatten(1).square().sum(1) + 1e-3).sqrt().sum()
    return found


def _all_derivatives(rank: int, runs: list[tuple[torch.nn.Module, list, bool]]) -> list[list[list[torch.Tensor]]]:
    return [_derivatives(copy.deepcopy(m), xs[rank], dys[rank], into_x) for m, [(xs, dys), _], into_x in runs]


DOUBLE = {"dtype": torch.float64}
# As RUNS; is the input differentiated, or the parameters alone?
DERIVATIVES = {
    **{
        f"{split} {shape}": ((SPLITS[split], SHAPES[shape], torch.float64, 1.0, DOUBLE), True)
        for split in SPLITS
        for shape in SHAPES
    },
    "parameters": ((SPLITS["uneven"], SHAPES["planes"], torch.float64, 1.0, DOUBLE), False),
    "parameters, an empty rank": ((SPLITS["an empty rank"], SHAPES["rows"], torch.float64, 1.0, DOUBLE), False),
    "not affine": ((SPLITS["uneven"], SHAPES["planes"], torch.float64, 1.0, {"affine": False}), True),
    "no bias": ((SPLITS["an empty rank"], SHAPES["rows"], torch.float64, 1.0, {"bias": False, **DOUBLE}), True),
    "fp32": ((SPLITS["uneven"], SHAPES["planes"], torch.float32, 1.0, {}), True),
    "a mean of 1e5": ((SPLITS["uneven"], SHAPES["planes"], torch.float32, 1e5, {}), True),
}


def test_derivatives_of_derivatives() -> None:
    runs = [(*make(*run), into_x) for run, into_x in DERIVATIVES.values()]
    both = on_two_processes(_all_derivatives, runs)
    for name, (module, [(xs, dys), _], into_x), *found in zip(DERIVATIVES, runs, *both, strict=True):
        truth = _derivatives(Formula(module), torch.cat(xs).detach().double(), torch.cat(dys).double(), into_x)
        for order, (whole, *parts) in enumerate(zip(truth, *found, strict=True), 1):
            for k, (right, *mine) in enumerate(zip(whole, *parts, strict=True)):
                said = lambda m, of=f"{name}, order {order}, gradient {k}": f"{of}: {m}"  # noqa: E731
                merged = (torch.cat(mine) if into_x and k == 0 else sum(mine)).double()
                tolerance = 1e-9 if xs[0].dtype == torch.float64 else 1e-3
                scale = max([1.0, *right.abs().flatten().tolist()])
                close(merged, right, rtol=0, atol=tolerance * scale, msg=said)


def _group(rank: int, x: torch.Tensor) -> torch.Tensor:
    groups = [dist.new_group([r]) for r in range(2)]
    return fusedtricks.nn.SyncBatchNorm(4, process_group=groups[rank])(x + rank * x.square())


def test_process_groups_keep_apart() -> None:
    x = torch.randn(5, 4)
    for rank, y in enumerate(on_two_processes(_group, x)):
        close(y, torch.nn.BatchNorm1d(4)(x + rank * x.square()))


def _compiled(rank: int, module: torch.nn.Module, xs: list[torch.Tensor]) -> Any:
    found = []
    for run in (copy.deepcopy(module), torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")):
        x = xs[rank].clone().requires_grad_()
        y = run(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *run.parameters()]), *run.buffers()])
    return found


def test_fullgraph() -> None:
    module = fusedtricks.nn.SyncBatchNorm(4)
    for eager, compiled in on_two_processes(_compiled, module, [torch.randn(n, 4, 3) for n in (3, 5)]):
        close(compiled, eager)


def _collectives(rank: int, x: torch.Tensor) -> int:
    from torch.distributed import _functional_collectives as collectives

    count = []
    gather = "all_gather_single" if hasattr(collectives, "all_gather_single") else "all_gather_tensor"
    for name in (gather, "all_reduce"):
        right = getattr(collectives, name)
        setattr(collectives, name, lambda *a, right=right: count.append(1) or right(*a))
    fusedtricks.nn.SyncBatchNorm(4)(x.requires_grad_()).square().sum().backward()
    return len(count)


def test_one_collective_per_direction() -> None:
    assert on_two_processes(_collectives, torch.randn(5, 4)) == [2, 2]


# ---- one process -----------------------------------------------------------------------------------------------------


def test_without_a_group_it_is_batch_norm() -> None:
    x = torch.randn(5, 4, 3)
    ours, theirs = fusedtricks.nn.SyncBatchNorm(4), torch.nn.BatchNorm1d(4)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        close(ours(x), theirs(x))
    close(ours.state_dict(), theirs.state_dict())


def test_convert_keeps_everything() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(torch.nn.BatchNorm2d(4, momentum=None), torch.nn.ReLU())
    ).eval()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    seen = []
    model[1][0].register_forward_hook(lambda *_: seen.append(1))
    before = model(torch.ones(2, 3, 4, 4))
    converted = fusedtricks.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1][0]) is fusedtricks.nn.SyncBatchNorm
    assert list(converted.state_dict()) == keys
    assert all(p is parameters[n] for n, p in converted.named_parameters())
    assert not converted[1][0].training
    assert converted[1][0].momentum is None
    close(converted(torch.ones(2, 3, 4, 4)), before)
    assert len(seen) == 2
    alone = torch.nn.BatchNorm1d(3)
    fusedtricks.nn.SyncBatchNorm.convert_sync_batchnorm(alone).bias = None
    assert alone.bias is not None
    assert type(fusedtricks.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))) is type(converted[1][0])


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least 2D input"):
        fusedtricks.nn.SyncBatchNorm(4)(torch.randn(4))
    with pytest.raises(ValueError, match="more than 1 value"):
        fusedtricks.nn.SyncBatchNorm(4)(torch.randn(1, 4))
    with pytest.raises(TypeError, match="BatchNormAct2d"):
        fusedtricks.nn.SyncBatchNorm.convert_sync_batchnorm(fusedtricks.nn.BatchNormAct2d(4))
