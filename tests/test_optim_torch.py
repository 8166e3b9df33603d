"""torch's own optimizer database, with our classes in the place of its fused implementations."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from fusedtricks import optim

NAMES = ("Adagrad", "Adam", "AdamW", "NAdam", "RMSprop", "SGD")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}
SAMPLES = [
    pytest.param(name, sample.kwargs, id=f"{name}-{sample.desc}-{i}")
    for name in NAMES
    for i, sample in enumerate(INFOS[name].optim_inputs_func(device="cpu"))
]
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}-{i}")
    for name in NAMES
    for i, error in enumerate(INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32))
]
SHAPES = ((4, 6), (7,), (0,), (3, 2, 5), ())  # torch's tests end with a 0-dim one, which must not be left out


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 10)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step, params[0].dtype), strict=True):
            p.grad = None if step % 7 == 3 else g  # a step with no gradients at all is no step
        optimizer.step()


def both(name: str, kwargs: dict[str, Any], steps: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    ours, theirs = parameters(dtype), parameters(dtype)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("foreach", "fused")}
    a, b = (
        getattr(optim, name)(ours, **copy.deepcopy(kwargs)),
        getattr(torch.optim, name)(theirs, foreach=False, **copy.deepcopy(kwargs)),
    )
    run(a, ours, range(steps))
    run(b, theirs, range(steps))
    return a, ours, b, theirs


def assert_same_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tolerance: float) -> None:
    mine, other = a.state_dict()["state"], b.state_dict()["state"]
    assert mine.keys() == other.keys()
    for i, state in other.items():
        assert list(mine[i]) == list(state)
        for key, value in state.items():
            if value is not None:
                torch.testing.assert_close(mine[i][key], value, **tolerance)


@pytest.mark.parametrize(("name", "kwargs"), SAMPLES)
def test_samples(name: str, kwargs: dict[str, Any]) -> None:
    a, ours, b, theirs = both(name, kwargs, 9)
    # torch rounds NAdam's running product to float32 before it is multiplied; we after.
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if name == "NAdam" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert_same_states(a, b, **tolerance)


@pytest.mark.parametrize(("name", "kwargs"), SAMPLES)
def test_state_dicts_load_both_ways(name: str, kwargs: dict[str, Any]) -> None:
    """Bit for bit; each then goes on with the other's state as the other would have."""
    a, ours, b, theirs = both(name, kwargs, 3, torch.float32)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("foreach", "fused")}
    into_ours = getattr(optim, name)(parameters(torch.float32), **copy.deepcopy(kwargs))
    into_theirs = getattr(torch.optim, name)(parameters(torch.float32), foreach=False, **copy.deepcopy(kwargs))
    into_ours.load_state_dict(copy.deepcopy(b.state_dict()))
    into_theirs.load_state_dict(copy.deepcopy(a.state_dict()))
    assert_same_states(into_ours, b, rtol=0, atol=0)
    assert_same_states(into_theirs, a, rtol=0, atol=0)
    for loaded, source, values in ((into_ours, b, theirs), (into_theirs, a, ours)):
        params = [p for g in loaded.param_groups for p in g["params"]]
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        run(loaded, params, range(3, 6))
        run(source, values, range(3, 6))
        torch.testing.assert_close(params, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors(name: str, error: Any) -> None:
    sample, cls = error.optimizer_error_input, getattr(optim, name)
    make = lambda: cls(sample.params, **sample.kwargs)  # noqa: E731
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expected(error.error_type, match=error.error_regex):
            make()
    else:
        optimizer = make()
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_50_steps_in_float64(name: str, implementation: str) -> None:
    """Ours under every flag that torch takes follows torch's loop."""
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[implementation]
    ours, theirs = parameters(), parameters()
    kwargs = {"lr": 0.01, "weight_decay": 0.1}
    run(getattr(optim, name)(ours, **kwargs, **flags), ours, range(50))
    run(getattr(torch.optim, name)(theirs, foreach=False, **kwargs), theirs, range(50))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """No further from the float64 trajectory than torch."""
    truth = parameters()
    with torch.no_grad():
        for p, q in zip(truth, parameters(dtype), strict=True):
            p.copy_(q)
    kwargs = {"lr": 0.01, "weight_decay": 0.1} | ({"eps": 1e-4} if name != "SGD" else {})
    exact = getattr(torch.optim, name)(truth, foreach=False, **kwargs)
    for step in range(5):
        for p, g in zip(truth, gradients(step, dtype), strict=True):
            p.grad = None if step % 7 == 3 else g.double()
        exact.step()
    _, ours, _, theirs = both(name, kwargs, 5, dtype)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        if t.numel():
            ulp = torch.finfo(dtype).eps * max(1.0, t.abs().max().item())
            assert (a.double() - t).abs().max() <= (b.double() - t).abs().max() + 4 * ulp


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_and_hooks(name: str) -> None:
    ours, theirs = parameters(), parameters()
    seen = []
    for cls, params in ((getattr(optim, name), ours), (getattr(torch.optim, name), theirs)):
        optimizer = cls(params, lr=0.1)
        optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
            ],
            milestones=[3],
        )
        for step in range(8):
            run(optimizer, params, range(step, step + 1))
            scheduler.step()
    assert seen[:8] == seen[8:]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("old", "name"), list(itertools.product([True, False], NAMES)))
def test_older_state_dicts(old: bool, name: str) -> None:
    """Groups without the keys of today, steps that are numbers."""
    a, ours, _, _ = both(name, {"lr": 0.01}, 2)
    saved = copy.deepcopy(a.state_dict())
    for state in saved["state"].values():
        if old and "step" in state:
            state["step"] = float(state["step"])
    for group in saved["param_groups"]:
        for key in ("foreach", "fused", "maximize", "differentiable", "capturable"):
            group.pop(key, None)
    again = getattr(optim, name)([copy.deepcopy(p) for p in ours], lr=0.01)
    again.load_state_dict(saved)
    params = again.param_groups[0]["params"]
    run(again, params, range(4, 6))
    run(a, ours, range(4, 6))
    torch.testing.assert_close(params, ours, rtol=0, atol=0)
