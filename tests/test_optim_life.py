"""The optimizers over their lives: what they hold, where they are used, what is done to their states and settings."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import close, each_name, make
from torch import Tensor

import fusedtricks
from fusedtricks import optim
from fusedtricks.ops import _optimizer, _table

DOUBLE = torch.float64


@pytest.fixture(params=[True, False], ids=["plan", "no plan"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """With the compiled step plan and without."""
    if not request.param:
        monkeypatch.setattr(_optimizer, "_plan", None)
    elif _optimizer._plan is None:
        pytest.skip("no compiled step plan in this build")
    return request.param


def parameter(n: int = 4, dtype: torch.dtype = DOUBLE) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=DOUBLE).to(dtype))
    p.grad = torch.linspace(2, 1, n, dtype=DOUBLE).to(dtype)
    return p


# ---- what they hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "transposed", "aside"])
def test_gradients_are_let_go(layout: str, native: bool) -> None:
    """All of them, the first ones too, and copies to another layout."""
    p = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2] if layout == "aside" else torch.zeros(4, 4))
    o = optim.SGD([p], lr=0.1)
    copies: list[Tensor] = []
    follow = _optimizer.follow

    def noted(*args: Tensor) -> Tensor:
        copies.append(follow(*args))
        return copies[-1]

    for _ in range(2):
        p.grad = torch.ones(4, 4).t() if layout == "transposed" else torch.ones(4, 4)
        storage = p.grad.untyped_storage()
        grads = [weakref.ref(p.grad)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_optimizer, "follow", noted)
            o.step()
        grads += [weakref.ref(t) for t in copies]
        copies.clear()
        o.zero_grad()
        assert [g() for g in grads] == [None] * len(grads)
        assert torch._C._storage_Use_Count(storage._cdata) == 1


def test_tensors_can_be_swapped(native: bool) -> None:
    p, q = parameter(), parameter()
    o = optim.AdamW([p], ema_decay=0.9)
    o.step()
    o.zero_grad()
    q.grad = None
    torch.utils.swap_tensors(p, q)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    o.step()
    assert not torch.equal(p, before)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = torch.nn.Linear(3, 3)
        o = optim.AdamW(module.parameters(), ema_decay=0.9)
        for dtype in (torch.float32, DOUBLE, torch.float32):
            module.to(dtype)
            module.load_state_dict(module.state_dict())
            module(torch.ones(1, 3, dtype=dtype)).sum().backward()
            o.step()
            o.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("where", ["parameter", "group", "state", "hook"])
def test_cycles_are_collected(where: str, native: bool) -> None:
    p = parameter()
    o = optim.AdamW([p])
    if where == "parameter":
        p.owner = o
    elif where == "hook":
        p.register_hook(lambda _, o=o: o.step())
    o.step()
    (o.state[p] if where == "state" else o.param_groups[0])["owner"] = o
    p.grad = torch.ones_like(p)
    o.step()
    gone = weakref.ref(o)
    del o, p
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(_optimizer._plan is None, reason="no compiled step plan in this build")
def test_a_plan_without_constructor_is_collected() -> None:
    plan = _optimizer._plan.Plan.__new__(_optimizer._plan.Plan)
    assert gc.is_tracked(plan)
    gc.collect()
    assert gc.get_referents(plan) == [type(plan)]


# ---- states of another dtype, device or shape ------------------------------------------------------------------------


def through_torch(o: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone())])
    theirs.load_state_dict(copy.deepcopy(o.state_dict()))
    return theirs.state_dict()


@each_name
def test_averages_of_another_dtype(name: str, native: bool) -> None:
    """After `module.double()`, and from a checkpoint."""
    for first, then in ((torch.float32, DOUBLE), (DOUBLE, torch.float32), (torch.float32, torch.bfloat16)):
        p = parameter(1000, first)
        o = make(name, [p], ema_decay=0.5)
        o.step()
        saved = copy.deepcopy(o.state_dict())
        p.data, p.grad = p.data.to(then), p.grad.to(then)
        q = parameter(1000, then)
        q.data.copy_(p)
        other = make(name, [q], ema_decay=0.5)
        other.load_state_dict(saved)
        for x, at in ((o, p), (other, q)):
            average = saved["state"][0]["ema"].double()
            x.step()
            assert x.state[at]["ema"].dtype == _table.accumulate_dtype(then)
            expected = 0.5 * average + 0.5 * at.detach().double()
            torch.testing.assert_close(x.state[at]["ema"].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["fp32", "remainder"])
def test_states_that_torch_loaded(mode: str, native: bool) -> None:
    """It gives all states the parameter's dtype."""
    p = parameter(1000, torch.bfloat16)
    o = optim.AdamW([p], master_weights=mode, ema_decay=0.5, lr=1e-4)
    o.step()
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad.clone()
    other = optim.AdamW([q], master_weights=mode, ema_decay=0.5, lr=1e-4)
    other.load_state_dict(through_torch(o, p))
    assert other.state[q]["master"].dtype == torch.bfloat16
    weights = lambda p, m: (m if mode == "fp32" else _table.join(p, m)).double()  # noqa: E731
    for x in (o, other):
        x.step()
    assert {k: v.dtype for k, v in other.state[q].items() if k in ("master", "ema")} == {
        k: v.dtype for k, v in o.state[p].items() if k in ("master", "ema")
    }
    torch.testing.assert_close(o.state[p]["ema"], other.state[q]["ema"], rtol=2**-7, atol=1e-3)
    mine, theirs = (weights(x, y.state[x]["master"]) for x, y in ((p, o), (q, other)))
    torch.testing.assert_close(mine, theirs, rtol=2**-7 if mode == "fp32" else 2**-15, atol=1e-4)


