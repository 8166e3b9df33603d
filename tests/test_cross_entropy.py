"""cross_entropy beyond parity with torch: traps that fused losses fall into, every kind of target against float64."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.cross_entropy import torchs
from parity import assert_bitwise_equal, assert_no_worse
from sweep import INTERPRETED
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fusedtricks
from fusedtricks import MixedTarget, _op
from fusedtricks.functional import cross_entropy, distillation_loss, linear_cross_entropy

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the Triton kernels have tests of their own")
BACKENDS = ["reference", "cpu"]
INFO = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
inf = float("inf")


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Any:
    with fusedtricks.backend(request.param):
        yield


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


def pair(rows: int, classes: int, per_sample: bool = True) -> MixedTarget:
    return MixedTarget(
        torch.randint(classes, (rows,)), torch.randint(classes, (rows,)), torch.rand(rows if per_sample else ())
    )


# ---- torch's own tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_inputs_of_torch(dtype: torch.dtype) -> None:
    inputs = INFO.module_inputs_func(INFO, "cpu", dtype, True, training=True)
    assert len(inputs) == 105
    for m in inputs:
        made, (x, *rest) = m.constructor_input, m.forward_input.args
        results = []
        for cls in (fusedtricks.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss):
            leaf = x.detach().clone().requires_grad_()
            loss = cls(*made.args, **made.kwargs)(leaf, *rest)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        torch.testing.assert_close(*results, equal_nan=True, msg=lambda s, m=made, x=x: f"{s} {m.kwargs} {x.shape}")


def test_error_inputs_of_torch() -> None:
    errors = INFO.module_error_inputs_func(INFO, "cpu", torch.float32, False, training=True)
    assert len(errors) == 7
    for e in errors:
        made, given = e.module_error_input.constructor_input, e.module_error_input.forward_input
        with pytest.raises(e.error_type, match=e.error_regex):
            fusedtricks.nn.CrossEntropyLoss(*made.args, **made.kwargs)(*given.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_op_db_samples(dtype: torch.dtype) -> None:
    """Values and gradients, to class probabilities too, of torch's samples as they are and strided."""
    info = next(i for i in op_db if i.name == "nn.functional.cross_entropy")
    assert info.error_inputs_func is None  # those of the module are above
    samples = list(info.sample_inputs("cpu", dtype))
    assert len(samples) == 21
    for given in [*samples, *(s.noncontiguous() for s in samples)]:
        (target,) = given.args

        def run(fn: Any, dtype: torch.dtype, given: Any = given, target: Tensor = target) -> list[Tensor]:
            cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
            leaves = [t if t.dtype == torch.long else cast(t.detach()).requires_grad_() for t in (given.input, target)]
            loss = fn(*leaves, **{k: cast(v) for k, v in given.kwargs.items()})
            return [loss.detach(), *torch.autograd.grad(loss.sum(), [t for t in leaves if t.requires_grad])]

        truth = run(F.cross_entropy, torch.float64)
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        for i, (mine, theirs, true) in enumerate(
            zip(run(cross_entropy, dtype), run(F.cross_entropy, dtype), truth, strict=True)
        ):
            strides = mine.stride()  # checked by the parity sweep
            assert_no_worse(mine, theirs, true, strides=strides, precision=precision, name=f"result {i}")


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_op_db_second_derivatives(kind: str) -> None:
    info = next(i for i in op_db if i.name == "nn.functional.cross_entropy")
    for given in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        (target,) = given.args
        if given.input.numel() > 60 or (target.dtype == torch.long) != (kind == "labels"):
            continue
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in (given.input, target)]
        fn = lambda x, t, given=given: cross_entropy(x, t, **given.kwargs)  # noqa: E731
        assert torch.autograd.gradcheck(fn, leaves)
        assert torch.autograd.gradgradcheck(fn, leaves)


# ---- every kind of target --------------------------------------------------------------------------------------------


@st.composite
def calls(draw: Any) -> tuple[Any, ...]:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    kind = draw(st.sampled_from(["hard", "pair", "one lam", "probabilities"]))
    size = draw(st.sampled_from([(7, 5), (3, 65), (2, 40), (2, 3, 5), (2, 4, 3, 6), (2, 33, 2, 3), (6,)]))
    options = {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))}
    options["reduction"] = draw(st.sampled_from(["none", "mean", "sum"]))
    if kind != "probabilities":
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 1]))
    weighted, layout = draw(st.booleans()), draw(st.sampled_from(["plain", "class last", "reversed"]))
    return dtype, kind, size, options, weighted, layout, draw(st.integers(0, 2**31))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(calls())
