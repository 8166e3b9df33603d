"""The optimizers beyond torch's own tests: layouts, what changes between steps, sparse gradients."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import CANARY, GRAD_LAYOUTS, PARAM_LAYOUTS, canaries_unharmed, close, each_name, laid_out, make
from torch import Tensor

import fusedtricks
from fusedtricks import _op, optim
from fusedtricks.ops import _optimizer

# ---- layouts (traps 1, 2, 16, 18) ------------------------------------------------------------------------------------


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


@pytest.mark.skipif(
    not (Path("/proc/self/smaps").exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()),
    reason="the system has no large pages to ask for, or does not tell",
)
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
