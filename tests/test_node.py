"""Calls that fusedtricks._node makes and records do what the autograd.Functions in Python do, to the bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES
from parity import Guarded, assert_bitwise_equal
from sweep import (
    INTERPRETED,
    configurations,
    forward_backward,
    functions_alone,
    generated,
    outputs,
    seed,
    shape_of,
    subsets,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedtricks
from fusedtricks import _op
from fusedtricks import functional as F
from fusedtricks.ops._shard import same_layout
from fusedtricks.ops.batch_norm import _nodes as batch_norm_nodes

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter runs forced back ends, which Python serves"),
    pytest.mark.skipif(_op._node is None, reason="fusedtricks._node was not built, or for another torch"),
]

STEMS = ["layer_norm", "rms_norm", "batch_norm", "dropout", "dropout_add_layer_norm", "mixup", "cutmix"]

Call = Callable[..., Any]


def act(**kwargs: Any) -> Call:
    def call(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        running = torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype)
        return F.batch_norm_act(x, *running, w, b, r, **kwargs)

    return call


def seeded(call: Call) -> Call:
    return lambda *tensors: (seed(3), call(*tensors))[1]


LAM, PERM = torch.tensor([0.2, 0.5, 1.0, 0.9]), torch.tensor([2, 0, 1, 3])
RUNNING = torch.arange(5) / 4, torch.arange(1, 6) / 4
BOX = torch.tensor([0, 2, 1, 3])
# Every pair, and every way that a gradient comes about: tensors x (4, 5, 3), weight and bias, residual.
CALLS: dict[str, Call] = {
    "layer_norm": lambda x, w, b, r: F.layer_norm(x.transpose(1, 2), (5,), w, b),
    "rms_norm": lambda x, w, b, r: F.rms_norm(x.transpose(1, 2), (5,), w),
    "batch_norm": lambda x, w, b, r: F.batch_norm(x, None, None, w, b, True),
    "batch_norm in evaluation": lambda x, w, b, r: F.batch_norm(x, *RUNNING, w, b),
    **{
        f"batch_norm, {activation}, {'training' if training else 'evaluation'}": act(
            training=training, activation=activation
        )
        for activation in ("identity", "relu", "silu")
        for training in (True, False)
    },
    "dropout": seeded(lambda x, w, b, r: F.dropout(x, 0.3)),
    "dropout of channels": seeded(lambda x, w, b, r: F.dropout1d(x, 0.3)),
    "dropout_add_layer_norm": seeded(
        lambda x, w, b, r: F.dropout_add_layer_norm(*(t.transpose(1, 2).contiguous() for t in (x, r)), w, b, 0.3)
    ),
    "dropout_add_layer_norm, both results": seeded(
        lambda x, w, b, r: F.dropout_add_layer_norm(
            *(t.transpose(1, 2).contiguous() for t in (x, r)), w, b, 0.3, prenorm=True
        )
    ),
    "dropout_add_layer_norm, rms": seeded(
        lambda x, w, b, r: F.dropout_add_layer_norm(
            *(t.transpose(1, 2).contiguous() for t in (x, r)), w, None, 0.3, rms=True
        )
    ),
    "mixup": lambda x, w, b, r: F.mixup(x, None, LAM, PERM)[0],
    "cutmix": lambda x, w, b, r: F.cutmix(x, None, 0.5, PERM, box=BOX)[0],
}


def tensors(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    seed(1)
    return [torch.randn(size, dtype=dtype).requires_grad_(requires_grad) for size in ((4, 5, 3), 5, 5, (4, 5, 3))]


def loss(ys: Any) -> Tensor:
    seed(2)
    return sum((y * torch.randn_like(y)).sum() for y in outputs(ys))


def gradients(name: str, **kwargs: Any) -> tuple[Tensor | None, ...]:
    leaves = tensors()
    return torch.autograd.grad(loss(CALLS[name](*leaves)), leaves, allow_unused=True, **kwargs)


def accumulated(name: str) -> list[Tensor | None]:
    """The gradients of the Function, as a backward leaves them in tensors."""
    leaves = tensors()
    with functions_alone():
        loss(CALLS[name](*leaves)).backward()
    return [t.grad for t in leaves]


def node_of(ys: Any) -> Any:
    """The node of ours that made y, which adds or views may follow."""
    todo = [outputs(ys)[0].grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node.name().startswith("_"):
            return node
        todo += [] if node is None else [n for n, _ in node.next_functions]
    raise AssertionError(f"no node of ours behind {ys}")


def in_cpp(node: Any) -> bool:
    return not isinstance(node, torch.autograd.function.BackwardCFunction)


def equal(ours: Any, theirs: Any) -> None:
    assert [g is None for g in ours] == [g is None for g in theirs]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is not None:
            assert_bitwise_equal(a, b, name=f"result {i}")
            assert same_layout(a, b), f"result {i}: strides {a.stride()}, expected {b.stride()}"


@pytest.mark.parametrize("stem", STEMS)
def test_same_bits_over_the_sweep(stem: str) -> None:
    """Dtypes, layouts of inputs and gradients, absent and frozen tensors, options: those of the parity sweep."""
    case = CASES[stem]
    for config in configurations(case):
        (values, dys), (size, *rest) = generated(case, config), shape_of(case, config)
        if size and torch.Size(size).numel() > 200_000:
            continue
        layouts = [config.layout] + [config.param_layout] * (len(values) - 1)
        given = [None if t is None else Guarded(t, by).tensor for t, by in zip(values, layouts, strict=True)]
        dys = [Guarded(dy, config.grad_layout).tensor for dy in dys]
        still = (*config.frozen, *case.fixed)
        wanted = [i for i, name in enumerate(case.names) if name not in still and given[i] is not None]

        options = case.options.get(config.options, {})
        run = functools.partial(forward_backward, case, case.fn, given, wanted, dys, *rest, **options)
        ours = run()
        with functions_alone():
            equal(ours, run())


@pytest.mark.parametrize("name", CALLS)
def test_the_node_is_in_cpp(name: str) -> None:
    node = node_of(CALLS[name](*tensors()))
    assert in_cpp(node), node
    with functions_alone():
        function = node_of(CALLS[name](*tensors()))
    assert not in_cpp(function)
    assert node.name() == function.name()
    assert len([n for n, _ in function.next_functions if n]) == len([n for n, _ in node.next_functions if n])


def test_every_pair_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """CALLS has them all."""
    from fusedtricks import _pair
    from fusedtricks.ops import batch_norm, cutmix, dropout, dropout_add_layer_norm, layer_norm, mixup, rms_norm

    called = set()

    def recorded(of: Any, *args: Any) -> Any:
        called.add(id(of))
        return _pair.recorded(of, *args)

    modules = (batch_norm, cutmix, dropout, dropout_add_layer_norm, layer_norm, mixup, rms_norm)
    for module in modules:
        monkeypatch.setattr(module, "recorded", recorded)
    for call in CALLS.values():
        call(*tensors())
    pairs = [*(m._node for m in modules if m is not batch_norm), *batch_norm_nodes.values()]
    assert called == {id(p) for p in pairs}


@pytest.mark.parametrize("name", CALLS)
def test_subsets_of_gradients(name: str) -> None:
    """What requires a gradient, and which gradients are asked for, changes nothing but which there are."""
    reached = [i for i, g in enumerate(gradients(name)) if g is not None]
    for some, asked in itertools.product(subsets(reached)[1:], (False, True)):

        def run() -> tuple[Tensor, ...]:
            leaves = tensors(requires_grad=asked)  # noqa: B023
            for i in some:  # noqa: B023
                leaves[i].requires_grad_()
            return torch.autograd.grad(loss(CALLS[name](*leaves)), [leaves[i] for i in some])  # noqa: B023

        ours = run()
        with functions_alone():
            equal(ours, run())


class Undefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", CALLS)
def test_undefined_gradients(name: str) -> None:
    def run(undefined: tuple[int, ...]) -> list[Tensor | None]:
        leaves = tensors()
        ys = [Undefined.apply(y) if i in undefined else y for i, y in enumerate(outputs(CALLS[name](*leaves)))]
        loss(tuple(ys)).backward()
        return [t.grad for t in leaves]

    for undefined in ((0,), (1,), (0, 1)):
        ours = run(undefined)
        with functions_alone():
            equal(ours, run(undefined))


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name: str) -> None:
    def scaled(*leaves: Tensor) -> Any:
        ys = CALLS[name](*leaves)
        assert in_cpp(node_of(ys))
        return ys

    leaves = tensors()
    assert torch.autograd.gradcheck(scaled, leaves)
    assert torch.autograd.gradgradcheck(scaled, leaves)
    ours = gradients(name, create_graph=True)
    with functions_alone():
        theirs = gradients(name, create_graph=True)
    equal([g if g is None else g.detach() for g in ours], [g if g is None else g.detach() for g in theirs])
    assert [g is not None and g.requires_grad for g in ours] == [g is not None and g.requires_grad for g in theirs]


@pytest.mark.parametrize("name", CALLS)
def test_a_back_end_forced_in_backward(name: str) -> None:
    leaves = tensors()
    scalar = loss(CALLS[name](*leaves))
    with fusedtricks.backend("reference"):
        ours = torch.autograd.grad(scalar, leaves, allow_unused=True)
    with functions_alone():
        scalar = loss(CALLS[name](*leaves))
    with fusedtricks.backend("reference"):
        equal(ours, torch.autograd.grad(scalar, leaves, allow_unused=True))


def test_forced_in_backward_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedtricks.ops.layer_norm import layer_norm_bwd

    ran, right = [], layer_norm_bwd.implementation("reference")
    wrong = lambda *args: ran.append(True) or right(*args)  # noqa: E731
    monkeypatch.setitem(layer_norm_bwd._implementations, "reference", wrong)
    x = torch.randn(3, 5, requires_grad=True)
    y = F.layer_norm(x, (5,))
    y.sum().backward(retain_graph=True)
    assert not ran
    with fusedtricks.backend("reference"):
        y.sum().backward()
    assert ran


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_back_end_forced_in_what_is_compiled(fullgraph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the block is left in the middle, for a call that is not compiled."""
    from fusedtricks.ops.layer_norm import layer_norm_fwd

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (5,))

    ran, right = [], layer_norm_fwd.implementation("reference")
    if not fullgraph:
        norm = torch._dynamo.disable(norm)
        seen = {"reference": lambda *args: ran.append(True) or right(*args)}
        monkeypatch.setattr(layer_norm_fwd, "_implementations", seen)

    def call(x: Tensor) -> Tensor:
        with fusedtricks.backend("reference"):
            return norm(x) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=fullgraph, backend="eager")
    x = torch.randn(3, 5, requires_grad=True)
    y = compiled(x)
    assert fullgraph or ran
    torch.testing.assert_close(y, call(x))
    assert in_cpp(F.layer_norm(x, (5,)).grad_fn)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensor_hooks(name: str) -> None:
    packed: list[Tensor] = []

    def run() -> tuple[Tensor | None, ...]:
        packed.clear()
        pack = lambda t: packed.append(t) or t.clone()  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            leaves = tensors()
            ys = CALLS[name](*leaves)
        return torch.autograd.grad(loss(ys), leaves, allow_unused=True)

    ours, count = run(), len(packed)
    equal(ours, gradients(name))
    with functions_alone():
        run()
    assert count == len(packed)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(name: str, reentrant: bool) -> None:
    leaves = tensors()
    loss(checkpoint(CALLS[name], *leaves, use_reentrant=reentrant)).backward()
    equal([t.grad for t in leaves], accumulated(name))


