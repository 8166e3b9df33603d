"""The norms behave as torch's: signature, state, errors, autocast, and torch's own test inputs."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from cases import CASES, Case
from parity import assert_no_worse
from sweep import DTYPES, INTERPRETED, Target, forced, targets
from torch import Tensor
from torch.testing._internal import common_methods_invocations, common_modules

import fusedtricks

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")

NORMS = {stem: case for stem, case in CASES.items() if case.family == "norm"}
PAIRS = [pytest.param(c, *pair, id=pair[0].__name__) for c in NORMS.values() for pair in c.modules]
STEMS = pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
MODULES = pytest.mark.parametrize(("case", "ours", "theirs"), PAIRS)
# Tolerances of torch's own comparison in these dtypes.
close = torch.testing.assert_close


def sample(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Any, ...]]:
    size, *rest = case.shapes[case.shape]
    return [t.to(dtype) for t in case.inputs(size, *rest)], tuple(rest)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


# ---- modules ---------------------------------------------------------------------------------------------------------


@STEMS
def test_the_function_has_torch_s_signature(case: Case) -> None:
    ours, theirs = (inspect.signature(f).parameters.values() for f in (case.fn, case.torch_fn))
    assert [(p.name, p.kind, p.default) for p in ours if p.kind != p.KEYWORD_ONLY] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.default is not p.empty for p in ours if p.kind == p.KEYWORD_ONLY)


@MODULES
def test_the_module_has_torch_s_constructor_and_name(case: Case, ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert repr(ours(7)) == repr(theirs(7))
    forwards = [list(inspect.signature(m.forward).parameters) for m in (ours, theirs)]
    assert forwards[0] == forwards[1]


@MODULES
def test_state_dict_both_ways(case: Case, ours: type, theirs: type) -> None:
    a, b = randomised(ours(40)), randomised(theirs(40))
    assert list(a.state_dict()) == list(b.state_dict())
    x = torch.randn(5, 40)
    b.load_state_dict(a.state_dict())
    close(a(x), b(x))
    b = randomised(b)
    a.load_state_dict(b.state_dict())
    close(a(x), b(x))
    assert list(dict(a.named_parameters())) == list(dict(b.named_parameters()))


@MODULES
def test_copies_and_pickles(case: Case, ours: type, theirs: type) -> None:
    module, x = randomised(ours(40)), torch.randn(5, 40)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is ours
        assert torch.equal(again(x), module(x))
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(again.parameters(), module.parameters(), strict=True))


@MODULES
def test_hooks_run(case: Case, ours: type, theirs: type) -> None:
    module, seen = ours(40), []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre") or (args[0] * 2,))
    module.register_forward_hook(lambda m, args, out: seen.append("post") or out + 1)
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    x = torch.randn(5, 40, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert seen == ["pre", "post", "backward"]
    close(y, case.call(case.torch_fn, [2 * x, *module.parameters()], 1, eps=module.eps) + 1)


@MODULES
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_device_and_dtype_arguments(case: Case, ours: type, theirs: type, dtype: torch.dtype) -> None:
    assert {p.dtype for p in ours(8, dtype=dtype).parameters()} == {dtype}
    meta = ours(8, device="meta", dtype=dtype)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    y = meta(torch.empty(3, 8, device="meta", dtype=dtype))
    assert (y.shape, y.dtype, y.device.type) == ((3, 8), dtype, "meta")
    assert ours(8).to(dtype)(torch.randn(3, 8).to(dtype)).dtype == dtype


@MODULES
def test_tensor_subclass_parameters_train(case: Case, ours: type, theirs: type) -> None:
    """A few steps of SGD go where torch's module goes."""
    a = randomised(ours(40))
    b = theirs(40)
    b.load_state_dict(a.state_dict())
    for module in (a, b):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(6, 40)).square().mean().backward()
            optimizer.step()
    close(dict(a.named_parameters()), dict(b.named_parameters()))


# ---- torch's own inputs ----------------------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_db(case: Case, ours: type, theirs: type, dtype: torch.dtype) -> None:
    info = next(i for i in common_modules.module_db if i.module_cls is theirs)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert inputs
    for given in inputs:
        (a, ka), (b, kb) = (copy.deepcopy((i.args, i.kwargs)) for i in (given.forward_input,) * 2)
        built = [
            cls(*given.constructor_input.args, **given.constructor_input.kwargs).to(dtype) for cls in (ours, theirs)
        ]
        randomised(built[1])
        built[0].load_state_dict(built[1].state_dict())
        results = [module(*args, **kwargs) for module, args, kwargs in zip(built, (a, b), (ka, kb), strict=True)]
        close(*results, msg=lambda m, d=given.desc: f"{d}: {m}")
        grads = [
            torch.autograd.grad(y.square().sum(), [args[0], *m.parameters()])
            for y, args, m in zip(results, (a, b), built, strict=True)
        ]
        close(*grads)


