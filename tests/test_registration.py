"""The operators as torch sees them: schema, fake tensors, torch.compile, transforms, forward-mode AD."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import CASES, Case
from parity import LAYOUTS, Guarded
from sweep import INTERPRETED, cast, forward_backward, functions_alone, outputs, subsets
from torch import Tensor, library
from torch.fx.experimental.proxy_tensor import make_fx

from fusedtricks import MixedTarget
from fusedtricks import functional as F
from fusedtricks import nn as fnn
from fusedtricks._op import Op

pytestmark = pytest.mark.skipif(INTERPRETED, reason="registration does not depend on the interpreter")

NORMS = [stem for stem, case in CASES.items() if case.family == "norm"]


def sample_calls(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Op, tuple[Any, ...]]]:
    """Operators with their arguments, as the public function calls them over layouts, absent and frozen tensors."""
    calls, run = [], Op.__call__
    # What a forward returned and its backward gets has a graph, which opcheck would walk; leaves stay as they are.
    own = lambda args: tuple(a.detach() if isinstance(a, Tensor) and not a.is_leaf else a for a in args)  # noqa: E731
    monkeypatch.setattr(Op, "__call__", lambda op, *args: calls.append((op, own(args))) or run(op, *args))
    every = itertools.product(LAYOUTS, subsets(case.optional), [*case.layout_shapes])
    for layout, absent, shape in every:
        size, *rest = case.shapes[shape]
        for frozen in subsets([name for name in case.floating if name not in absent]):
            last = shape == case.layout_shapes[-1]
            if (absent or frozen or not last) and (layout != "plain" or (not last and (absent or frozen))):
                continue
            tensors = [
                None if name in absent else Guarded(cast(t, torch.float32), layout if i == 0 else "plain").tensor
                for i, (name, t) in enumerate(zip(case.names, case.inputs(size, *rest), strict=True))
            ]
            wanted = [i for i, n in enumerate(case.names) if n not in (*absent, *frozen, *case.fixed)]
            ys = outputs(case.call(case.torch_fn, tensors, *rest))
            dys = [Guarded(y, layout if y.dim() >= 2 else "plain").tensor for y in ys]
            forward_backward(case, case.fn, tensors, wanted, dys, *rest)
            for options in case.options.values() if layout == "plain" and last and not (absent or frozen) else ():
                ys = outputs(case.call(case.torch_fn, tensors, *rest, **options))
                dys = [torch.randn_like(y) for y in ys]
                forward_backward(case, case.fn, tensors, wanted, dys, *rest, **options)
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("stem", CASES)
def test_opcheck(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with functions_alone():
        calls = sample_calls(CASES[stem], monkeypatch)
    assert {op.name for op, _ in calls} == {op.name for op in CASES[stem].operators}
    for op, args in calls:
        library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
    for op in CASES[stem].operators:
        args = next(args for called, args in calls if called is op)
        library.opcheck(op.default, args)


@pytest.mark.parametrize("stem", CASES)
def test_every_back_end_has_the_strides_of_meta(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with functions_alone():
        calls = sample_calls(CASES[stem], monkeypatch)
    for op, args in calls:
        meta = tensors_of(op.default(*(_as_meta(a) for a in args)))
        for backend in op.available():
            if backend != "cuda" and backend != "triton":
                for real, fake in zip(tensors_of(op.implementation(backend)(*args)), meta, strict=True):
                    said = f"{op.name} {backend}, first argument {args[0].shape} {args[0].stride()}"
                    assert (real.shape, real.dtype) == (fake.shape, fake.dtype), said
                    assert real.stride() == fake.stride() or real.numel() <= 1, (
                        f"{said}: {real.stride()}, {fake.stride()}"
                    )


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """What an operator returned; nothing where it works in place."""
    return () if result is None else outputs(result)


def _as_meta(a: Any) -> Any:
    if not isinstance(a, Tensor):
        return a
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")


def compiled_and_eager(
    stem: str, shape: str, layout: str = "plain", absent: tuple[str, ...] = (), **options: Any
) -> None:
    case = CASES[stem]
    size, *rest = case.shapes[shape]
    tensors = [
        None if name in absent else Guarded(cast(t, torch.float32), layout if i == 0 else "plain").tensor
        for i, (name, t) in enumerate(zip(case.names, case.inputs(size, *rest), strict=True))
    ]
    wanted = [i for i, name in enumerate(case.names) if name not in (*absent, *case.fixed)]
    dys = [torch.randn(y.shape) for y in outputs(case.call(case.torch_fn, tensors, *rest))]
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: case.call(case.fn, t, *rest), fullgraph=True, **options)
    case_of_compiled = lambda _, t: compiled(t)  # noqa: E731
    ours = forward_backward(_Calling(case_of_compiled), None, tensors, wanted, dys)
    eager = forward_backward(case, case.fn, tensors, wanted, dys, *rest)
    torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    assert [t.stride() for t in ours] == [t.stride() for t in eager]


class _Calling:
    """As much of a case as `forward_backward` asks for."""

    def __init__(self, call: Any):
        self.call = call


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
def test_compile_aot_eager(stem: str, layout: str) -> None:
    for shape in CASES[stem].layout_shapes:
        compiled_and_eager(stem, shape, layout, backend="aot_eager")


@pytest.mark.parametrize("stem", CASES)
def test_compile_without_optional_tensors(stem: str) -> None:
    for absent in subsets(CASES[stem].optional)[1:]:
        compiled_and_eager(stem, CASES[stem].shape, absent=absent, backend="aot_eager")


@pytest.mark.parametrize("stem", CASES)
def test_compile_inductor(stem: str) -> None:
    compiled_and_eager(stem, CASES[stem].shape)


@pytest.mark.parametrize("stem", CASES)
def test_compile_dynamic_shapes_once(stem: str) -> None:
    case, compilations = CASES[stem], []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    rest = case.growing[0][1:]
    compiled = torch.compile(lambda t: case.call(case.fn, t, *rest), fullgraph=True, dynamic=True, backend=counting)
    for shape in case.growing:
        tensors = [cast(t, torch.float32) for t in case.inputs(*shape)]
        torch.testing.assert_close(compiled(tensors), case.call(case.fn, tensors, *rest), rtol=0, atol=0)
    assert len(compilations) == 1


ONES, LABELS = torch.ones(6), torch.arange(8) % 6
# Calls on x (N, 6) and labels (N,), with as many default arguments as there are.
CALLS: dict[str, Any] = {
    "layer_norm": lambda x, _: F.layer_norm(x, (6,), ONES, 2 * ONES),
    "rms_norm": lambda x, _: F.rms_norm(x, (6,), ONES),
    "batch_norm": lambda x, _: F.batch_norm(x, None, None, training=True),
    "batch_norm_eval": lambda x, _: F.batch_norm(x, ONES, 2 * ONES),
    "batch_norm_act": lambda x, _: F.batch_norm_act(x, None, None, residual=x, training=True),
    "batch_norm_gelu": lambda x, _: F.batch_norm_act(x, None, None, residual=x, training=True, activation="gelu"),
    "dropout_add_layer_norm": lambda x, _: F.dropout_add_layer_norm(x, x, ONES, 2 * ONES, p=0.0),
    "cross_entropy": lambda x, labels: F.cross_entropy(x, labels),
    "cross_entropy_of_a_pair": lambda x, labels: F.cross_entropy(x, MixedTarget(labels, labels, torch.ones(()))),
    "linear_cross_entropy": lambda x, labels: F.linear_cross_entropy(x, torch.eye(6), labels),
    "distillation": lambda x, labels: F.distillation_loss(x, x, labels),
    "mixup": lambda x, labels: F.mixup(x, labels, 0.3, torch.arange(x.shape[0]))[0],
    "shake_shake": lambda x, _: F.shake_shake(x, x, training=False),
    "modules": torch.nn.Sequential(fnn.BatchNorm1d(6), fnn.LayerNorm(6), fnn.RMSNorm(6), fnn.Dropout(0.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_twice_in_one_graph_of_dynamic_shapes(name: str) -> None:
    """With dynamic=True floats are inputs too, default arguments among them: the second call shares the first's. And
    one tensor may be several arguments."""
    call = CALLS[name]
    once = (lambda x, _: call(x)) if isinstance(call, torch.nn.Module) else call
    twice = lambda x, labels: (once(x, labels) + 2 * once(2 * x, labels)).sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 5):
        xs = [torch.linspace(-1, 2, 6 * rows).sin().reshape(rows, 6).requires_grad_() for _ in range(2)]
        losses = [f(x, LABELS[:rows]) for f, x in zip((compiled, twice), xs, strict=True)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, xs, strict=True)))


@pytest.mark.parametrize("name", ["shake_shake", "mixup", "cutmix", "box"])
def test_compile_draws_for_dynamic_shapes(name: str) -> None:
    mix = {"mixup": fnn.Mixup(per_sample=True, prob=0.5), "cutmix": fnn.CutMix(per_sample=True, prob=0.5)}.get(name)

    def call(x: Tensor, labels: Tensor, box: Tensor) -> Tensor:
        if name == "shake_shake":
            return F.shake_shake(x, 2 * x)
        if name == "box":
            return F.cutmix(x, labels, 0.5, torch.arange(x.shape[0]).flip(0), box=box)[0]
        return mix(x, labels)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 5):
        given = torch.rand(rows, 3, 6, 6, requires_grad=True), LABELS[:rows], torch.tensor([[1, 4, 0, 5]] * rows)
        torch.manual_seed(rows)
        y = compiled(*given)
        torch.manual_seed(rows)
        torch.testing.assert_close(y, call(*given))


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "mixup"])
def test_compile_in_place(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        hidden = 2 * x
        if name == "mixup":
            return F.mixup(hidden, None, 0.3, torch.arange(8).flip(0), out=hidden)[0] + hidden
        drop = fnn.Dropout(0.5, inplace=True) if name == "dropout" else fnn.Dropout2d(0.5, inplace=True)
        return drop(hidden) + hidden

    torch._dynamo.reset()
    found = []
    for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        torch.manual_seed(0)
        x = torch.linspace(1, 2, 8 * 6 * 4).reshape(8, 6, 2, 2).requires_grad_()
        y = f(x)
        found.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "modules"])
def test_gradients_of_a_batch_of_gradients(name: str, layout: str) -> None:
    """vmap over the backward alone, as torch.autograd.functional.jacobian(vectorize=True) has it."""
    x = torch.linspace(-1, 2, 48).sin().reshape(8, 6)
    x = (x.t().contiguous().t() if layout == "transposed" else x).requires_grad_()
    y = CALLS[name](x, LABELS)
    dys = torch.linspace(-1, 1, 3 * y.numel()).reshape(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(together, torch.stack(one_by_one))


OPEN = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x, 0.5),
    "dropout_add_layer_norm": lambda x: F.dropout_add_layer_norm(x, x, None, None, p=0.5),
    "shake_shake": lambda x: F.shake_shake(x, 2 * x),
    "norms": lambda x: F.rms_norm(F.layer_norm(F.batch_norm(x, None, None, training=True), (5,)), (5,)),
}


@pytest.mark.parametrize("name", OPEN)
def test_export_leaves_the_size_of_the_batch_open(name: str) -> None:
    """Also where there are few channels, whose number of blocks of random bits would be seen as one, or not one."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OPEN[name](x)

    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Model(), (torch.rand(4, 3, 5, 5),), dynamic_shapes=shapes).module()
    for batch in (2, 9):
        x = torch.rand(batch, 3, 5, 5)
        torch.manual_seed(batch)
        y = exported(x)
        torch.manual_seed(batch)
        torch.testing.assert_close(y, OPEN[name](x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "cross_entropy", "linear_cross_entropy", "distillation"])