@pytest.mark.parametrize("name", CALLS)
def test_second_backward(name: str) -> None:
    leaves = tensors()
    ys = outputs(CALLS[name](*leaves))
    dys = [torch.randn_like(y) for y in ys]
    first = torch.autograd.grad(ys, leaves, dys, allow_unused=True, retain_graph=True)
    equal(torch.autograd.grad(ys, leaves, dys, allow_unused=True), first)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(ys, leaves, dys, allow_unused=True)


def test_modified_in_place() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    between = x * 1
    y = F.layer_norm(between, (5,))
    between.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, z = F.dropout_add_layer_norm(x, x, None, None, prenorm=True)
    z.add_(1)  # saved as a result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_anomaly_mode() -> None:
    x = torch.randn(3, 5, requires_grad=True)

    def run() -> None:
        y = F.layer_norm(x, (5,))
        with pytest.raises(RuntimeError, match="Function '_LayerNormBackward' returned nan values"):
            y.backward(torch.full_like(y, torch.nan))

    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="_LayerNormBackward"):
        run()


def test_tensor_and_node_hooks() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seen: list[str] = []
    x.register_hook(lambda g: seen.append("input") or 2 * g)
    y = F.layer_norm(x, (5,))
    y.register_hook(lambda g: seen.append("output") or 3 * g)
    y.retain_grad()
    y.grad_fn.register_prehook(lambda gs: seen.append("before"))
    y.grad_fn.register_hook(lambda ins, outs: seen.append("after"))
    y.backward(torch.ones_like(y) * (dy := torch.randn_like(y)))
    assert seen == ["output", "before", "after", "input"]
    torch.testing.assert_close(y.grad, 3 * dy)
    plain = x.detach().requires_grad_()
    F.layer_norm(plain, (5,)).backward(dy)
    torch.testing.assert_close(x.grad, 6 * plain.grad)


