"""The optimizers in mixed precision: scaled gradients, clipping, averages, master weights, rounding, exactness."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from optim_accuracy import BETAS2, STEPS, decay_error, median_error, one_update
from optim_cases import FULL, close, each_name, laid_out, make

import fusedtricks
from fusedtricks import optim
from fusedtricks.ops import _optimizer, _table

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


# ---- beyond fp32 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD"])
def test_infinite_weights_do_not_decay(name: str, n: int, backend: str) -> None:
    """Masks may be kept as parameters."""
    p = torch.nn.Parameter(torch.ones(n).index_fill(0, torch.arange(0, n, 2), -math.inf))
    key = {} if name == "AdamW" else {"decoupled_weight_decay": True}
    o = getattr(optim, name)([p], lr=0.1, weight_decay=0.1, **key)
    p.grad = torch.zeros(n)
    with fusedtricks.backend(backend):
        o.step()
    assert (p[::2] == -math.inf).all()
    torch.testing.assert_close(p[1::2].detach(), torch.full_like(p[1::2], 0.99))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("Adam", {"betas": (0.9, 0.999)}, 1e20),
        ("NAdam", {"betas": (0.9, 0.999)}, 1e20),
        ("RMSprop", {"alpha": 0.99}, 1e20),
        ("Adam", {"betas": (0.9, 0.5)}, 1e25),
        ("RMSprop", {"alpha": 0.5}, 1e25),
    ],
)
def test_squares_that_overflow(name: str, options: dict[str, Any], size: float, n: int, backend: str) -> None:
    """Their share of the average may not: float64 is right. Where it does, the weight stays, as torch's in float32."""
    p = torch.nn.Parameter(torch.ones(n))
    q = torch.nn.Parameter(torch.ones(n, dtype=torch.float64 if size < 1e22 else torch.float32))
    a = getattr(optim, name)([p], lr=0.1, **options)
    b = getattr(torch.optim, name)([q], lr=0.1, foreach=False, **options)
    for grad in (size, 1.0):
        p.grad, q.grad = torch.full_like(p, grad), torch.full_like(q, grad)
        with fusedtricks.backend(backend):
            a.step()
        b.step()
        torch.testing.assert_close(p.double(), q.double(), rtol=0, atol=1e-6)  # of weights about 1