def test_remainders_that_torch_loaded_are_no_weights() -> None:
    p = parameter(1000, torch.bfloat16)
    o = optim.AdamW([p], master_weights="remainder", lr=1e-4)
    o.step()
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad.clone()
    other = optim.AdamW([q], master_weights="fp32", lr=1e-4)
    other.load_state_dict(through_torch(o, p))
    other.step()
    torch.testing.assert_close(other.state[q]["master"], p.detach().float(), rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize(("mode", "dtype"), [("fp32", torch.float16), ("fp32", DOUBLE), ("remainder", torch.float32)])
def test_masters_of_other_dtypes(mode: str, dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    o = optim.SGD([p], lr=0.1, master_weights=mode)
    o.state[p]["master"] = torch.full((100,), 1 + 2**-9, dtype=dtype)
    o.step()
    master = o.state[p]["master"]
    assert torch.equal(master if mode == "fp32" else _table.join(p.detach(), master), torch.full((100,), 1 + 2**-9))


@pytest.mark.parametrize("key", ["master", "ema", "exp_avg"])
def test_states_of_another_shape(key: str) -> None:
    p = parameter(8, torch.bfloat16)
    o = optim.AdamW([p], master_weights="fp32", ema_decay=0.9)
    o.step()
    o.state[p][key] = o.state[p][key][:4].clone()
    with pytest.raises(RuntimeError, match=f"expected state '{key}' of the parameter's shape"):
        o.step()


def test_averages_of_another_memory_format() -> None:
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5))
    o = optim.SGD([p], lr=0.0, ema_decay=0.5)
    p.grad = torch.zeros_like(p)
    o.state[p]["ema"] = p.detach().clone(memory_format=torch.channels_last)
    o.step()
    assert torch.equal(o.state[p]["ema"], p)
    assert not o._aside


