"""linear_cross_entropy against cross_entropy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.cross_entropy import torchs
from parity import assert_no_worse
from sweep import INTERPRETED
from torch import Tensor

from fusedtricks import MixedTarget
from fusedtricks.functional import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.skipif(INTERPRETED, reason="its kernels are those of cross_entropy")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none, smoothed": {"reduction": "none", "label_smoothing": 0.1},
    "sum, an ignored class": {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1},
}
# (dtype, rows at once, bias)
CHUNKS = [
    (torch.float32, None, True),
    (torch.float32, 4, False),
    (torch.float64, 5, True),
    (torch.bfloat16, 4, True),
    (torch.float16, 1, True),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "pair", "one lam", "probabilities"])
@pytest.mark.parametrize(("dtype", "chunk", "with_bias"), CHUNKS, ids=str)
def test_against_the_logits(with_bias: bool, chunk: int | None, dtype: torch.dtype, kind: str, options: str) -> None:
    rows, width, classes, given = 14, 9, 23, dict(OPTIONS[options])
    values = [torch.randn(s).to(dtype) for s in ((rows, width), (classes, width), (classes,))]
    class_weight = (torch.rand(classes) + 0.1).to(dtype)
    a, b = (torch.randint(classes, (rows,)) for _ in range(2))
    a[3] = b[3] = b[5] = given.get("ignore_index", -100)
    lam, soft = torch.rand(rows if kind == "pair" else ()), torch.rand(rows, classes).to(dtype)
    if kind == "probabilities":
        given.pop("ignore_index", None)
    dy = torch.randn(rows if given.get("reduction") == "none" else ())

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        x, w, bias = (v.detach().to(dtype).requires_grad_() for v in values)
        inputs = [x, w, bias] if with_bias else [x, w]
        target: Any = a
        if kind == "probabilities":
            target = soft.to(dtype).requires_grad_()
            inputs.append(target)
        elif kind != "hard":
            share = lam.to(torch.float32 if fused and dtype != torch.float64 else dtype).requires_grad_()
            target = MixedTarget(a, b, share)
            inputs.append(share)
        if fused:
            loss = linear_cross_entropy(
                x, w, target, bias if with_bias else None, class_weight=class_weight, chunk=chunk, **given
            )
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        else:
            logits = torch.nn.functional.linear(x, w, bias if with_bias else None)
            loss = torchs(logits, target, class_weight.to(dtype), **given)
        grads = torch.autograd.grad(loss, inputs, dy.to(loss.dtype))
        return [t.detach().to(dtype) for t in (loss, *grads)]

    truth = run(False, torch.float64)
    for i, (ours, theirs, true) in enumerate(zip(run(True, dtype), run(False, dtype), truth, strict=True)):
        assert_no_worse(ours, theirs, true, name=f"result {i}", ulps=8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    from fusedtricks.ops import linear_cross_entropy as module

    seen, linear = [], module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda x, *rest: seen.append(rest[-1]) or linear(x, *rest))
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    x, w = torch.randn(30, 8, requires_grad=True), torch.randn(70_000, 8)
    linear_cross_entropy(x, w, torch.randint(70_000, (30,)), reduction=reduction).sum().backward()
    assert max(memory.nbytes for memory in seen) <= module.CHUNK_BYTES
    assert len(seen) == (10 if reduction == "mean" else 20)
    assert len({memory.data_ptr() for memory in seen[:10]}) == 1  # of one chunk at a time


@pytest.mark.parametrize("kind", ["hard", "pair", "probabilities"])
def test_second_derivatives_and_transforms(kind: str) -> None:
    x, w, bias, soft = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4, 2), (4,), (3, 4)))
    a, b = (torch.randint(4, (3,)) for _ in range(2))
    lam = torch.rand(3, dtype=torch.float64, requires_grad=True)
    inputs = {"hard": (x, w, bias), "pair": (x, w, bias, lam), "probabilities": (x, w, bias, soft)}[kind]

    def loss(x: Tensor, w: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        target = {"hard": a, "pair": MixedTarget(a, b, *rest[:1] or (lam,))}.get(kind, rest[0] if rest else soft)
        return linear_cross_entropy(x, w, target, bias, reduction="none", label_smoothing=0.1, chunk=2)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    through = torch.func.grad(lambda x: loss(x, w, bias).sum())(x)
    torch.testing.assert_close(through, torch.autograd.grad(loss(x, w, bias).sum(), x)[0])


def test_the_loss_scale_reaches_fp16_gradients_before_they_are_rounded() -> None:
    x = torch.tensor([[1.0]], dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.0], [-18.0]], dtype=torch.float16)  # a gradient of 1.5e-8 a logit, below fp16
    (grad,) = torch.autograd.grad(65536 * linear_cross_entropy(x, w, torch.tensor([0])), x)
    torch.testing.assert_close(grad.item(), -65536 * 18 * 1.523e-8, rtol=1e-2, atol=0)


def test_autocast_and_compile() -> None:
    x, w, y = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y)
    low = linear_cross_entropy(x.bfloat16(), w.bfloat16(), y)
    torch.testing.assert_close(loss, low, rtol=0, atol=0)
    assert [g.dtype for g in torch.autograd.grad(loss, (x, w))] == [torch.float32] * 2
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for reduction in ("mean", "none"):
        made = [
            torch.autograd.grad(f(x, w, y, reduction=reduction).sum(), (x, w)) for f in (compiled, linear_cross_entropy)
        ]
        torch.testing.assert_close(*made)


@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_dtypes_under_autocast(bias: Tensor | None) -> None:
    x, w, y = torch.randn(6, 4).bfloat16().requires_grad_(), torch.randn(5, 4, requires_grad=True), torch.arange(6) % 5
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y, bias)
        with pytest.raises(RuntimeError, match="one floating dtype"):
            linear_cross_entropy(x, w.double(), y, bias)
        with pytest.raises(RuntimeError, match="one floating dtype"):
            linear_cross_entropy(x.long(), w, y, bias)
    torch.testing.assert_close(
        loss, linear_cross_entropy(x, w.bfloat16(), y, None if bias is None else bias.bfloat16())
    )
    assert [g.dtype for g in torch.autograd.grad(loss, (x, w))] == [torch.bfloat16, torch.float32]
    with pytest.raises(RuntimeError, match="one floating dtype"):
        linear_cross_entropy(x, w, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors(dtype: torch.dtype) -> None:
    x, w = (torch.randn(s, device="meta", dtype=dtype, requires_grad=True) for s in ((6, 4), (5, 4)))
    loss = linear_cross_entropy(x, w, torch.zeros(6, device="meta").long())
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert torch.autograd.grad(loss, w)[0].shape == w.shape
    assert cross_entropy(x, torch.zeros(6, device="meta").long()).dtype == dtype


def test_nothing_kept_and_no_rows() -> None:
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.full((2, 3), -100))
    assert loss.isnan()
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    each = linear_cross_entropy(x, w, torch.full((2, 3), -100), reduction="none")
    assert (each == 0).all()
    assert each.shape == (2, 3)
    for reduction, shape in (("none", (0,)), ("sum", ())):
        none = linear_cross_entropy(x[0, :0], w, torch.zeros(0).long(), reduction=reduction)
        assert none.shape == shape
        assert (torch.autograd.grad(none.sum(), w)[0] == 0).all()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("labels", [[0, -100, 1], [-100, -100, -100], [0, -100, 2]], ids=str)
def test_classes_of_no_weight(labels: list[int], dtype: torch.dtype, mixed: bool) -> None:
    """0 / 0 is NaN, in the gradient too, but for ignored rows."""
    x, w, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    y, class_weight = torch.tensor(labels), torch.tensor([0.0, 0, 1, 1, 1])
    target = MixedTarget(y, y.flip(0).where(y >= 0, -100), torch.rand(3)) if mixed else y
    made = []
    for fused in (True, False):
        if fused:
            loss = linear_cross_entropy(x, w, target, bias, class_weight=class_weight, chunk=2)
        else:
            loss = cross_entropy(torch.nn.functional.linear(x, w, bias), target, class_weight, out_dtype=torch.float32)
        made.append((loss, *torch.autograd.grad(loss, (x, w, bias))))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
    torch.testing.assert_close(*made, equal_nan=True, **tolerance)


X, W, Y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3).long()
LATE = torch.tensor([[0, 0, 0], [0, 5, 0]])
ERRORS: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "widths": (RuntimeError, r"x \(\*, D\) and weight \(C, D\)", (X, torch.randn(5, 3), Y), {}),
    "no classes": (IndexError, "at least one class", (X, torch.randn(0, 4), Y), {}),
    "labels' shape": (RuntimeError, r"labels of shape \[2, 3\]", (X, W, torch.zeros(6).long()), {}),
    "labels' dtype": (RuntimeError, "dtype int64, int32 or uint8", (X, W, Y.short()), {}),
    "pair's shape": (ValueError, "MixedTarget.b must have shape", (X, W, MixedTarget(Y, Y[0], torch.rand(()))), {}),
    "probabilities and ignore_index": (RuntimeError, "ignore_index", (X, W, torch.rand(2, 3, 5)), {"ignore_index": 1}),
    "no tensor": (TypeError, "must be Tensor or MixedTarget, not list", (X, W, [0]), {}),
    "dtypes": (RuntimeError, "float32, float64", (X, W.double(), Y), {}),
    "bias": (RuntimeError, r"bias of shape \[5\]", (X, W, Y, torch.zeros(4)), {}),
    "a label that is no class": (IndexError, "Target 5 is out of bounds: row 4", (X, W, LATE), {"chunk": 2}),
    "reduction": (ValueError, "not a valid value", (X, W, Y), {"reduction": "max"}),
    "chunk": (ValueError, "positive number of rows", (X, W, Y), {"chunk": 0}),
    "class_weight": (RuntimeError, "weight tensor", (X, W, Y), {"class_weight": torch.ones(4)}),
    "smoothing": (RuntimeError, "label_smoothing", (X, W, Y), {"label_smoothing": 2.0}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    error, match, args, options = ERRORS[name]
    with pytest.raises(error, match=match):
        linear_cross_entropy(*args, **options)
