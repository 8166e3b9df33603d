"""The optimizers' arguments, and what torch has about a step: closures, hooks, profilers, compilation, fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import each_name, make
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, is_fake
from torch.optim import optimizer

from fusedtricks import optim
from fusedtricks.ops import _optimizer


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


# ---- fake tensors ----------------------------------------------------------------------------------------------------


def _fakes(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """One laid out in rows, one in columns, one without a gradient."""
    ps = [torch.nn.Parameter(t) for t in (torch.zeros(3, 4, dtype=dtype), torch.zeros(4, 3, dtype=dtype).t())]
    for p in ps:
        p.grad = torch.empty_like(p)
    return [*ps, torch.nn.Parameter(torch.zeros(2, dtype=dtype))]


def _metadata(o: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of all states: fake or not, shape, dtype, device, strides."""
    states = [o.state.get(p, {}) for group in o.param_groups for p in group["params"]]
    return [{k: (is_fake(t), t.shape, t.dtype, t.device, t.stride()) for k, t in s.items()} for s in states]


@pytest.mark.parametrize("native", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_name
def test_fake_tensors(name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the mode and outside, states are torch's, and no value and no address is asked for."""
    if not native:
        monkeypatch.setattr(_optimizer, "_plan", None)
    with FakeTensorMode() as mode:
        params = [_fakes(dtype) for _ in range(2)]
        ours, theirs = (make(name, ps, theirs=ps is params[1]) for ps in params)
        for o in (ours, theirs):
            o.step()
            o.step()
    elsewhere = [make(name, ps, theirs=ps is params[1]) for ps in params]
    for o, ps in zip(elsewhere, params, strict=True):  # counts are real then
        for _ in range(2):
            before = ps[0]._version
            o.step()
            assert ps[0]._version > before
    assert _metadata(elsewhere[0]) == _metadata(elsewhere[1])
    assert [s["step"] for s in elsewhere[0].state.values() if "step" in s] == [
        s["step"] for s in elsewhere[1].state.values() if "step" in s
    ]
    with mode:
        assert _metadata(ours) == _metadata(theirs)
        assert [(p._version > 0, p.shape, p.stride()) for p in params[0]] == [
            (p._version > 0, p.shape, p.stride()) for p in params[1]
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("master_weights", ["fp32", "remainder"])
@each_name
def test_fake_tensors_with_additions(name: str, master_weights: str, dtype: torch.dtype) -> None:
    """States are those that real tensors get."""
    additions = {"max_grad_norm": 1.0, "ema_decay": 0.9, "master_weights": master_weights}
    with FakeTensorMode():
        fake = make(name, _fakes(dtype), **additions)
        for lr in (torch.full((), 0.1), 0.1):
            fake.param_groups[0]["lr"] = lr
            fake.step()
        assert fake.grad_norm.shape == fake.step_skipped.shape == ()
        with fake.averaged_parameters():
            pass
        fake.load_state_dict(fake.state_dict())
        fake.step()
    real = make(name, _fakes(dtype), **additions)
    real.step()
    of_fakes = [{k: v[1:] for k, v in s.items()} for s in _metadata(fake)]
    assert of_fakes == [{k: v[1:] for k, v in s.items()} for s in _metadata(real)]
    assert all(v[0] for s in _metadata(fake) for v in s.values())


@each_name
def test_fake_tensors_of_a_gpu(name: str) -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3, device="cuda"))
        p.grad = torch.ones_like(p)
        o = make(name, [p], max_grad_norm=1.0, capturable=True) if name == "AdamW" else make(name, [p])
        for _ in range(2):
            o.step()
        made = [*o.state[p].values(), o._outcome]  # whose elements only a torch with CUDA takes out
        assert all(is_fake(t) and t.device == p.device for t in made)


@each_name
def test_fake_tensors_without_gradients(name: str) -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3))
        o = make(name, [p])
        for _ in range(2):
            o.step()
        p.grad = torch.zeros(3)
        o.step()
        assert p._version > 0


@pytest.mark.parametrize("state", ["exp_avg", "step"])
def test_fake_states_of_real_parameters(state: str) -> None:
    """Left by a step in a mode that it does not belong in: refused, where a kernel would have been given no address."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    o = optim.AdamW([p])
    o.step()
    with FakeTensorMode():
        o.state[p][state] = torch.zeros(o.state[p][state].shape)
    with pytest.raises((AssertionError, DataDependentOutputException)):
        o.step()