def test_a_step_that_is_not_ours() -> None:
    """SGD has none; one of another optimizer's checkpoint is left as it is."""
    p = parameter()
    o = optim.SGD([p], lr=0.1, momentum=0.9, ema_decay=0.5)
    o.state[p]["step"] = torch.tensor(7, dtype=torch.int64)
    o.step()
    assert o.state[p]["step"] == 7


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "remainder"])
def test_masters_follow_what_was_written_before_the_averages_were_shown(mode: str, native: bool) -> None:
    p, q = (torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    o = optim.SGD([p, q], lr=2**-12, master_weights=mode, ema_decay=0.5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    o.step()
    with torch.no_grad():
        p.fill_(3.0)
    with o.averaged_parameters():
        pass
    o.step()
    for x, weight in ((p, 3.0 - 2**-12), (q, 1.0 - 2**-11)):
        master = o.state[x]["master"]
        master = master if mode == "fp32" else _table.join(x.detach(), master)
        torch.testing.assert_close(master, torch.full((8,), weight), rtol=0, atol=2**-20)


def test_averages_that_do_not_fit_change_nothing() -> None:
    ps = [parameter(), parameter()]
    o = optim.SGD(ps, lr=1.0, ema_decay=0.5)
    o.step()
    before = [p.detach().clone() for p in ps]
    o.state[ps[1]]["ema"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="size of tensor"), o.averaged_parameters():
        pass
    assert all(torch.equal(p, b) for p, b in zip(ps, before, strict=True))


def test_no_step_on_averages(native: bool) -> None:
    p = parameter()
    o = optim.SGD([p], lr=1.0, ema_decay=0.5)
    o.step()
    before, average = p.detach().clone(), o.state[p]["ema"].clone()
    with o.averaged_parameters():
        with o.averaged_parameters():
            pass
        with pytest.raises(RuntimeError, match="a step inside averaged_parameters"):
            o.step()
        assert torch.equal(p, average)
    assert torch.equal(p, before)
    o.step()


def test_another_ema_decay(native: bool) -> None:
    p = parameter()
    o = optim.SGD([p], lr=1.0, ema_decay=0.5)
    o.step()
    for decay in (0.25, 1.0, 0.0):
        o.ema_decay = decay
        average = o.state[p]["ema"].clone()
        o.step()
        torch.testing.assert_close(o.state[p]["ema"], decay * average + (1 - decay) * p.detach())
    with pytest.raises(ValueError, match=r"Invalid ema_decay: 1\.5"):
        o.ema_decay = 1.5
    assert [copy.deepcopy(o).ema_decay, pickle.loads(pickle.dumps(o)).ema_decay] == [0.0, 0.0]
    o.ema_decay = None
    o.step()
    average = o.state[p]["ema"].clone()
    o.step()
    assert torch.equal(o.state[p]["ema"], average)
    o.ema_decay = 0.0
    o.step()
    assert torch.equal(o.state[p]["ema"], p)


def test_a_stable_step_takes_another_ema_decay_without_a_table() -> None:
    if _optimizer._plan is None:
        pytest.skip("no compiled step plan in this build")
    p = parameter()
    o = optim.SGD([p], lr=1.0, ema_decay=0.5)
    o.step()
    plan, o.ema_decay = o._plan, 0.25
    assert o._plan is plan
    assert plan.check(o.param_groups, o.state) == _optimizer.HYPERS
    assert plan.check(o.param_groups, o.state) == 0


# ---- modes and defaults that they are found in -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_results_whatever_the_default_dtype(default: torch.dtype, backend: str, native: bool) -> None:
    if backend == "cpu" and not optim.SGD.rule.op.cpu:
        pytest.skip("no compiled kernels in this build")
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float32))
    p.grad = torch.full((4,), 1.5, dtype=torch.float32)
    torch.set_default_dtype(default)
    try:
        o = optim.SGD([p], lr=0.1, max_grad_norm=1.0)
        assert (o.grad_norm.dtype, o.step_skipped.dtype) == (torch.float32, torch.bool)
        with fusedtricks.backend(backend):
            o.step()
            assert (o.grad_norm.dtype, o.grad_norm.item(), o.step_skipped.item()) == (torch.float32, 3.0, False)
            o.found_inf = torch.ones((), dtype=torch.float32)
            o.step()
        assert o.step_skipped.item()
    finally:
        torch.set_default_dtype(torch.float32)


