"""What happens to an optimizer between its steps: memory, dtypes, defaults, hooks, and values changed in place."""

from __future__ import annotations

import gc
import weakref

import numpy
import pytest
import torch
from optim_cases import each_name, make
from torch import Tensor

from fusedtricks import optim

inf = float("inf")


def stepped(p: Tensor, optimizer: torch.optim.Optimizer, grad: Tensor | float = 1.0) -> None:
    p.grad = grad if isinstance(grad, Tensor) else torch.full_like(p, grad)
    optimizer.step()


# ---- who holds what --------------------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("layout", ["as the parameter", "transposed"])
def test_gradients_are_not_kept(name: str, layout: str) -> None:
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = make(name, [p])
    for _ in range(3):
        p.grad = torch.randn(4, 4) if layout == "as the parameter" else torch.randn(4, 4).T
        gone = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gone() is None


def test_parameters_can_be_exchanged() -> None:
    p, q = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    optimizer = optim.AdamW([p], lr=0.5, weight_decay=0.0)
    stepped(p, optimizer)
    optimizer.zero_grad()
    kept, other = p.detach().clone(), q.detach().clone()
    torch.utils.swap_tensors(p, q)
    stepped(p, optimizer)
    assert torch.equal(q.detach(), kept)
    assert (p < other).all()


def test_an_optimizer_may_belong_to_its_parameter() -> None:
    p = torch.nn.Parameter(torch.randn(3))
    p.optimizer = optim.AdamW([p])
    stepped(p, p.optimizer)
    gone = weakref.ref(p.optimizer)
    del p
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("overlap", ["the same memory", "a part"])
def test_parameters_over_one_memory(overlap: str) -> None:
    """They are stepped one after the other, as torch does."""
    memory, theirs = torch.zeros(100_000, dtype=torch.float64), torch.zeros(100_000, dtype=torch.float64)
    slices = [slice(None), slice(None) if overlap == "the same memory" else slice(50_000, None)]
    results = []
    for cls, w in ((optim.SGD, memory), (torch.optim.SGD, theirs)):
        params = [torch.nn.Parameter(w[s]) for s in slices]
        for p, s in zip(params, slices, strict=True):
            p.data = w[s]
            p.grad = torch.ones_like(p)
        optimizer = cls(params, lr=1.0)
        for _ in range(20):
            optimizer.step()
        results.append(w)
    assert torch.equal(*results)


# ---- dtypes and defaults ---------------------------------------------------------------------------------------------


def test_an_average_follows_the_dtype_of_its_parameter() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1, ema_decay=0.5)
    stepped(model.weight, optimizer)
    before = optimizer.state[model.weight]["ema"].double()
    model.double()
    stepped(model.weight, optimizer)
    ema = optimizer.state[model.weight]["ema"]
    assert ema.dtype == torch.float64
    torch.testing.assert_close(ema, 0.5 * before + 0.5 * model.weight.detach())


@pytest.mark.parametrize("masters", [None, "fp32", "remainder"])
def test_through_torch_and_back(masters: str | None) -> None:
    """torch's load_state_dict makes states the parameter's dtype."""
    p = torch.nn.Parameter(torch.randn(1001).bfloat16())
    options = {"lr": 0.01, "ema_decay": 0.9, "master_weights": masters}
    ours, theirs = optim.AdamW([p], **options), torch.optim.AdamW([p], lr=0.01)
    stepped(p, ours)
    theirs.load_state_dict(ours.state_dict())
    again = optim.AdamW([p], **options)
    again.load_state_dict(theirs.state_dict())
    was = p.detach().float()
    stepped(p, again)
    assert again.state[p]["ema"].dtype == torch.float32
    assert ((p.float() - was).abs() <= 0.011 + was.abs() / 64).all()
    assert ((again.state[p]["ema"] - was).abs() <= 0.02 + was.abs() / 64).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_do_not_follow_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        p = torch.nn.Parameter(torch.ones(9, dtype=torch.float32))
        optimizer = optim.AdamW([p], max_grad_norm=1.0)
        stepped(p, optimizer, 2.0)
        assert optimizer.grad_norm == 6
        optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.ones(1)
        stepped(p, optimizer, 2.0)
        assert optimizer.step_skipped
    finally:
        torch.set_default_dtype(torch.float32)


@each_name
def test_the_default_device_is_not_asked(name: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    a, b = make(name, [p]), make(name, [q])
    with torch.device("meta"):
        p.grad = torch.ones(5, device="cpu")
        a.step()
        assert a.grad_norm.device.type == "cpu"
    stepped(q, b)
    assert torch.equal(p, q)


def test_a_step_that_sgd_does_not_count_is_left_alone() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=0.5, momentum=0.5)
    for step in (torch.tensor(3, dtype=torch.int16), 3):
        optimizer.state[p]["step"] = step
        stepped(p, optimizer)
        assert optimizer.state[p]["step"] == 3


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD"])
def test_infinite_weights_do_not_decay(name: str) -> None:
    """Masks may be kept as parameters."""
    for shape in ((3,), (40,)):
        value = torch.ones(shape)
        value[::2] = -inf
        p = torch.nn.Parameter(value.clone())
        key = {} if name == "AdamW" else {"decoupled_weight_decay": True}
        optimizer = getattr(optim, name)([p], lr=0.1, weight_decay=0.1, **key)
        stepped(p, optimizer, 0.0)
        assert (p[::2] == -inf).all()
        torch.testing.assert_close(p[1::2].detach(), 0.99 * value[1::2])


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
def test_squares_that_overflow(name: str, options: dict[str, object], size: float, n: int) -> None:
    # What is beyond fp32 itself is compared with torch in fp32, where the weight then stays.
    ours, theirs = (torch.nn.Parameter(torch.ones(n, dtype=d)) for d in (torch.float32, torch.float64))
    theirs = theirs if size < 1e22 else torch.nn.Parameter(torch.ones(n))
    a = getattr(optim, name)([ours], lr=0.1, **options)
    b = getattr(torch.optim, name)([theirs], lr=0.1, foreach=False, **options)
    for grad in (size, 1.0):
        stepped(ours, a, grad)
        stepped(theirs, b, grad)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@each_name