@pytest.mark.parametrize("name", CALLS)
def test_memory(name: str) -> None:
    """What was saved goes with the backward, or with the result, and nothing keeps itself alive."""

    def run(backward: bool) -> tuple[weakref.ref[Tensor], ...]:
        leaves = tensors()
        inputs = [t * 1 for t in leaves]
        ys = CALLS[name](*inputs)
        held = [*(weakref.ref(t) for t in inputs)]
        del inputs
        if backward:
            scalar = loss(ys)
            torch.autograd.grad(scalar, leaves, allow_unused=True)
            assert not any(ref() is not None for ref in held)
        return *held, *(weakref.ref(y) for y in outputs(ys))

    gc.disable()
    try:
        for backward in (True, False):
            assert not any(ref() is not None for ref in run(backward))
    finally:
        gc.enable()


def test_a_long_graph_is_taken_apart() -> None:
    """Without recursion, which would run out of stack."""
    x = torch.randn(1, 1, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = F.layer_norm(y, (1,))
    del y


def test_backward_from_threads() -> None:
    leaves = tensors()
    expected = {name: gradients(name) for name in CALLS}
    scalars = {name: loss(call(*leaves)) for name, call in CALLS.items()}
    found: list[tuple[str, Any]] = []

    def work() -> None:
        for name, scalar in scalars.items():
            grads = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
            found.append((name, grads))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 * len(CALLS)
    for name, grads in found:
        equal(grads, expected[name])


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = tensors()
        ys = outputs(CALLS[name](*leaves))
        grads = torch.autograd.grad(loss(ys), leaves, allow_unused=True)
    for fake, real in zip((*ys, *grads), (*outputs(CALLS[name](*tensors())), *gradients(name)), strict=True):
        assert (fake is None) == (real is None)
        assert fake is None or (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd(name: str) -> None:
    """The backward of an eager forward is compiled, in one graph."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule) -> Any:
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    for _ in range(2):
        leaves = tensors()
        scalar = loss(CALLS[name](*leaves))
        with torch._dynamo.compiled_autograd._enable(lambda g: graphs.append(g) or compiler(g)):
            scalar.backward()
        equal([t.grad for t in leaves], accumulated(name))
    assert len(graphs) == 1
    assert any("CppNode_" in str(node.target) for node in graphs[0].graph.nodes)


def test_compiled_autograd_tells_calls_apart() -> None:
    """By numbers, by what is saved and by which gradients are wanted."""
    calls = [
        lambda x, w: F.layer_norm(x, (5,), w, eps=1.0),
        lambda x, w: F.layer_norm(x, (5,), w, eps=0.1),
        lambda x, w: F.layer_norm(x, (5,), None, w),
        lambda x, w: F.layer_norm(x, (5,), w.detach()) + w,
        lambda x, w: F.layer_norm(x.detach(), (5,), w) + x,
        lambda x, w: F.layer_norm(x, (3, 5), w.expand(3, 5)),
        *(seeded(lambda x, w, p=p: F.dropout(x, p) + w) for p in (0.2, 0.7)),
        seeded(lambda x, w: F.dropout(x.t().contiguous().t(), 0.7) + w),
    ]

    def run(call: Call, compiled: bool) -> list[Tensor]:
        seed(1)
        x, w = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
        scalar = loss(call(x, w))
        compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(compiler) if compiled else contextlib.nullcontext():
            scalar.backward()
        return [x.grad, w.grad]

    torch._dynamo.reset()
    for call in calls:
        equal(run(call, True), run(call, False))


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "dropout"])
def test_transforms_modes_and_subclasses_are_pythons(name: str) -> None:
    class Sub(Tensor):
        pass

    names: list[str] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, *rest = tensors(requires_grad=False)
    call = CALLS[name]
    assert type(call(x.as_subclass(Sub), *rest)) is Sub
    with Mode():
        call(x, *rest)
    assert any(f"fusedtricks.{name}" in said for said in names)
    mapped = torch.vmap(lambda x: call(x, *rest), randomness="same")(torch.stack([x] * 2))
    torch.testing.assert_close(mapped[0], call(x, *rest))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(call(dual, *rest)).tangent is not None


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, list[bool]]]]:
    """Every operator that is called, and its flags."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[tuple[str, list[bool]]] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((str(func), [a for a in args if isinstance(a, bool)]))
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


@pytest.mark.parametrize("name", CALLS)
def test_dispatch_modes_see_the_operators(name: str) -> None:
    """FLOP counters, activation checkpointing by operator, profilers. Nothing is computed that nobody wants."""

    def run(wanted: int) -> list[tuple[str, list[bool]]]:
        leaves = tensors(requires_grad=False)
        leaves[wanted].requires_grad_()
        with watched() as seen:
            torch.autograd.grad(loss(CALLS[name](*leaves)), leaves[wanted])
        return [s for s in seen if s[0].startswith("fusedtricks")]

    for wanted in [i for i, g in enumerate(gradients(name)) if g is not None]:
        ours = run(wanted)
        with functions_alone():
            theirs = run(wanted)
        # The gradient of a residual may be that of the result, for which the node calls nothing.
        assert ours == theirs or (wanted == 3 and "identity" in name and ours == theirs[:1])
        assert len(theirs) == 2


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(4, 5, 3)
        running = torch.zeros(5), torch.ones(5)
        y = F.batch_norm(x, *running, training=True)
        assert y.is_inference()
        assert running[0].abs().sum() > 0
    weight = torch.ones(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        F.batch_norm(x, None, None, weight, None, True)


def test_averages_are_bumped() -> None:
    running = torch.zeros(5), torch.ones(5)
    x, w, b, _ = tensors(torch.float32)
    for wanted in (True, False):
        before = [t._version for t in running]
        with torch.set_grad_enabled(wanted):
            F.batch_norm(x, *running, w, b, True)
        assert all(t._version > v for t, v in zip(running, before, strict=True))


@pytest.mark.parametrize("module", [torch.nn.LayerNorm(5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5)])
def test_modules_copy_and_pickle(module: torch.nn.Module) -> None:
    fusedtricks.swap(model := torch.nn.Sequential(copy.deepcopy(module)))
    x = torch.randn(7, 5, requires_grad=True)
    seed(0)
    model(x).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        seed(0)
        y = other(x.detach().requires_grad_())
        assert in_cpp(y.grad_fn)
        y.sum().backward()


def test_seeds_that_are_drawn() -> None:
    """True is a seed, the same as in Python, and nothing else; where Python has to do it, nothing is drawn yet."""
    from fusedtricks.ops import dropout, layer_norm
    from fusedtricks.ops._philox import DRAW, new_seed

    x = torch.ones(200)
    for _ in range(3):
        state = torch.get_rng_state()
        y = dropout._node(x, DRAW, 30000, 1)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(y, dropout.dropout_fwd(x, new_seed(x.device), 30000, 1))
        assert torch.equal(after, torch.get_rng_state())
    assert dropout._node(x, DRAW, 2**64, 1) is None
    assert torch.equal(after, torch.get_rng_state())
    assert dropout._node(x, False, 30000, 1) is None
    assert layer_norm._node(x, True, None, 1e-5, 1) is None


def test_arguments_a_node_does_not_take() -> None:
    """Go to Python, whose errors and conversions they get."""
    import numpy

    x = torch.randn(3, 5, requires_grad=True)
    equal([F.layer_norm(x, (5,), eps=numpy.float64(1e-5))], [F.layer_norm(x, (5,))])
    equal([F.layer_norm(x, (5,), eps=1)], [F.layer_norm(x, (5,), eps=1.0)])
    for wrong in (None, "1e-5", object()):
        with pytest.raises((RuntimeError, TypeError)):
            F.layer_norm(x, (5,), eps=wrong)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedtricks import _pair
    from fusedtricks.ops import layer_norm

    monkeypatch.setattr(_op, "_node", None)
    assert _pair.pair(layer_norm._LayerNorm, layer_norm.layer_norm_fwd, layer_norm.layer_norm_bwd) is None
    monkeypatch.setattr(layer_norm, "_node", None)
    x = torch.randn(3, 5, requires_grad=True)
    assert not in_cpp(F.layer_norm(x, (5,)).grad_fn)
    with fusedtricks.backend("reference"):
        F.layer_norm(x, (5,)).sum().backward()
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert _op.for_this_torch("fusedtricks._node") is None
    assert _op.for_this_torch("fusedtricks._no_such_thing") is None