def op_infos(case: Case) -> list[Any]:
    return [i for i in common_methods_invocations.op_db if i.name in case.op_db]


@STEMS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_op_db_samples(case: Case, dtype: torch.dtype) -> None:
    assert {i.name for i in op_infos(case)} == set(case.op_db)
    for info in op_infos(case):
        for given in info.sample_inputs("cpu", dtype):
            arguments = [given.input, *given.args, *given.kwargs.values()]
            assert_as_good_as_torch(case, given, [t for t in arguments if isinstance(t, Tensor)])


def assert_as_good_as_torch(case: Case, given: Any, leaves: list[Tensor]) -> None:
    """Values and gradients of one sample; with a single column the rounding of torch itself is amplified 320 times."""
    dy = torch.randn_like(given.input)

    def run(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        own = {id(t): t.detach().to(dtype).requires_grad_() for t in leaves}
        take = lambda a: own.get(id(a), a)  # noqa: E731
        y = fn(take(given.input), *map(take, given.args), **{k: take(v) for k, v in given.kwargs.items()})
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y, list(own.values()), dy.to(dtype))]

    dtype = given.input.dtype
    slack = 1280 * torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    each = zip(run(case.fn, dtype), run(case.torch_fn, dtype), run(case.torch_fn, torch.float64), strict=True)
    for i, (ours, theirs, truth) in enumerate(each):
        strides = torch.empty_like(ours).stride()
        assert_no_worse(ours, theirs, truth, strides=strides, name=f"result {i} of {given}", slack=slack)


@STEMS
def test_op_db_errors(case: Case) -> None:
    found = [e for info in op_infos(case) if info.error_inputs_func for e in info.error_inputs("cpu")]
    for error in found:
        given = error.sample_input
        with pytest.raises(error.error_type) as raised:
            case.torch_fn(given.input, *given.args, **given.kwargs)
        with pytest.raises(error.error_type, match=r"(?i)expected|must be|not implemented") as ours:
            case.fn(given.input, *given.args, **given.kwargs)
        assert ours.type is raised.type
    assert found


# ---- errors ----------------------------------------------------------------------------------------------------------

X = torch.randn(3, 8)
ERRORS = {
    "normalized_shape does not match": (
        (X, (7,)),
        r"normalized_shape=\[7\], expected input with shape \[\*, 7\].*\[3, 8\]",
    ),
    "more dimensions normalised than there are": ((X, (2, 3, 8)), r"expected input with shape \[\*, 2, 3, 8\]"),
    "nothing normalised": ((X, ()), "at least 1-dimensional"),
    "weight of another shape": ((X, (8,), torch.randn(7)), r"Expected weight .*\[7\].*\[8\]"),
    "integer input": ((torch.ones(3, 8, dtype=torch.int64), (8,)), "not implemented for"),
    "boolean input": ((torch.ones(3, 8, dtype=torch.bool), (8,)), "not implemented for"),
    "int as shape": ((X, 8), "must be tuple of ints, not int"),
    "list as input": (([1.0, 2.0], (2,)), "must be Tensor, not list"),
    "None as input": ((None, (2,)), "must be Tensor, not NoneType"),
    "shape of floats": ((X, (8.0,)), "must be tuple of ints"),
    "list as weight": ((X, (8,), [1.0] * 8), "weight.*must be Tensor"),
}


@STEMS
@pytest.mark.parametrize("reason", ERRORS)
def test_errors_are_of_torch_s_type_and_say_what_was_expected(case: Case, reason: str) -> None:
    args, said = ERRORS[reason]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        case.torch_fn(*args)
    with pytest.raises(theirs.type, match=said):
        case.fn(*args)


@STEMS
def test_device_mix(case: Case) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*weight on meta.*input on cpu"):
        case.fn(X, (8,), torch.ones(8, device="meta"))


# ---- autocast and dtypes ---------------------------------------------------------------------------------------------


@STEMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16], ids=lambda d: f"autocast to {d}")
def test_autocast_on_the_cpu_is_torch_s(case: Case, dtype: torch.dtype, cache: torch.dtype) -> None:
    tensors, rest = sample(case, dtype)
    with torch.autocast("cpu", dtype=cache):
        ours, theirs = (case.call(fn, tensors, *rest) for fn in (case.fn, case.torch_fn))
    assert ours.dtype == theirs.dtype
    close(ours, theirs)


@STEMS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_cuda_is_torch_s(case: Case, dtype: torch.dtype) -> None:
    tensors, rest = sample(case, dtype)
    tensors = [t.cuda() for t in tensors]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, theirs = (case.call(fn, tensors, *rest) for fn in (case.fn, case.torch_fn))
    assert ours.dtype == theirs.dtype
    close(ours, theirs)


@STEMS
def test_default_arguments_are_torch_s(case: Case) -> None:
    """With no eps and no parameters at all; tiny values make eps show."""
    for scale in (1.0, 1e-3, 1e-4):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = (X * scale).to(dtype)
            close(case.fn(x, (8,)), case.torch_fn(x, (8,)))
            close(case.fn(x, [8]), case.torch_fn(x, torch.Size([8])))


@STEMS
def test_inputs_are_left_alone_in_a_longer_graph(case: Case) -> None:
    """A gradient that two consumers share must not be overwritten by the first."""
    tensors, rest = sample(case, torch.float64)
    x = tensors[0].requires_grad_()

    def total(fn: Any) -> Tensor:
        y = case.call(fn, tensors, *rest)
        return torch.autograd.grad((x * 2 + y).square().sum(), x)[0]

    close(total(case.fn), total(case.torch_fn))


@STEMS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(case: Case, mode: Any) -> None:
    tensors, rest = sample(case)
    tensors = [t.requires_grad_() for t in tensors]
    with mode():
        y = case.call(case.fn, tensors, *rest)
    assert not y.requires_grad
    close(y, case.call(case.torch_fn, tensors, *rest).detach())


@STEMS
def test_checkpointed(case: Case) -> None:
    tensors, rest = sample(case)
    tensors = [t.requires_grad_() for t in tensors]
    run = lambda: case.call(case.fn, tensors, *rest)  # noqa: E731
    plain, again = run(), torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    close(*(torch.autograd.grad(y.square().sum(), tensors) for y in (plain, again)), rtol=0, atol=0)


@STEMS
def test_modified_inputs_are_noticed(case: Case) -> None:
    tensors, rest = sample(case)
    x = tensors[0].requires_grad_() * 1
    y = case.call(case.fn, [x, *tensors[1:]], *rest)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@STEMS
def test_every_target_on_a_tensor_with_many_batch_dimensions(case: Case) -> None:
    """Permuted to the most strided order, nine batch dimensions: either correct or refused clearly."""
    x = torch.randn(2, 2, 2, 2, 2, 2, 2, 2, 2, 8).permute(8, 0, 7, 1, 6, 2, 5, 3, 4, 9)[::1, :, :, :1]
    for target in targets(case) or [Target("cpu", "reference")]:
        with forced(target):
            close(case.fn(x.to(target.device), (8,)).cpu(), case.torch_fn(x, (8,)))


def test_nested_tensors_are_torch_s() -> None:
    """Rows of several lengths, as attention without padding has them."""
    rows = [torch.randn(2, 6), torch.randn(5, 6)]
    theirs = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.RMSNorm(6), torch.nn.Dropout(1.0), torch.nn.Dropout())
    ours = copy.deepcopy(theirs)
    fusedtricks.swap(ours, verbose=False)
    found = []
    for model in (ours, theirs):
        x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        y = model[:2](x)
        y.values().square().sum().backward()
        found.append([y.values(), x.grad.values(), *(p.grad for p in model[:2].parameters())])
        assert not model[2](y).values().any()
        assert model[3](y).values().count_nonzero() < y.values().numel()
    torch.testing.assert_close(*found)


def test_strided_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(2, 5)])
    ours = fusedtricks.nn.LayerNorm(5)(nested)
    theirs = torch.nn.LayerNorm(5)(nested)
    for a, b in zip(ours.unbind(), theirs.unbind(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fn", [fusedtricks.functional.layer_norm, fusedtricks.functional.rms_norm])
def test_double_rows_whose_squares_overflow_under_vmap(fn: Any) -> None:
    x = torch.randn(2, 4, dtype=torch.float64) * 1e200
    torch.testing.assert_close(torch.vmap(lambda row: fn(row, (4,)))(x), fn(x, (4,)))