def test_gradients_that_are_conjugated_when_read(name: str) -> None:
    g = torch.randn(5, dtype=torch.complex128)
    params = [torch.nn.Parameter(torch.ones(5, dtype=torch.complex128)) for _ in range(2)]
    for p, grad in zip(params, (g.conj(), g.conj().resolve_conj()), strict=True):
        stepped(p, make(name, [p]), grad)
    torch.testing.assert_close(*params)


def test_a_gradient_without_memory() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=0.1)
    for _ in range(3):
        stepped(p, optimizer, torch._efficientzerotensor(4))
    assert torch.equal(p.detach(), torch.ones(4))


@pytest.mark.parametrize("scaled", [False, True])
def test_inference_mode(scaled: bool) -> None:
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        optimizer = optim.SGD([p], lr=0.1)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 2.0), torch.zeros(1)
        for _ in range(2):
            stepped(p, optimizer, 2.0 if scaled else 1.0)
        torch.testing.assert_close(p, torch.full((4,), 0.8))


# ---- values changed between steps ------------------------------------------------------------------------------------


def test_a_norm_stays_what_it_was() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=0.1, max_grad_norm=1.0)
    norms = []
    for grad in (1.0, 10.0):
        stepped(p, optimizer, grad)
        norms.append(optimizer.grad_norm)
    assert [n.item() for n in norms] == [2, 20]


def test_the_decay_of_the_average_may_change() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=1.0, ema_decay=0.5)
    stepped(p, optimizer)  # ema 1 -> 0.5
    optimizer.ema_decay = 0.75
    stepped(p, optimizer)  # 0.75 * 0.5 + 0.25 * -1
    torch.testing.assert_close(optimizer.state[p]["ema"], torch.full((4,), 0.125))
    with pytest.raises(ValueError, match="ema_decay"):
        optimizer.ema_decay = 2.0
    optimizer.ema_decay = None
    stepped(p, optimizer)
    torch.testing.assert_close(optimizer.state[p]["ema"], torch.full((4,), 0.125))


def test_hyper_parameters_changed_in_place() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)
    optimizer.param_groups[0]["lr"] = numpy.array(1.0)
    stepped(p, optimizer)
    optimizer.param_groups[0]["lr"] *= 0.5
    stepped(p, optimizer)
    assert torch.equal(p.detach(), torch.full((2,), -1.5))
    momentum = torch.tensor(0.0)
    optimizer = optim.SGD([p], lr=1.0, momentum=momentum)
    for _ in range(2):
        stepped(p, optimizer)
    momentum.fill_(0.5)
    p.data.zero_()
    for _ in range(2):
        stepped(p, optimizer)
    assert torch.equal(p.detach(), torch.full((2,), -2.5))


def test_a_key_may_be_anything() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)
    for value in range(3):
        optimizer.param_groups[0][7] = value
        stepped(p, optimizer)
    assert torch.equal(p.detach(), torch.full((2,), -3.0))


def test_a_refused_step_forgets_nothing() -> None:
    """Which momentum buffers are still to be set, where the first is the gradient whole."""
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = optim.SGD([p, q], lr=1.0, momentum=0.9, dampening=0.5, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.ones(1)
    q.grad = torch.ones(2)
    stepped(p, optimizer)  # skipped
    del optimizer.found_inf, optimizer.grad_scale
    q.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    q.grad = torch.ones(2)
    stepped(p, optimizer)
    assert torch.equal(p.detach(), torch.full((2,), -1.0))


def test_hooks_of_loading() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    full = optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1, momentum=0.9)
    q.grad = torch.ones(2)
    stepped(p, full)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    optimizer.register_load_state_dict_pre_hook(lambda o, _: o.add_param_group({"params": [q]}))

    def cast(o: torch.optim.Optimizer) -> None:
        o.state[p]["momentum_buffer"] = o.state[p]["momentum_buffer"].double()

    optimizer.register_load_state_dict_post_hook(cast)
    optimizer.load_state_dict(full.state_dict())
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float64
    assert torch.equal(optimizer.state[q]["momentum_buffer"], torch.ones(2))


# ---- averages --------------------------------------------------------------------------------------------------------


def test_masters_follow_what_was_written_before_the_average_was_shown() -> None:
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optim.SGD([p], lr=0.5, master_weights="fp32", ema_decay=0.9)
    stepped(p, optimizer, torch.linspace(-1, 1, 4).bfloat16())
    with torch.no_grad():
        p.fill_(5.0)
    with optimizer.averaged_parameters():
        pass
    stepped(p, optimizer, 0.0)
    assert (p == 5).all()


def test_no_step_with_averages() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=0.5, ema_decay=0.9)
    stepped(p, optimizer)
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="averaged_parameters"):
        optimizer.step()
    optimizer.step()
    optimizer.state[p]["ema"] = torch.ones(3)
    was = p.detach().clone()
    with pytest.raises(RuntimeError, match="size"), optimizer.averaged_parameters():
        pass
    assert torch.equal(p.detach(), was)
    optimizer.state[p]["ema"] = torch.ones(4)
    optimizer.step()
