"""The optimizers beyond torch's own tests: layouts, changes between steps, mixed precision, clipping, averages."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_accuracy import BETAS2, STEPS, decay_error, median_error, one_update
from torch import Tensor
from torch.optim import optimizer

import fusedtricks
from fusedtricks import _op, optim
from fusedtricks.ops import _optimizer, _table

NAMES = ("Adagrad", "Adam", "AdamW", "NAdam", "RMSprop", "SGD")
# Every state that a rule has is in use.
FULL: dict[str, dict[str, Any]] = {
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True, "weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
}
CANARY = 7.0
each_name = pytest.mark.parametrize("name", NAMES)


def make(name: str, params: Any, theirs: bool = False, **kwargs: Any) -> torch.optim.Optimizer:
    kwargs = {"lr": 0.01, **FULL[name], **kwargs}
    return getattr(torch.optim if theirs else optim, name)(params, **(kwargs | ({"foreach": False} if theirs else {})))


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """`value` in a layout, and the buffer around it, which holds canaries elsewhere."""
    room = torch.full((4 * value.numel() + 64,), CANARY, dtype=value.dtype)
    shape = tuple(value.shape)
    row_major = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    strides = {
        "plain": row_major,
        "offset": row_major,
        "transposed": [math.prod(shape[:d]) for d in range(len(shape))],
        "every second": [2 * s for s in row_major],
        "expanded": [0] * len(shape),
    }[layout]
    view = room.as_strided(shape, strides, 17 if layout == "offset" else 16)
    if layout == "expanded":
        view.reshape(-1)[:1].fill_(0.5)
        room[16] = 0.5
    else:
        view.copy_(value)
    return view, room


def canaries_unharmed(view: Tensor, room: Tensor) -> bool:
    touched = torch.zeros_like(room, dtype=torch.bool)
    touched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool((room[~touched] == CANARY).all())


def close(a: Any, b: Any, dtype: torch.dtype = torch.float64) -> None:
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6}.get(dtype, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- layouts (traps 1, 2, 16, 18) ------------------------------------------------------------------------------------

PARAM_LAYOUTS = ("plain", "offset", "transposed", "every second")
GRAD_LAYOUTS = (*PARAM_LAYOUTS, "expanded")


@each_name
@pytest.mark.parametrize(("p_layout", "g_layout"), list(itertools.product(PARAM_LAYOUTS, GRAD_LAYOUTS)))
def test_layouts(name: str, p_layout: str, g_layout: str) -> None:
    for shape in ((5, 7), (1, 9), (3, 1, 4), ()):
        value = torch.randn(shape, dtype=torch.float64)
        view, room = laid_out(value, p_layout)
        p, q = torch.nn.Parameter(view), torch.nn.Parameter(value.clone())
        p.data = view
        a, b = make(name, [p]), make(name, [q], theirs=True)
        for _ in range(3):
            grad, grad_room = laid_out(torch.randn(shape, dtype=torch.float64), g_layout)
            p.grad, q.grad = grad, grad.clone()
            kept = grad_room.clone()
            a.step()
            b.step()
            assert torch.equal(grad_room, kept)
        close(p.detach(), q.detach())
        assert canaries_unharmed(view, room)


@each_name
def test_alignment_and_odd_sizes(name: str) -> None:
    for dtype, offset in itertools.product((torch.float32, torch.bfloat16), range(0, 9, 3)):
        ours, theirs, rooms = [], [], []
        for n in (0, 1, 3, 15, 16, 17, 33, 67, 0):
            room = torch.full((n + 32,), CANARY, dtype=dtype)
            view = room[offset : offset + n]
            view.copy_(torch.randn(n))
            p = torch.nn.Parameter(view)
            p.data = view
            ours.append(p)
            theirs.append(torch.nn.Parameter(view.clone()))
            rooms.append((view, room))
        # fp16-like eps: torch's own loop would divide by zero with 1e-8 in 16 bits.
        a, b = make(name, ours), make(name, theirs, theirs=True)
        for _ in range(2):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn(p.shape).to(dtype)
                q.grad = p.grad.clone()
            a.step()
            b.step()
        close(ours, theirs, dtype)
        assert all(canaries_unharmed(view, room) for view, room in rooms)


@each_name
def test_checkpoint_of_another_memory_format(name: str) -> None:
    value = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    grads = torch.randn(4, 2, 3, 4, 5, dtype=torch.float64)
    p = torch.nn.Parameter(value.clone())
    a = make(name, [p])
    for g in grads[:2]:
        p.grad = g.clone()
        a.step()
    q = torch.nn.Parameter(p.detach().clone().to(memory_format=torch.channels_last))
    b = make(name, [q])
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for g in grads[2:]:
        p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert torch.equal(p, q)


# ---- changes between steps (traps 7, 27, 28) -------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("native", [True, False], ids=["plan", "no plan"])
def test_everything_that_can_change_between_steps(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(_optimizer, "_plan", None)
    elif _optimizer._plan is None:
        pytest.skip("no compiled step plan in this build")

    def new_storage(o: Any, ps: list[Tensor]) -> None:
        ps[0].data = ps[0].data.clone()

    def transposed_storage(o: Any, ps: list[Tensor]) -> None:
        ps[0].data = ps[0].data.t().contiguous().t()
        ps[0].grad = None

    def new_group(o: Any, ps: list[Tensor]) -> None:
        ps.append(torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
        o.add_param_group({"params": [ps[-1]], "lr": 0.5})

    def hypers(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["lr"] = 0.3
        o.param_groups[0]["weight_decay"] = 0.01
        if "betas" in o.param_groups[0]:
            o.param_groups[0]["betas"] = (0.8, 0.9)

    def reloaded(o: Any, ps: list[Tensor]) -> None:
        o.load_state_dict(copy.deepcopy(o.state_dict()))

    def cleared(o: Any, ps: list[Tensor]) -> None:
        o.state.clear()
        if name == "Adagrad":
            for p in ps:
                o.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    def replaced_state(o: Any, ps: list[Tensor]) -> None:
        for key, value in o.state[ps[1]].items():
            o.state[ps[1]][key] = value.clone()

    def moved_state(o: Any, ps: list[Tensor]) -> None:
        for value in o.state[ps[0]].values():
            value.data = value.data.clone()

    def edited_state(o: Any, ps: list[Tensor]) -> None:
        for value in o.state[ps[0]].values():
            value.mul_(2)

    def maximized(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["maximize"] = True

    def other_list(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["params"] = [ps[1], ps[0], *o.param_groups[0]["params"][2:]]

    def frozen(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["params"].remove(ps[1])

    def tensor_lr(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["lr"] = torch.tensor(0.2)

    def filled_lr(o: Any, ps: list[Tensor]) -> None:
        o.param_groups[0]["lr"].fill_(0.1)

    changes = (new_storage, new_group, hypers, reloaded, replaced_state, moved_state, edited_state, maximized, cleared)
    changes += (transposed_storage, other_list, tensor_lr, filled_lr, frozen, new_storage)
    results = []
    for theirs in (False, True):
        generator = torch.Generator().manual_seed(3)
        randn = lambda *s, g=generator: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
        ps = [torch.nn.Parameter(randn(4, 4)), torch.nn.Parameter(randn(5)), torch.nn.Parameter(randn(2))]
        o = make(name, ps, theirs)
        for i, change in enumerate(changes):
            for _ in range(2):
                for j, p in enumerate(ps):
                    g = randn(*p.shape)
                    if j == 2 and i % 3 == 1:
                        p.grad = None  # now and then a parameter has no gradient
                    elif p.grad is None or i % 2:
                        p.grad = g
                    else:
                        p.grad.copy_(g)
                o.step()
            change(o, ps)
        results.append([p.detach().clone() for p in ps])
    close(*results)


@each_name
def test_groups_step_as_they_would_alone(name: str) -> None:
    """Also where neighbours share some of the numbers that their scalars are prepared from, and not others."""
    varied = {
        "betas": [(0.9, 0.99), (0.9, 0.99), (0.99, 0.9), (0.9, 0.9), (0.8, 0.9)],
        "momentum_decay": [4e-3, 4e-3, 8e-3, 4e-3, 4e-3],
        "alpha": [0.9, 0.99, 0.99, 0.9, 0.9],
        "lr": [0.1, 0.2, 0.2, 0.3, 0.4],
    }
    keys = [k for k in varied if k in make(name, [torch.zeros(1)]).defaults]
    options = [{k: varied[k][g] for k in keys} for g in range(5)]
    together, apart = ([torch.nn.Parameter(torch.arange(4.0) + g) for g in range(5)] for _ in range(2))
    one = make(name, [{"params": [p], **more} for p, more in zip(together, options, strict=True)])
    many = [make(name, [p], **more) for p, more in zip(apart, options, strict=True)]
    for _ in range(3):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(4)
            q.grad = p.grad.clone()
        for o in (one, *many):
            o.step()
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(one.state[p][k], v) for o in many for k, v in o.state.get(q, {}).items())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell which pages are large")
def test_large_states_ask_for_large_pages() -> None:
    if _op._C is None:
        pytest.skip("no compiled kernels in this build")
    p = torch.nn.Parameter(torch.zeros(9_000_000))  # 36 MB
    p.grad = torch.ones(1).expand_as(p)
    o = optim.RMSprop([p])
    o.step()
    middle = o.state[p]["square_avg"].data_ptr() + 18_000_000
    begin, end, flags = 0, 0, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(part, 16) for part in found.groups())
        elif line.startswith("VmFlags:"):
            flags[begin, end] = line.split()[1:]
    assert ["hg" in kinds for (first, last), kinds in flags.items() if first <= middle < last] == [True]


@each_name
def test_a_stable_step_builds_no_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if _optimizer._plan is None:
        pytest.skip("no compiled step plan in this build")
    ps = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3)]
    o = make(name, ps)
    built = []
    build = o._build
    monkeypatch.setattr(o, "_build", lambda: (built.append(1), build()))
    for i in range(6):
        o.param_groups[0]["lr"] = 0.1 / (i + 1)
        for p in ps:
            p.grad = torch.randn(3, 2)  # as zero_grad(set_to_none=True) makes them: new every step
        o.step()
    assert len(built) == 1


@each_name
def test_versions_are_bumped(name: str) -> None:
    p = torch.nn.Parameter(torch.randn(3))
    o = make(name, [p])
    for _ in range(3):
        p.grad = torch.randn(3)
        version = p._version
        loss = (p * p).sum()
        o.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_name
def test_copies_and_pickles_go_on(name: str) -> None:
    p = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    o = make(name, [p])
    p.grad = torch.ones_like(p)
    o.step()
    for other in (copy.deepcopy(o), pickle.loads(pickle.dumps(o))):
        q = other.param_groups[0]["params"][0]
        before = p.detach().clone()
        saved = copy.deepcopy(o.state_dict())
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
        o.step()
        other.step()
        assert torch.equal(p, q)
        o.load_state_dict(saved)
        with torch.no_grad():
            p.copy_(before)


@each_name
def test_complex_parameters(name: str) -> None:
    value = torch.randn(3, 2, dtype=torch.complex128)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    a, b = make(name, [p]), make(name, [q], theirs=True)
    for _ in range(3):
        p.grad = torch.randn_like(value)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    close(p.detach(), q.detach())


@each_name
def test_one_parameter_twice(name: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        a, b = make(name, [p, p]), make(name, [q, q], theirs=True)
    for _ in range(2):
        p.grad = q.grad = torch.full((3,), 0.5, dtype=torch.float64)
        a.step()
        b.step()
    close(p.detach(), q.detach())


@each_name
def test_any_number_of_threads(name: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(n)) for n in (40_000, 3, 17_000)]
        o = make(name, ps, max_grad_norm=1.0, ema_decay=0.9)
        for _ in range(2):
            for p in ps:
                p.grad = torch.randn_like(p)
            o.step()
        results.append([*ps, *(v for p in ps for v in o.state[p].values()), o.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_name
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"])
def test_every_instruction_set(name: str, backend: str) -> None:
    rule = getattr(optim, name).rule
    if backend not in rule.op.available():
        pytest.skip(f"no {backend} kernel here")
    kinds = [
        {},
        {"master_weights": "fp32"},
        {"master_weights": "remainder"},
        {"stochastic_rounding": True, "state_dtype": torch.float32},
    ]
    for options, dtype in [*((k, torch.bfloat16) for k in kinds), ({}, torch.float32), ({}, torch.float64)]:
        results = []
        for chosen in (backend, "reference"):
            torch.manual_seed(5)
            ps = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((45,), (3, 700))]
            o = make(name, ps, max_grad_norm=2.0, ema_decay=0.5, **options)
            with fusedtricks.backend(chosen):
                for step in range(3):
                    for p in ps:
                        p.grad = torch.randn(p.shape).to(dtype)
                    if step:
                        o.grad_scale, o.found_inf = torch.tensor(8.0), torch.tensor(0.0)
                    o.step()
            results.append([*ps, *(p.grad for p in ps), *(o.state[p]["ema"] for p in ps), o.grad_norm])
        tolerance = 1e-6 if dtype != torch.float64 else 1e-12
        for a, b in zip(*results, strict=True):
            wide = dtype == torch.bfloat16 and a.dtype == torch.bfloat16
            torch.testing.assert_close(
                a.double(), b.double(), rtol=2**-7 if wide else 20 * tolerance, atol=20 * tolerance
            )


# ---- sparse gradients ------------------------------------------------------------------------------------------------


@each_name
def test_sparse_gradients(name: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5, 2)) for _ in range(2))
    grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2))
    kwargs = {"weight_decay": 0.0} if name in ("SGD", "Adagrad") else {}
    a, b = make(name, [p], **kwargs), make(name, [q], theirs=True, **kwargs)
    p.grad, q.grad = grad.clone(), grad.clone()
    if name in ("SGD", "Adagrad"):
        for _ in range(2):
            a.step()
            b.step()
        assert torch.equal(p.detach(), q.detach())
        strict = make(name, [torch.nn.Parameter(torch.ones(5, 2))], fused=True)
        strict.param_groups[0]["params"][0].grad = grad
        with pytest.raises(RuntimeError, match="does not support sparse grad"):
            strict.step()
        return
    with pytest.raises(RuntimeError) as ours:
        a.step()
    with pytest.raises(RuntimeError) as theirs:
        b.step()
    assert str(ours.value) == str(theirs.value)


# ---- mixed precision (traps 3 to 6) ----------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("found", [1.0, 2.0, math.nan])
def test_found_inf_skips_everything(name: str, found: float) -> None:
    """At the first step, and at a later one; state saved right there goes on as if the step had not been."""
    torch.full((1000,), torch.nan)  # what uninitialised memory may then hold
    ps = [torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    groups = lambda ps: [{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.02}]  # noqa: E731
    o, clean = make(name, groups(ps), ema_decay=0.9), make(name, groups(twins), ema_decay=0.9)
    for step, bad in enumerate((True, False, True, False)):
        for p, q in zip(ps, twins, strict=True):
            p.grad = torch.full_like(p, torch.inf) if bad else torch.randn_like(p)
            q.grad = p.grad.clone()
        before = copy.deepcopy((ps, o.state_dict()["state"])) if step else None
        if bad:
            o.found_inf = torch.tensor(found)
            o.grad_scale = torch.tensor(1.0)
        else:
            clean.step()
        o.step()
        assert bool(o.step_skipped) == bad
        if bad:
            del o.found_inf, o.grad_scale
            if before:
                torch.testing.assert_close((ps, o.state_dict()["state"]), before, rtol=0, atol=0)
            saved = copy.deepcopy(o.state_dict())
            o = make(name, groups(ps), ema_decay=0.9)
            o.load_state_dict(saved)
    close(ps, twins)


@pytest.mark.parametrize("native", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("layout", ["plain", "every second"])
@pytest.mark.parametrize("between", ["no gradient", "copied", "pickled", "torch's step"])
def test_a_skipped_first_step_leaves_no_momentum(
    between: str, layout: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it sets the buffer to the gradient, dampening or not, whatever comes between (trap 3)."""
    if not native:
        monkeypatch.setattr(_optimizer, "_plan", None)
    view, _ = laid_out(torch.ones(4, dtype=torch.float64), layout)
    p = torch.nn.Parameter(view)
    p.data = view
    o = optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad, o.found_inf = torch.full_like(p, torch.inf), torch.tensor(1.0)
    o.step()
    del o.found_inf
    p.grad = None
    if between == "no gradient":
        o.step()
    elif between == "torch's step":
        o.param_groups[0]["fused"] = False
    else:
        o = copy.deepcopy(o) if between == "copied" else pickle.loads(pickle.dumps(o))
        p = o.param_groups[0]["params"][0]
    value = 1.0
    for buffer in (1.0, 0.9 + 0.5):
        p.grad = torch.ones_like(p)
        o.step()
        value -= 0.1 * buffer
        torch.testing.assert_close(p.detach(), torch.full_like(p, value))