@each_name
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["plain", "aside"])
def test_tables_whatever_the_default_device(name: str, backend: str, layout: str, native: bool) -> None:
    if backend == "cpu" and not optim.SGD.rule.op.cpu:
        pytest.skip("no compiled kernels in this build")
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        values = [torch.randn(10, dtype=dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)]
        ps = [torch.nn.Parameter(v[::2] if layout == "aside" and i == 0 else v) for i, v in enumerate(values)]
        for p in ps:
            p.grad = torch.randn_like(p)
        all_ = []
        for options in ({"master_weights": "remainder"}, {"stochastic_rounding": True}):
            with torch.device("cpu" if name == "Adagrad" else device):  # whose states torch's constructor makes
                o = make(name, ps, max_grad_norm=1.0, ema_decay=0.9, **options)
            with torch.device(device), fusedtricks.backend(backend):
                assert not o.grad_norm.is_meta
                assert not o.step_skipped.is_meta
                for _ in range(2):
                    o.step()
                    o.found_inf = torch.full((), 0.0, device="cpu")
                o.load_state_dict(copy.deepcopy(o.state_dict()))
                o.step()
            all_ += [o.grad_norm, *(v for p in ps for v in o.state[p].values()), *(p.detach().clone() for p in ps)]
        results.append(all_)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_name
def test_inference_tensors(name: str, native: bool) -> None:
    """As parameters, as gradients; steps inside the mode and outside, in one life."""
    with torch.inference_mode():
        inner, grad = torch.nn.Parameter(torch.ones(4)), torch.full((4,), 0.5)
        inner.grad = torch.full((4,), 0.5)
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    options = {"max_grad_norm": 10.0, "ema_decay": 0.9}
    o, plain, other = make(name, [p], **options), make(name, [q], theirs=True), make(name, [inner], **options)
    p.grad, q.grad = grad, torch.full((4,), 0.5)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            o.grad_scale, o.found_inf = torch.ones(()), torch.zeros(())
            o.step()
            o.push_hyperparameters()
        plain.step()
        with torch.inference_mode():
            other.step()
            with other.averaged_parameters():
                pass
    close(p.detach(), q.detach(), torch.float32)
    assert torch.equal(p, inner)
    with pytest.raises(RuntimeError, match="in inference mode only"):
        other.step()
    assert torch.equal(p, inner)


@each_name
def test_conjugates_and_negatives(name: str) -> None:
    """That are noted and not yet made, of parameters and gradients."""
    value = torch.randn(3, 2, dtype=torch.complex128)
    lazy = {
        "conjugate": lambda t: torch.conj(torch.conj(t).resolve_conj()),
        "negative": lambda t: torch._neg_view(-t),
        "both": lambda t: torch._neg_view(torch.conj(torch.conj(-t).resolve_conj())),
    }
    for of_params in (True, False):
        for make_lazy in lazy.values():
            p = torch.nn.Parameter(make_lazy(value) if of_params else value.clone())
            q = torch.nn.Parameter(value.clone())
            a, b = make(name, [p], ema_decay=0.9, max_grad_norm=1e9), make(name, [q], theirs=True)
            for _ in range(3):
                q.grad = torch.randn_like(value)
                p.grad = make_lazy(q.grad)
                assert p.grad.is_conj() or p.grad.is_neg()
                a.grad_scale, a.found_inf = torch.full((), 1.0), torch.zeros(())
                a.step()
                b.step()
                assert torch.equal(p.grad, q.grad)
            close(p.detach().resolve_conj().resolve_neg(), q.detach())


