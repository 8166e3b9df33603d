"""The optimizers' arguments, and what torch calls around a step: closures, hooks, profilers, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import each_name, make
from torch import Tensor
from torch.optim import optimizer

from fusedtricks import optim


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"master_weights": "bf16"}, "Invalid master_weights"),
        ({"state_dtype": torch.float16}, "Invalid state_dtype"),
        ({"max_grad_norm": -1.0}, "Invalid max_grad_norm"),
        ({"ema_decay": 2.0}, "Invalid ema_decay"),
        ({"master_weights": "fp32", "stochastic_rounding": True}, "stochastic_rounding is for weights without them"),
        ({"fused": False, "ema_decay": 0.9}, "run torch's AdamW, without additions"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW([torch.zeros(2)], **kwargs)


def test_remainders_are_for_bfloat16() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    p.grad = torch.zeros_like(p)
    for options in ({"master_weights": "remainder"}, {"stochastic_rounding": True}):
        with pytest.raises(ValueError, match=r"is for bfloat16 parameters, got torch\.float16"):
            optim.AdamW([p], **options).step()


@each_name
def test_fused_false_and_differentiable_run_torch(name: str) -> None:
    for flags in ({"fused": False}, {"differentiable": True}):
        p, q = torch.ones(3), torch.ones(3)  # differentiating a step of a leaf is torch's error
        seen: list[int] = []
        a = make(name, [p], **flags)
        a.register_step_pre_hook(lambda *_, seen=seen: seen.append(1))
        b = make(name, [q], theirs=True)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        a.step()
        b.step()
        torch.testing.assert_close(p, q)
        assert seen == [1]
        assert not a._step_supports_amp_scaling


@each_name
def test_signature_and_class(name: str) -> None:
    import inspect

    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    mine, other = (inspect.signature(c).parameters for c in (ours, theirs))
    for key, parameter in other.items():
        assert mine[key].default == parameter.default
        assert mine[key].kind == parameter.kind
    assert list(mine)[: len(other)] == list(other)
    a, b = (c([torch.zeros(2)], lr=0.1) for c in (ours, theirs))
    assert {k: v for k, v in a.defaults.items() if k in b.defaults} == b.defaults
    assert str(a).startswith(str(b).split("(")[0])


def test_closure() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    o = optim.AdamW([p])

    def closure() -> Tensor:
        o.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert o.step(closure).item() == 2.0
    assert (p < 1).all()


def test_hooks_and_profilers_see_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones_like(p)
    o = optim.SGD([p], lr=1.0)
    seen: list[str] = []
    o.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        o.step()
    assert "Optimizer.step#SGD.step" in [event.key for event in trace.key_averages()]
    hooks = {
        "any before": optimizer.register_optimizer_step_pre_hook,
        "before": o.register_step_pre_hook,
        "after": o.register_step_post_hook,
        "any after": optimizer.register_optimizer_step_post_hook,
    }
    handles = [register(lambda *_, name=name: seen.append(name)) for name, register in hooks.items()]
    o.step()
    assert seen == list(hooks)
    for handle in handles:
        handle.remove()
    for name, register in hooks.items():  # each alone is enough
        seen.clear()
        handle = register(lambda *_, name=name: seen.append(name))
        o.step()
        handle.remove()
        o.step()
        assert seen == [name]
    assert (p == 1 - 11).all()


def test_under_compile() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    a, b = optim.AdamW([p]), optim.AdamW([q])
    step = torch.compile(lambda: a.step(), backend="eager")
    for i in range(4):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.1 / (i + 1)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        step()
        b.step()
    assert torch.equal(p, q)