@each_name
@pytest.mark.parametrize("unscaled_by_user", [True, False])
def test_grad_scaler(name: str, unscaled_by_user: bool) -> None:
    results = []
    for theirs in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, dtype=torch.float32))
        o = make(name, [p], theirs)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for step in range(5):
            x = torch.randn(6) * (torch.inf if step == 1 else 1)
            o.zero_grad()
            scaler.scale((p * x).sum()).backward()
            if unscaled_by_user:
                scaler.unscale_(o)
                torch.nn.utils.clip_grad_norm_([p], 1.0)
            scaler.step(o)
            scaler.update()
        results.append((p.detach().clone(), p.grad.clone(), scaler.get_scale()))
    close(*results, torch.float32)


@each_name
def test_max_grad_norm(name: str) -> None:
    results = []
    for theirs in (False, True):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((20_000,), (3, 4), ())]
        o = make(name, ps, theirs) if theirs else make(name, ps, max_grad_norm=0.7)
        for step in range(3):
            for p in ps:
                p.grad = torch.randn_like(p) * 0.001**step
            kept = [p.grad.clone() for p in ps]
            if theirs:
                norm = torch.nn.utils.clip_grad_norm_(ps, 0.7)
            o.step()
            if not theirs:
                norm = o.grad_norm
                assert all(torch.equal(a, p.grad) for a, p in zip(kept, ps, strict=True))
            results.append(norm.double())
        results.append([p.detach() for p in ps])
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
def test_the_norm_beside_a_kernel_is_as_wide(dtype: torch.dtype) -> None:
    """Where a parameter is a strided view, the norm is computed for all of them: in no fewer bits than there."""
    params = [torch.nn.Parameter(torch.zeros(70, dtype=dtype)) for _ in range(2)]
    params[1].data = torch.zeros(100, dtype=dtype)[::2]
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    truth = torch.cat([p.grad.to(torch.complex128).view(-1) for p in params]).norm()
    o = optim.SGD(params, lr=1.0, max_grad_norm=0.5)
    o.step()
    torch.testing.assert_close(o.grad_norm.double(), truth, rtol=1e-6, atol=0)
    clipped = params[0].grad * (0.5 / (truth + 1e-6)).item()
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-14
    torch.testing.assert_close(params[0].detach(), -clipped, rtol=rounding, atol=0)