@each_name
def test_negatives_of_real_numbers(name: str) -> None:
    p, q = parameter(), parameter()
    a, b = make(name, [p]), make(name, [q], theirs=True)
    for i in range(4):
        q.grad = torch.randn(4, dtype=DOUBLE)
        p.grad = torch._neg_view(-q.grad) if i % 2 else q.grad.clone()
        a.step()
        b.step()
        for key, moment in a.state[p].items():
            if moment.dim() and i == 2:
                a.state[p][key] = torch._neg_view(-moment)
    close(p.detach(), q.detach())


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@each_name
def test_zeros_without_memory(name: str, dtype: torch.dtype, native: bool) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2))
    a, b = make(name, [p], max_grad_norm=1e9), make(name, [q], theirs=True)
    for i in range(4):
        q.grad = torch.ones(4, dtype=dtype) * (i % 2)
        p.grad = q.grad.clone() if i % 2 else torch._efficientzerotensor((4,), dtype=dtype)
        a.grad_scale, a.found_inf = torch.ones(()), torch.zeros(())
        a.step()
        b.step()
    close(p.detach(), q.detach())


# ---- parameters over one storage -------------------------------------------------------------------------------------


def test_parameters_that_share_memory() -> None:
    """Are served one after the other, by whatever number of threads."""
    room = torch.zeros(300_000)
    ps = [torch.nn.Parameter(t) for t in (room, room[100_000:200_000], room[150_000:], torch.zeros(9), room[:0])]
    for p in ps:
        p.grad = torch.ones_like(p)
    o = optim.SGD(ps, lr=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            o.step()
    finally:
        torch.set_num_threads(threads)
    assert [len(s.params) for s in o._shards] == [2]
    counts = torch.ones(300_000)
    counts[100_000:200_000] += 1
    counts[150_000:] += 1
    assert torch.equal(room, -3 * counts)
    assert (ps[3] == -3).all()
    flat = torch.zeros(10)
    o = optim.SGD([torch.nn.Parameter(t) for t in (flat[5:], flat[:5])], lr=1.0)  # neighbours share none
    for p in o.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    o.step()
    assert not o._aside


# ---- what a step leaves ----------------------------------------------------------------------------------------------


def test_a_norm_is_that_of_its_step() -> None:
    p = parameter()
    for strided in (False, True):
        others = [torch.nn.Parameter(torch.zeros(8, dtype=DOUBLE)[::2])] if strided else []
        o = optim.SGD([p, *others], lr=0.0, max_grad_norm=1.0)
        norms, skipped = [], []
        for size in (3.0, 5.0):
            p.grad = torch.zeros(4, dtype=DOUBLE).index_fill(0, torch.tensor(1), size).requires_grad_()
            for q in others:
                q.grad = torch.zeros(4, dtype=DOUBLE)
            o.found_inf = torch.tensor(float(size == 5.0))
            o.step()
            norms.append(o.grad_norm)
            skipped.append(o.step_skipped)
        assert [n.item() for n in norms] == [3.0, 5.0]
        assert [s.item() for s in skipped] == [False, True]
        assert not any(t.requires_grad for t in (*norms, *skipped))


def test_unscaled_gradients_that_are_differentiated(native: bool) -> None:
    """A leaf of another layout is written back, as one of the parameter's is."""
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.ones(3, 2).t().requires_grad_()
    o = optim.SGD([p], lr=1.0)
    o.grad_scale, o.found_inf = torch.full((), 2.0), torch.zeros(())
    o.step()
    assert (p == -0.5).all()
    assert (p.grad == 0.5).all()


def test_a_refused_step_changes_nothing() -> None:
    """Nor which momentum buffers are still to be set."""
    for refused in ("sparse", "shape"):
        p, q = parameter(), parameter()
        o = optim.SGD([p, q], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
        o.found_inf = torch.ones(())
        o.step()
        del o.found_inf
        grad, momentum = q.grad, o.state[q]["momentum_buffer"]
        if refused == "sparse":
            q.grad = torch.ones(4, dtype=DOUBLE).to_sparse()
        else:
            o.state[q]["momentum_buffer"] = momentum[:2].clone()
        with pytest.raises(RuntimeError, match=r"sparse gradients|of the parameter's shape"):
            o.step()
        q.grad, o.state[q]["momentum_buffer"] = grad, momentum
        for _ in range(2):
            o.step()
        for x in (p, q):
            torch.testing.assert_close(o.state[x]["momentum_buffer"], 1.4 * x.grad)


# ---- groups and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array lr", "array betas", "list betas", "tensor in betas"])
def test_numbers_that_change_in_place(kind: str, native: bool) -> None:
    values: dict[str, Any] = {
        "array lr": np.array(0.1),
        "array betas": np.array([0.5, 0.75]),
        "list betas": [0.5, 0.75],
        "tensor in betas": (torch.tensor(0.5), 0.75),
    }
    p, q = parameter(), parameter()
    key, value = kind.split()[-1], values[kind]
    a, b = optim.AdamW([p]), torch.optim.AdamW([q])
    a.param_groups[0][key] = value
    for i in range(6):
        if i == 3:
            if kind == "array lr":
                value[()] = 0.5
            elif kind == "tensor in betas":
                value[0].fill_(0.25)
            else:
                value[0] = 0.25
        plain = float(value) if key == "lr" else tuple(float(v) for v in value)
        b.param_groups[0][key] = plain
        p.grad = q.grad = torch.full((4,), float(i + 1), dtype=DOUBLE)
        a.step()
        b.step()
    close(p.detach(), q.detach())


def test_a_momentum_that_is_switched_on_in_place(native: bool) -> None:
    """Asks for a buffer, and so for a new table."""
    p, q = parameter(), parameter()
    a, b = optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1)
    momentum = a.param_groups[0]["momentum"] = torch.tensor(0.0, dtype=DOUBLE)
    for value in (0.0, 0.0, 0.9, 0.9, 0.5):
        momentum.fill_(value)
        b.param_groups[0]["momentum"] = value
        a.step()
        b.step()
    close(p.detach(), q.detach())
    close(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])