def test_a_step_is_traced_by_make_fx(name: str, mode: str) -> None:
    def step(x: Tensor, labels: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = CALLS[name](x, labels)
        return torch.autograd.grad(y.square().sum(), x)[0]

    x = torch.linspace(-1, 2, 48).sin().reshape(8, 6)
    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x, LABELS)
    torch.testing.assert_close(graph(2 * x, LABELS.flip(0)), step(2 * x, LABELS.flip(0)))


@pytest.mark.parametrize("stem", NORMS)
def test_vmap_and_functional_grad(stem: str) -> None:
    case = CASES[stem]
    size, *rest = case.shapes[case.shape]
    x, *parameters = case.inputs(size, *rest)
    ours, theirs = ((lambda x, fn=fn: case.call(fn, [x, *parameters], *rest)) for fn in (case.fn, case.torch_fn))
    batch = torch.stack([x, 2 * x, x - 1])
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(torch.vmap(ours)(batch), torch.vmap(theirs)(batch))
    close(torch.vmap(ours, in_dims=1, out_dims=1)(batch.movedim(0, 1)), torch.vmap(theirs)(batch).movedim(0, 1))
    loss = lambda f: lambda x: f(x).square().sum()  # noqa: E731
    close(torch.func.grad(loss(ours))(x), torch.func.grad(loss(theirs))(x))
    close(torch.vmap(torch.func.grad(loss(ours)))(batch), torch.vmap(torch.func.grad(loss(theirs)))(batch))
    tangent = torch.randn_like(x)
    close(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,)))
    small = x[:, :1, :3]
    narrow = [p[:3] for p in parameters]
    hessian = lambda fn: torch.func.hessian(lambda x: case.call(fn, [x, *narrow], *rest).pow(3).sum())(small)  # noqa: E731
    close(hessian(case.fn), hessian(case.torch_fn))


@pytest.mark.parametrize("stem", NORMS)
def test_forward_mode(stem: str) -> None:
    case = CASES[stem]
    size, *rest = case.shapes[case.shape]
    tensors = case.inputs(size, *rest)
    tangents = [torch.randn_like(t) for t in tensors]

    def dual(fn: Any) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(case.call(fn, duals, *rest)).tangent.clone()

    torch.testing.assert_close(dual(case.fn), dual(case.torch_fn), rtol=1e-10, atol=1e-10)