# ---- averages, masters, rounding (traps 10 to 15) --------------------------------------------------------------------


@each_name
def test_ema(name: str) -> None:
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64)) for _ in range(2))
    a, b = make(name, [p], ema_decay=0.9), make(name, [q])
    average = q.detach().clone()
    for _ in range(5):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        a.step()
        b.step()
        average.lerp_(q.detach(), 0.1)
    assert torch.equal(p, q)
    torch.testing.assert_close(a.state[p]["ema"], average)
    with a.averaged_parameters():
        torch.testing.assert_close(p.detach(), average)
    assert torch.equal(p, q)
    torch_one = make(name, [torch.nn.Parameter(q.detach().clone())], theirs=True)
    torch_one.load_state_dict(a.state_dict())  # takes the rest
    with pytest.raises(RuntimeError, match="without ema_decay"), b.averaged_parameters():
        pass


def test_decay_in_bfloat16() -> None:
    decay = {"lr": 1e-3, "weight_decay": 0.1}
    theirs = decay_error(lambda ps: torch.optim.AdamW(ps, fused=True, **decay))
    assert theirs > 0.1  # each step rounds to nothing
    assert decay_error(lambda ps: optim.AdamW(ps, **decay)) == theirs
    for options in ({"master_weights": "fp32"}, {"master_weights": "remainder"}, {"stochastic_rounding": True}):
        assert decay_error(lambda ps, o=options: optim.AdamW(ps, **decay, **o)) < 5e-3, options