def test_against_float64(call: tuple[Any, ...]) -> None:
    dtype, kind, size, options, weighted, layout, seed = call
    g = torch.Generator().manual_seed(seed)
    classes = size[1] if len(size) > 1 else size[0]
    lead = (size[0], *size[2:]) if len(size) > 1 else ()
    x = (3 * torch.randn(size, generator=g)).to(dtype)
    if layout == "class last" and len(size) > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "reversed":
        x = x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    weight = torch.rand(classes, generator=g).to(dtype) + 0.25 if weighted else None
    a, b = (torch.randint(classes, lead, generator=g) for _ in range(2))
    for labels in (a, b):
        labels[torch.rand(lead, generator=g) < 0.3] = options.get("ignore_index", 0)
    if kind == "probabilities":
        target: Any = torch.rand(size, generator=g).to(dtype)
        wide: Any = target.double()
    elif kind == "hard":
        target = wide = a
    else:
        lam = torch.rand(lead[:1] if kind == "pair" else (), generator=g)
        target, wide = MixedTarget(a, b, lam), MixedTarget(a, b, lam.double())

    def run(fn: Any, x: Tensor, target: Any, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = fn(x, target, weight, **options)
        return loss.detach(), *torch.autograd.grad((loss * torch.ones_like(loss)).sum(), x)

    truth = run(torchs, x.double(), wide, weight.double() if weighted else None)
    hypothesis.assume(not truth[0].isnan().any())
    theirs = run(torchs, x, target, weight)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for name, ours, their, true in zip(
        ("loss", "gradient"), run(cross_entropy, x, target, weight), theirs, truth, strict=True
    ):
        strides = torch.empty_like(x).stride() if name == "gradient" else None
        assert_no_worse(ours, their, true, strides=strides, precision=precision, name=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_pair_is_the_one_hot_soft_target(smoothing: float) -> None:
    x = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    t = MixedTarget(*(torch.randint(13, (9,)) for _ in range(2)), torch.rand(9, dtype=torch.float64))
    soft = t.lam[:, None] * F.one_hot(t.a, 13) + (1 - t.lam[:, None]) * F.one_hot(t.b, 13)
    ours, theirs = (fn(x, y, label_smoothing=smoothing) for fn, y in ((cross_entropy, t), (F.cross_entropy, soft)))
    torch.testing.assert_close((ours, gradient(ours, x)), (theirs, gradient(theirs, x)))
    ours = cross_entropy(x, soft, label_smoothing=smoothing)
    torch.testing.assert_close((ours, gradient(ours, x)), (theirs, gradient(theirs, x)))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8], ids=str)
def test_labels_of_other_dtypes(kind: torch.dtype) -> None:
    x, y = torch.randn(9, 13), torch.randint(13, (9,))
    assert_bitwise_equal(cross_entropy(x, y.to(kind)), cross_entropy(x, y))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5]).double()},
        {"label_smoothing": 0.2},
        {"z_loss": 0.1, "softcap": 2.0, "temperature": 3.0, "label_smoothing": 0.1},
        {"return_lse": True},
    ],
    ids=str,
)
def test_gradients_of_both_orders(options: dict[str, Any], reduction: str) -> None:
    x, p = (torch.randn(4, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    a, b = torch.tensor([0, 4, -100, 2]), torch.tensor([1, -100, -100, 2])
    for lam in (
        torch.rand(4, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor([0, 1, 0.5, 0.2]).double(),
    ):
        inputs = (x, lam.requires_grad_())
        fn = lambda x, lam: cross_entropy(x, MixedTarget(a, b, lam), reduction=reduction, **options)  # noqa: E731
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)
    fn = lambda x, p: cross_entropy(x, p.softmax(1), reduction=reduction, **options)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, p))
    assert torch.autograd.gradgradcheck(fn, (x, p))