def test_keys_that_are_no_strings(native: bool) -> None:
    p = parameter()
    o = optim.SGD([p], lr=1.0)
    before = p.detach().clone()
    for i in range(3):
        o.param_groups[0][7] = i
        o.step()
    torch.testing.assert_close(p.detach(), before - 3 * p.grad)


def test_hooks_of_load_state_dict() -> None:
    """That add the group which a checkpoint has, and that change what was loaded."""
    p, q, r = parameter(4, torch.bfloat16), parameter(4, torch.bfloat16), parameter(4, torch.bfloat16)
    source = optim.AdamW([{"params": [p]}, {"params": [q]}], state_dtype=torch.float32, fused=None)
    source.step()
    o = optim.AdamW([p], state_dtype=torch.float32, fused=True)
    handles = [
        o.register_load_state_dict_pre_hook(lambda o, _: o.add_param_group({"params": [q], "fused": None})),
        o.register_load_state_dict_post_hook(lambda o: o.add_param_group({"params": [r]})),
    ]

    def narrow(o: torch.optim.Optimizer) -> None:
        assert o.state[p]["exp_avg"].dtype == torch.float32
        o.state[q]["exp_avg"] = o.state[q]["exp_avg"].bfloat16()

    handles.append(o.register_load_state_dict_post_hook(narrow))
    before = len(o._optimizer_load_state_dict_pre_hooks), len(o._optimizer_load_state_dict_post_hooks)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    o.load_state_dict(torch.load(file, weights_only=True))
    assert (len(o._optimizer_load_state_dict_pre_hooks), len(o._optimizer_load_state_dict_post_hooks)) == before
    assert [g["fused"] for g in o.param_groups] == [True, None, True]
    assert [o.state[x]["exp_avg"].dtype for x in (p, q)] == [torch.float32, torch.bfloat16]
    assert torch.equal(o.state[p]["exp_avg_sq"], source.state[p]["exp_avg_sq"])
    o.step()