@each_name
def test_remainder_equals_fp32_masters(name: str) -> None:
    results = []
    for mode in ("fp32", "remainder"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(2000).bfloat16())
        o = make(name, [p], master_weights=mode)
        for _ in range(300):
            p.grad = torch.randn(2000).bfloat16()
            o.step()
        master = o.state[p]["master"]
        results.append((p.detach(), master if mode == "fp32" else _table.join(p.detach(), master)))
        assert all(s.dtype == torch.float32 for k, s in o.state[p].items() if k != "master")
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_split_and_join() -> None:
    words = torch.cat([torch.randint(-(2**31), 2**31, (100_000,)), torch.tensor([0x7F7FFFFF, 0x8000, 0x7F800000, 0])])
    weights = words.to(torch.int32).view(torch.float32)
    upper, lower = _table.split(weights)
    again = _table.join(upper, lower)
    number = ~weights.isnan()
    assert torch.equal(again[number], weights[number])
    assert again[~number].isnan().all()
    assert (upper[number].double() - weights[number].bfloat16().double()).nan_to_num().abs().max() >= 0


def test_master_follows_a_parameter_that_was_written_to() -> None:
    for mode, plan in itertools.product(("fp32", "remainder"), (True, False)):
        p = torch.nn.Parameter(torch.ones(8).bfloat16())
        o = optim.SGD([p], lr=2**-12, master_weights=mode)
        with pytest.MonkeyPatch.context() as patch:
            if not plan:
                patch.setattr(_optimizer, "_plan", None)
            p.grad = torch.ones_like(p)
            o.step()
            with torch.no_grad():
                p.fill_(3.0)
            o.step()
            master = o.state[p]["master"]
            master = master if mode == "fp32" else _table.join(p.detach(), master)
            torch.testing.assert_close(master, torch.full((8,), 3.0 - 2**-12))