# ---- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_smoothing_modes(classes: int) -> None:
    x, y, eps = torch.randn(6, classes, dtype=torch.float64), torch.randint(classes, (6,)), 0.2
    one = F.one_hot(y, classes).double()
    targets = {
        "uniform": (1 - eps) * one + eps / classes,
        "others": torch.where(one > 0, 1 - eps, eps / (classes - 1)),
        "lecture": torch.where(one > 0, 1 - eps, eps / classes),
    }
    for mode, target in targets.items():
        expected = -(target * x.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(cross_entropy(x, y, label_smoothing=eps, smoothing_mode=mode), expected)
    with pytest.raises(ValueError, match="smoothing_mode must be"):
        cross_entropy(x, y, label_smoothing=eps, smoothing_mode="none")


def test_the_toy_problem_has_a_minimum_only_with_smoothing() -> None:
    """Three samples, a linear classifier whose direction is fixed: its length w is all that is learned.

    With logits (w m, 0) and margin m = 1 for every sample, the smoothed loss is
    log(1 + exp(-w)) + (eps / 2) w, minimal at w = log((1 - eps / 2) / (eps / 2)); the plain one falls for ever.
    """
    x = torch.tensor([[1.0, 0, 1], [1, 0, -1], [0, 1, 0]], dtype=torch.float64)
    direction, y = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), torch.tensor([0, 0, 1])
    eps = 0.1
    best = torch.tensor((1 - eps / 2) / (eps / 2), dtype=torch.float64).log()

    def loss(w: Tensor, smoothing: float) -> Tensor:
        score = w * (x @ direction)
        return cross_entropy(torch.stack((score, torch.zeros_like(score)), 1), y, label_smoothing=smoothing)

    for w in (-1.0, 0.5, best.item(), 4.0, 30.0):
        w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        expected = torch.log1p(torch.exp(-w)) + eps / 2 * w
        torch.testing.assert_close(loss(w, eps), expected)
        torch.testing.assert_close(gradient(loss(w, eps), w), gradient(expected, w))
        assert gradient(loss(w, 0.0), w) < 0
    w = best.clone().requires_grad_()
    assert abs(gradient(loss(w, eps), w)) < 1e-12
    assert loss(best + 0.01, eps) > loss(best, eps) < loss(best - 0.01, eps)


def test_extras_against_their_definitions() -> None:
    x, t = torch.randn(7, 30, dtype=torch.float64) * 5, pair(7, 30)
    t = MixedTarget(t.a, t.b, t.lam.double())
    z = 4 * torch.tanh(x / 4) / 1.7
    lse = z.logsumexp(1)
    expected = torchs(z, t, reduction="none") + 0.01 * lse.square()
    ours = cross_entropy(x, t, reduction="none", softcap=4.0, temperature=1.7, z_loss=0.01, return_lse=True)
    torch.testing.assert_close(ours, (expected, lse))
    loss, correct = cross_entropy(x, t.a, topk=(1, 5, 30))
    top = x.topk(30, 1).indices == t.a[:, None]
    assert correct.tolist() == [top[:, :k].any(1).sum().item() for k in (1, 5, 30)]
    _, correct = cross_entropy(x, t, topk=(1, 5))
    expected = [
        sum(m * (x.topk(k, 1).indices == y[:, None]).any(1) for m, y in ((t.lam, t.a), (1 - t.lam, t.b))).sum()
        for k in (1, 5)
    ]
    torch.testing.assert_close(correct, torch.stack(expected))
    torch.testing.assert_close(loss, F.cross_entropy(x, t.a))


def test_topk_of_ties_and_nan() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [0.0, float("nan"), 0.0], [2.0, -inf, -inf], [-inf, -inf, 0.0]])
    for rows in (x, torch.cat((x, torch.full((4, 40), -inf)), 1)):
        ranks = [
            int(cross_entropy(rows[i : i + 1], torch.tensor([y]), topk=(k,))[1])
            for i, y in ((0, 2), (1, 1), (2, 2), (3, 1))
            for k in (1, 2, 3)
        ]
        assert ranks == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]