@pytest.mark.parametrize("count", [1_000_000])
def test_stochastic_rounding_is_unbiased_and_repeats(count: int) -> None:
    weight, step = 1.0, 2**-10 / 3  # a bfloat16 ulp is 2^-7
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        p = torch.nn.Parameter(torch.full((count,), weight).bfloat16())
        o = optim.SGD([p], lr=step, stochastic_rounding=True)
        p.grad = torch.full_like(p, -1.0)
        o.step()
        results.append(p.detach().clone())
        first = p.detach().clone()
        o.step()
        assert not torch.equal(p.detach() > first, first > weight)  # new bits every step
    assert torch.equal(*results)
    share = step / 2**-7
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(float((results[0] > weight).double().mean()) - share) < 3 * deviation


@each_name
@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": "fp32"}, {"master_weights": "remainder"}, {"stochastic_rounding": True}],
    ids=["plain", "fp32", "remainder", "stochastic"],
)
def test_resuming_is_exact(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(200).bfloat16())
    options = {**options, "ema_decay": 0.9, "state_dtype": torch.float32}
    o = make(name, [p], **options)
    grads = torch.randn(8, 200).bfloat16()
    for g in grads[:4]:
        p.grad = g.clone()
        o.step()
    q = torch.nn.Parameter(p.detach().clone())
    other = make(name, [q], **options)
    other.load_state_dict(pickle.loads(pickle.dumps(o.state_dict())))
    assert {k: v.dtype for k, v in other.state[q].items()} == {k: v.dtype for k, v in o.state[p].items()}
    for g in grads[4:]:
        p.grad, q.grad = g.clone(), g.clone()
        o.step()
        other.step()
    assert torch.equal(p, q)
    for key, value in o.state[p].items():
        assert torch.equal(value, other.state[q][key]), key


@each_name
@pytest.mark.parametrize("t", STEPS)
@pytest.mark.parametrize("beta2", BETAS2)
def test_update_against_float64(name: str, t: int, beta2: float) -> None:
    """Median relative error of an update against torch's loop in float64, from the same state."""
    rule = getattr(optim, name).rule
    if "betas" not in rule.columns and beta2 != BETAS2[0]:
        pytest.skip("has no betas")
    # With small gradients eps counts.
    for size in (0.1, 1e-7):
        betas = {"betas": (0.9, beta2)} if "betas" in rule.columns else {}
        kwargs = {**FULL[name], **betas, "weight_decay": 0.0, "lr": 1e-3}
        truth = one_update(
            lambda ps, k=kwargs: getattr(torch.optim, name)(ps, foreach=False, **k), rule, t, torch.float64, size=size
        )
        update = one_update(lambda ps, k=kwargs: getattr(optim, name)(ps, **k), rule, t, torch.float32, size=size)
        assert median_error(update, truth) <= 1e-7


def test_steps_beyond_float32() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    o = optim.AdamW([p])
    o.state[p].update(step=torch.tensor(2.0**24 - 2), exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1))
    p.grad = torch.ones(1)
    for _ in range(6):
        o.step()
    assert o.state[p]["step"] == 2.0**24 + 4


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    try:
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float32))
        o, b = optim.NAdam([p]), torch.optim.NAdam([torch.nn.Parameter(p.detach().clone())])
        for x in (p, b.param_groups[0]["params"][0]):
            x.grad = torch.ones(3, dtype=torch.float32)
        for _ in range(300):
            o.step()
            b.step()
        mine, other = (next(iter(x.state.values())) for x in (o, b))
        assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
        assert mine["step"] == 300
    finally:
        torch.set_default_dtype(torch.float32)