def test_dtype_of_the_loss() -> None:
    x, y = torch.randn(5, 9).bfloat16(), torch.randint(9, (5,))
    assert cross_entropy(x, y).dtype == torch.bfloat16
    assert cross_entropy(x, y, out_dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(cross_entropy(x, y, out_dtype=torch.float32), F.cross_entropy(x.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(x, y).dtype == F.cross_entropy(x, y).dtype
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for kind, of_target in itertools.product(floats, floats):
        x, p = torch.randn(5, 9).to(kind), torch.rand(5, 9).to(of_target)
        assert cross_entropy(x, p).dtype == F.cross_entropy(x, p).dtype


# ---- traps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 30, 5000])
def test_rows_of_minus_infinity(classes: int) -> None:
    for finite in (0, classes // 2, classes - 1):
        x = torch.full((1, classes), -inf)
        x[0, finite] = 3.0
        x.requires_grad_()
        loss = cross_entropy(x, torch.tensor([finite]))
        assert loss == 0
        assert (gradient(loss, x) == 0).all()
    assert cross_entropy(torch.full((1, classes), -inf), torch.tensor([0])).isnan()


@pytest.mark.parametrize("classes", [4, 43, 3001])
@pytest.mark.parametrize("other", [inf, float("nan"), 1e38])
@pytest.mark.parametrize("kind", ["labels", "pair", "distilled"])
def test_weights_of_other_classes_need_not_be_finite(kind: str, other: float, classes: int) -> None:
    """1 / count is infinite for a class that a batch lacks."""
    x, labels = torch.randn(5, classes, requires_grad=True), torch.tensor([0, 1, 2, 1, 0])
    weight = torch.full((classes,), other)
    weight[:3] = torch.tensor([0.5, 1.0, 2.0])
    target = MixedTarget(labels, labels, torch.rand(5)) if kind == "pair" else labels
    if kind == "distilled":
        distilled = fusedtricks.functional.distillation_loss
        loss = distilled(x, torch.randn(5, classes), target, weight=weight, alpha=0.0)
    else:
        loss = cross_entropy(x, target, weight)
    want = F.cross_entropy(x, labels, weight)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(loss, x), gradient(want, x))


@pytest.mark.parametrize("top", [1e4, 3e9, 1e20])
@pytest.mark.parametrize("classes", [5, 43, 3001])
@pytest.mark.parametrize("kind", ["labels", "pair", "probabilities"])
def test_the_largest_logit_less_itself_is_zero(kind: str, classes: int, top: float) -> None:
    """Also where a temperature makes its last digit larger than what exp can take."""
    x = torch.randn(4, classes)
    x[:, :2] = torch.tensor([[top, top], [top, 0.0], [top, -top], [-top, top]])
    x.requires_grad_()
    largest = x.detach().argmax(1)
    target = {"labels": largest, "pair": MixedTarget(largest, largest, torch.rand(4))}.get(
        kind, F.one_hot(largest, classes).float()
    )
    for temperature in (0.07, 0.7, 3.0):
        loss = cross_entropy(x, target, temperature=temperature, reduction="none")
        true = torch.tensor([2.0, 1.0, 1.0, 1.0]).log()
        torch.testing.assert_close(loss, true)
        share = F.one_hot(largest, classes).float()
        share[0, :2] = 0.5
        want = (share - F.one_hot(largest, classes)) / temperature
        torch.testing.assert_close(gradient(loss, x), want)


@pytest.mark.parametrize("classes", [6, 40])
def test_masked_logits_cost_nothing_unless_asked_for(classes: int) -> None:
    x = torch.randn(2, classes)
    x[:, 1] = -inf
    x.requires_grad_()
    y = torch.tensor([0, 2])
    hard = cross_entropy(x, y)
    for target in (F.one_hot(y, classes).float(), MixedTarget(y, torch.ones_like(y), torch.tensor(1.0))):
        other = cross_entropy(x, target)
        torch.testing.assert_close(other, hard)
        torch.testing.assert_close(gradient(other, x), gradient(hard, x))
    assert cross_entropy(x, y, label_smoothing=0.1) == inf
    weight = torch.ones(classes)
    weight[1] = 0
    assert cross_entropy(x, y, weight, label_smoothing=0.1).isfinite()


@pytest.mark.parametrize("value", [float("nan"), inf, -inf])
@pytest.mark.parametrize("size", [(4, 6), (4, 50), (4, 6, 3)])
@pytest.mark.parametrize("mixed", [False, True])
def test_ignored_rows_are_inert(size: tuple[int, ...], value: float, mixed: bool) -> None:
    x, y = torch.randn(size), torch.randint(size[1], (size[0], *size[2:]))
    x[1], y[1] = value, -100
    kept = torch.tensor([0, 2, 3])
    x.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        target: Any = MixedTarget(y, y, torch.tensor(0.3)) if mixed else y
        loss = cross_entropy(x, target, label_smoothing=0.1, reduction=reduction)
        expected = F.cross_entropy(x[kept], y[kept], label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(loss if reduction != "none" else loss[kept], expected)
        made = gradient(loss, x)
        assert (made[1] == 0).all()
        torch.testing.assert_close(made[kept], gradient(expected, x)[kept])


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_left(mixed: bool) -> None:
    x, y = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    target: Any = MixedTarget(y, y, torch.rand(3)) if mixed else y
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = cross_entropy(x, target, reduction=reduction)
        assert torch.equal(loss.isnan(), torch.tensor(expected != expected))
        assert (gradient(loss, x) == 0).all()
    assert (cross_entropy(x, target, reduction="none") == 0).all()
    empty = torch.empty(0, 5)
    assert cross_entropy(empty, y[:0]).isnan()
    assert cross_entropy(empty, y[:0], reduction="sum") == 0


def test_half_ignored_pairs_count_with_the_other_half() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    a, b, lam = torch.tensor([0, 3]), torch.tensor([-100, 1]), torch.tensor([0.3, 0.6], dtype=torch.float64)
    l = -x.log_softmax(1)  # noqa: E741
    total = 0.3 * l[0, 0] + 0.6 * l[1, 3] + 0.4 * l[1, 1]
    torch.testing.assert_close(cross_entropy(x, MixedTarget(a, b, lam)), total / 1.3)


@pytest.mark.parametrize("shape", [(5, 7), (5, 700), (5, 7, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_logits_and_gradients_are_left_alone(shape: tuple[int, ...], grad: bool) -> None:
    x, y = torch.randn(shape).softmax(1).requires_grad_(grad), torch.randint(shape[1], (shape[0], *shape[2:]))
    y.view(-1)[0] = -100
    before, version, dy = x.detach().clone(), x._version, torch.randn(y.shape)
    kept = dy.clone()
    first = cross_entropy(x, y, reduction="none")
    if grad:
        made = [torch.autograd.grad(first, x, dy, retain_graph=True)[0] for _ in range(2)]
        assert_bitwise_equal(*made)
    assert_bitwise_equal(x.detach(), before)
    assert_bitwise_equal(dy, kept)
    assert x._version == version


def test_backward_twice_and_scaled() -> None:
    x, y = torch.randn(5, 700, requires_grad=True), torch.randint(700, (5,))
    loss = cross_entropy(x, y)
    made = [torch.autograd.grad(s * loss, x, retain_graph=True)[0] for s in (1.0, 3.0, 3.0, 1.0)]
    assert_bitwise_equal(made[0], made[3])
    assert_bitwise_equal(made[1], made[2])
    torch.testing.assert_close(made[1], 3 * made[0])
    made[0].zero_()
    assert_bitwise_equal(torch.autograd.grad(loss, x, retain_graph=True)[0], made[3])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["labels", "pair", "pair_lam", "probabilities"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_loss_may_be_written_to(reduction: str, kind: str, linear: bool) -> None:
    """`loss /= steps`, as gradient accumulation has it."""
    labels, eye = torch.arange(4), torch.eye(5)
    found = []
    for in_place in (False, True):
        x = torch.linspace(-1, 1, 20).cos().reshape(4, 5).requires_grad_()
        lam = torch.tensor(0.3, requires_grad=kind == "pair_lam")
        probabilities = torch.softmax(x.detach(), -1).requires_grad_()
        pair = MixedTarget(labels, labels.flip(0), lam)
        target = {"labels": labels, "probabilities": probabilities}.get(kind, pair)
        args = {"reduction": reduction, "label_smoothing": 0.1}
        loss = linear_cross_entropy(x, eye, target, **args) if linear else cross_entropy(x, target, **args)
        if in_place:
            loss /= 4
        else:
            loss = loss / 4
        loss.sum().backward()
        found.append([t.grad for t in (x, lam, probabilities)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["labels", "pair"])
def test_vmap_over_samples_with_class_weights(kind: str) -> None:
    x, w, lam = torch.randn(5, 7), torch.rand(7), torch.rand(5)
    a, b = torch.tensor([0, 3, 6, -100, 2]), torch.tensor([1, 1, -100, -100, 2])

    def loss(x: Tensor, a: Tensor, b: Tensor, lam: Tensor, reduction: str = "sum") -> Tensor:
        return cross_entropy(x, a if kind == "labels" else MixedTarget(a, b, lam), w, reduction=reduction)

    made = torch.func.vmap(torch.func.grad(loss))(x, a, b, lam)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(made, gradient(loss(leaf, a, b, lam), leaf))
    assert torch.func.vmap(loss)(x, a, b, lam).shape == (5,)


def test_inplace_backward_is_noticed() -> None:
    leaf, y = torch.randn(5, 70, requires_grad=True), torch.randint(70, (5,))
    expected = gradient(F.cross_entropy(leaf, y), leaf)
    x = leaf * 1.0
    loss = cross_entropy(x, y, inplace_backward=True)
    version = x._version
    made = torch.autograd.grad(loss, x, retain_graph=True)[0]
    torch.testing.assert_close(made, expected)
    assert made.data_ptr() == x.data_ptr()
    assert x._version > version
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, x)
    saved = (leaf * 1.0).tanh()  # saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(saved, y, inplace_backward=True).backward()


@pytest.mark.parametrize(
    ("call", "inplace"),
    [
        (lambda x: x[:1].expand(5, 70), False),
        (lambda x: x.as_strided((5, 70), (10, 1)), False),
        (lambda x: x.as_strided((5, 70), (1, 1)), False),
        (lambda x: x[:, ::2], True),
        (lambda x: x.view(5, 14, 5).transpose(0, 2), True),
    ],
)
def test_inplace_backward_of_shared_memory(call: Any, inplace: bool) -> None:
    leaf, made = torch.randn(5, 70, requires_grad=True), []
    for asked in (True, False):
        x = call(leaf * 1.0)
        y = torch.arange(x[:, 0].numel()).reshape(x[:, 0].shape) % x.shape[1]
        loss = cross_entropy(x, y, inplace_backward=asked)
        made.append(torch.autograd.grad(loss, (leaf, x)))
        assert (made[-1][1].data_ptr() == x.data_ptr()) == (asked and inplace)
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("size", [(4, 10), (4, 50), (4, 10, 3)])
@pytest.mark.parametrize("wrong", [-1, 99])
def test_a_label_out_of_range(size: tuple[int, ...], wrong: int) -> None:
    x, y = torch.randn(size), torch.randint(size[1], (size[0], *size[2:]))
    bad = y.clone()
    bad.view(-1)[2] = wrong
    for target in (bad, MixedTarget(bad, y, torch.rand(4)), MixedTarget(y, bad, torch.rand(4))):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds: row 2"):
            cross_entropy(x, target)


def test_a_label_out_of_range_where_operations_are_composed() -> None:
    """Under transforms, and with a weight that wants a gradient. Labels that are mapped over are not seen: NaN."""
    x, y = torch.randn(4, 10), torch.tensor([1, 2, 10, 3])
    loss = lambda x, y: cross_entropy(x, y)  # noqa: E731
    ways = {
        "grad": lambda: torch.func.grad(loss)(x, y),
        "vmap": lambda: torch.func.vmap(loss, (0, None))(torch.stack((x, x)), y),
        "grad of vmap": lambda: torch.func.vmap(torch.func.grad(loss), (0, None))(torch.stack((x, x)), y),
        "jvp": lambda: torch.func.jvp(lambda x: loss(x, y), (x,), (x,)),
        "weight": lambda: cross_entropy(x, y, torch.ones(10, requires_grad=True)),
        "linear": lambda: torch.func.grad(lambda x: linear_cross_entropy(x, torch.eye(10), y))(x),
        "distillation": lambda: torch.func.grad(lambda x: distillation_loss(x, x.detach(), y))(x),
    }
    for way in ways.values():
        with pytest.raises(IndexError, match="Target 10 is out of bounds: row 2"):
            way()
    mapped = torch.func.vmap(loss)(x, y)
    torch.testing.assert_close(mapped.isnan(), y == 10)
    torch.testing.assert_close(mapped[:2], cross_entropy(x[:2], y[:2], reduction="none"))


def test_bad_pairs() -> None:
    x, y, lam = torch.randn(4, 10), torch.randint(10, (4,)), torch.rand(4)
    for target, error, said in (
        (MixedTarget(y, y[:3], lam), ValueError, r"MixedTarget.b must have shape \[4\]"),
        (MixedTarget(y, y.int(), lam), TypeError, "one dtype"),
        (MixedTarget(y.float(), y, lam), TypeError, "MixedTarget.a must be an int64"),
        (MixedTarget(y, y, lam[:3]), ValueError, r"must have shape \(\) or \(4,\)"),
        (MixedTarget(y, y, y), TypeError, "lam must be a floating"),
    ):
        with pytest.raises(error, match=said):
            cross_entropy(x, target)
    with pytest.raises(ValueError, match="topk needs labels"):
        cross_entropy(x, x.softmax(1), topk=(1,))
    with pytest.raises(ValueError, match="temperature must be positive"):
        cross_entropy(x, y, temperature=0.0)
    with pytest.raises(NotImplementedError, match=re.escape("int")):
        cross_entropy(y[None], y)


def test_soft_targets_that_do_not_sum_to_one() -> None:
    x, p = (torch.rand(5, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = (fn(x, p, label_smoothing=0.1) for fn in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, p)), torch.autograd.grad(theirs, (x, p)))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("classes", [3, 25])
def test_rows_do_not_depend_on_their_neighbours(rows: int, classes: int) -> None:
    x, y = torch.randn(rows, classes), torch.randint(classes, (rows,))
    whole = cross_entropy(x, y, reduction="none")
    one_by_one = torch.cat([cross_entropy(x[i : i + 1], y[i : i + 1], reduction="none") for i in range(rows)])
    assert_bitwise_equal(whole, one_by_one)


@pytest.mark.parametrize("_backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 8500), (torch.bfloat16, 17000)], ids=["fp32", "bf16"])
def test_large_gradients_are_those_of_their_parts(dtype: torch.dtype, rows: int, kind: str) -> None:
    """What is written past the caches, from rows of any alignment, is what is written through them."""
    x = torch.randn(rows, 1013).to(dtype).requires_grad_()
    y = torch.randint(1013, (rows,))
    y[:20], y[20:40] = 0, 1012  # in the head and in the tail of rows of every alignment
    y[40:70:3] = y[70:73] = y[-1] = -100  # neighbours of rows whose gradient waits
    target = y if kind == "labels" else torch.rand(rows, 1013).to(dtype)
    whole, *halves = (
        torch.autograd.grad(cross_entropy(x[part], target[part], label_smoothing=0.1, reduction="sum"), x)[0]
        for part in (slice(None), slice(rows // 2), slice(rows // 2, None))
    )
    assert_bitwise_equal(whole, halves[0] + halves[1])


def test_strides_past_32_bits() -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # of which only the pages touched exist
    x, y = torch.randn(2, 40).bfloat16(), torch.tensor([3, 4])
    far = memory.as_strided((2, 40), (2**31, 1)).copy_(x)
    assert_bitwise_equal(cross_entropy(far, y, reduction="none"), cross_entropy(x, y, reduction="none"))


def test_module_extras_and_state() -> None:
    ours, theirs = (
        cls(torch.rand(5), label_smoothing=0.1) for cls in (fusedtricks.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
    )
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    module = fusedtricks.nn.CrossEntropyLoss(return_lse=True, topk=(1,), z_loss=0.1)
    assert len(module(torch.randn(4, 5), torch.randint(5, (4,)))) == 3


@pytest.mark.parametrize("size", [(301, 1000), (9000, 7), (4, 5, 67, 33)], ids=str)
def test_the_same_for_any_number_of_threads(size: tuple[int, ...]) -> None:
    x = torch.randn(size, requires_grad=True)
    a, b = (torch.randint(size[1], (size[0], *size[2:])) for _ in range(2))
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = cross_entropy(x, MixedTarget(a, b, torch.tensor(0.3)), label_smoothing=0.1)
        made.append((loss.detach(), gradient(loss, x)))
    for other in made[1:]:
        for ours, theirs in zip(made[0], other, strict=True):
            assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"topk": (1,)}, {"return_lse": True, "z_loss": 0.1}], ids=str)
def test_compiled_whole(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_forced", None)  # forcing a back end is not for compiled code
    x, t = torch.randn(6, 40, requires_grad=True), pair(6, 40)
    torch._dynamo.reset()
    fn = lambda x, t: cross_entropy(x, t, label_smoothing=0.1, **options)  # noqa: E731
    ours, eager = (f(x, t) for f in (torch.compile(fn, fullgraph=True, backend="aot_eager"), fn))
    torch.testing.assert_close(ours, eager)
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    torch.testing.assert_close(gradient(first(ours), x), gradient(first(eager), x))