def test_sgdw() -> None:
    p = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    o = optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5, decoupled_weight_decay=True)
    weight, buffer = 2.0, 0.0
    for _ in range(3):
        p.grad = torch.ones_like(p)
        o.step()
        buffer = 0.9 * buffer + 1
        weight -= 0.1 * buffer + 0.1 * 0.5 * weight
    torch.testing.assert_close(p.detach(), torch.full((3,), weight, dtype=torch.float64))


def test_overflowed_squares_stay_as_in_torch() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    a, b = optim.AdamW([p]), torch.optim.AdamW([q], foreach=False)
    for value in (1e25, 1.0, 1.0):
        p.grad = torch.tensor([value, 1.0])
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"])


def test_centered_rmsprop_of_a_constant_gradient_is_finite() -> None:
    p = torch.nn.Parameter(torch.zeros(64))
    o = optim.RMSprop([p], centered=True, alpha=0.5)
    grad = torch.rand(64) * 100
    for _ in range(200):
        p.grad = grad.clone()
        o.step()
        assert p.isfinite().all()


# ---- arguments -------------------------------------------------------------------------------------------------------


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


# ---- fuzz ------------------------------------------------------------------------------------------------------------

TENSORS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 6), max_size=3),  # shape
        st.sampled_from(PARAM_LAYOUTS),
        st.sampled_from(GRAD_LAYOUTS),
        st.integers(0, 15),  # a bit for each step: is there a gradient?
    ),
    min_size=1,
    max_size=5,
)


def fuzz(
    name: str,
    tensors: Any,
    dtype: torch.dtype,
    groups: int,
    maximize: bool,
    clip: bool,
    ema: bool,
    skipped: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs, rooms = [], [], []
    for shape, layout, _, _ in tensors:
        view, room = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
        p = torch.nn.Parameter(view)
        p.data = view
        ours.append(p)
        theirs.append(torch.nn.Parameter(view.double().clone()))
        rooms.append((view, room))
    split = lambda ps: [{"params": ps[g::groups], "lr": 0.01 * (g + 1)} for g in range(groups)]  # noqa: E731
    kwargs = {"maximize": maximize} | ({"state_dtype": torch.float32} if dtype == torch.bfloat16 else {})
    # Where decay cancels the gradient, a step is the sign of a rounding error, unless eps is above it.
    eps = {"eps": 1e-2} if dtype != torch.float64 and name != "SGD" else {}
    extra = ({"max_grad_norm": 0.5} if clip else {}) | ({"ema_decay": 0.75} if ema else {})
    a = make(name, split(ours), **kwargs, **eps, **extra)
    b = make(name, split(theirs), theirs=True, maximize=maximize, **eps)
    averages: dict[int, Tensor] = {}
    for step in range(4):
        for p, q, (shape, _, layout, present) in zip(ours, theirs, tensors, strict=True):
            grad, _ = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
            p.grad, q.grad = (grad, grad.double().contiguous().clone()) if present >> step & 1 else (None, None)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        if dtype == torch.bfloat16:  # one step at a time, so that only one rounding is between them
            with torch.no_grad():
                for p, q in zip(ours, theirs, strict=True):
                    q.copy_(p)
        before = [q.detach().clone() for q in theirs]
        a.found_inf = torch.tensor(float(2 * (step == skipped)))
        a.step()
        if step != skipped:
            b.step()
            for i, q in enumerate(theirs):
                if q.grad is not None:
                    averages[i] = averages.get(i, before[i]).lerp(q.detach(), 0.25)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-7
    near = {"rtol": tolerance, "atol": tolerance}
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(p.detach().double(), q.detach(), **near)
        if ema and i in averages:
            torch.testing.assert_close(a.state[p]["ema"].double(), averages[i], **near)
    assert all(canaries_unharmed(view, room) for view, room in rooms)


CASES = {
    "name": st.sampled_from(NAMES),
    "tensors": TENSORS,
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    "groups": st.integers(1, 3),
    "maximize": st.booleans(),
    "clip": st.booleans(),
    "ema": st.booleans(),
    "skipped": st.integers(0, 7),  # the step at which a scaler finds infinities, if it is one of the four
    "seed": st.integers(0, 2**20),
}
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=1000, **QUIET)
@given(**CASES)
def test_fuzz(**case: Any) -> None:
    fuzz(**case)


@pytest.mark.slow
@settings(max_examples=20_000, **QUIET)
@given(**CASES)
def test_fuzz_for_long(**case: Any) -> None:
    fuzz(**case)
