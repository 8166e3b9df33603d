"""mixup and its module: targets, errors, images, in place, and the draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES
from parity import assert_bitwise_equal
from sweep import INTERPRETED, Target, forced, targets
from torch import Tensor

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.ops._mixing import same_class

mixup, Mixup = fusedtricks.functional.mixup, fusedtricks.nn.Mixup
TARGETS = targets(CASES["mixup"])
BACKENDS = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(x: Tensor, lam: Tensor, perm: Tensor) -> Tensor:
    lam = lam.reshape(-1, *(1,) * (x.dim() - 1))
    return lam * x + (1 - lam) * x[perm]


@BACKENDS
@pytest.mark.parametrize("kind", ["random", "one cycle", "pairs", "identity", "half fixed"])
@pytest.mark.parametrize("size", [(1, 3), (2, 5), (33, 2, 7), (65, 1027), (300, 3), (65_537, 3)])
def test_in_place_is_out_of_place(target, kind: str, size: tuple[int, ...]) -> None:
    """M1: whatever the cycles of the permutation."""
    N = size[0]
    perm = {
        "random": torch.randperm(N),
        "one cycle": torch.arange(N).roll(1),
        "pairs": torch.arange(N).flip(0),
        "identity": torch.arange(N),
        "half fixed": torch.cat((torch.arange(N // 2), torch.randperm(N - N // 2) + N // 2)),
    }[kind].to(target.device)
    x, lam = torch.randn(size, device=target.device), torch.rand(N, device=target.device)
    with forced(target):
        out = mixup(x, None, lam, perm)[0]
        torch.testing.assert_close(out, eager(x, lam, perm), rtol=1e-6, atol=1e-6)
        version = x._version
        same = mixup(x, None, lam, perm, out=x)[0]
    assert same is x
    assert x._version > version
    assert_bitwise_equal(x, out)


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.rand(6)])
def test_targets(lam: Tensor | float) -> None:
    x, perm, labels = torch.randn(6, 5), torch.randperm(6), torch.tensor([0, 3, 3, 999, 21840, 2])
    mixed, target = mixup(x.bfloat16(), labels, lam, perm)
    assert isinstance(target, MixedTarget)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(target.a, labels)  # M3: never in the dtype of the images
    assert torch.equal(target.b, labels[perm])
    assert target.a.dtype == target.b.dtype == torch.int64
    torch.testing.assert_close(target.lam, torch.as_tensor(lam, dtype=torch.float32))
    soft = torch.nn.functional.one_hot(labels % 4, 4).float()
    dense = mixup(x, soft, lam, perm)[1]
    torch.testing.assert_close(dense, eager(soft, torch.as_tensor(lam), perm))
    torch.testing.assert_close(dense.sum(1), torch.ones(6))  # M2: also where both labels are the same
    assert mixup(x, None, lam, perm)[1] is None


def test_a_number_is_as_wide_as_x() -> None:
    x, perm = torch.randn(6, 5, dtype=torch.float64), torch.randperm(6)
    mixed, target = mixup(x, torch.arange(6), 0.3, perm)
    torch.testing.assert_close(mixed, eager(x, torch.tensor(0.3, dtype=torch.float64), perm), rtol=0, atol=1e-15)
    assert target.lam.item() == 0.3


@BACKENDS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(5, 3, 9, 11), (4, 1, 33, 40), (3, 3, 64, 67)])
def test_images(target, layout: torch.memory_format, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """M6: within one rounding of the float64 path."""
    C = size[1]
    x = torch.randint(0, 256, size, dtype=torch.uint8).to(target.device, memory_format=layout)
    lam, perm = torch.rand(size[0], device=target.device), torch.randperm(size[0], device=target.device)
    m, s = (torch.tensor(v[:C], dtype=torch.float64, device=x.device).reshape(C, 1, 1) for v in (MEAN, STD))
    for normalize, truth in (((MEAN[:C], STD[:C]), (x.double() / 255 - m) / s), (None, x.double() / 255)):
        with forced(target):
            y = mixup(x, None, lam, perm, normalize=normalize, dtype=dtype)[0]
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        want = eager(truth, lam.double(), perm)
        error = (y.double() - want).abs().max()
        assert error <= want.abs().max() * max(torch.finfo(dtype).eps, 1e-6) * 0.75


@pytest.mark.parametrize("target", [t for t in TARGETS if t.device == "cpu"], ids=str)
def test_every_sample_of_many_is_checked(target: Target) -> None:
    """Threads look at shares of the permutation, and see together that a sample comes twice."""
    x, lam, perm = torch.randn(70_001, 3), torch.rand(70_001), torch.randperm(70_001)
    before = x.clone()
    twice, beyond, negative = (perm.clone() for _ in range(3))
    twice[5], beyond[-1], negative[0] = perm[-5], 70_001, -1
    late, missing = lam.clone(), lam.clone()
    late[-1], missing[40_000] = 1.5, torch.nan
    bad = [(twice, lam), (beyond, lam), (negative, lam), (perm, late), (perm, missing)]
    for (p, weights), out in itertools.product(bad, (None, x)):
        with forced(target), pytest.raises(RuntimeError, match=r"not a permutation|lam in"):
            mixup(x, None, weights, p, out=out)
        assert torch.equal(x, before)
    with forced(target):
        y = mixup(x, None, lam, perm)[0]
        torch.testing.assert_close(y, eager(before, lam, perm))
        assert torch.equal(mixup(x, None, lam, perm, out=x)[0], y)


def test_errors_leave_x_as_it_is() -> None:
    x, lam, perm = torch.randn(4, 5), torch.rand(4), torch.tensor([1, 2, 3, 0])
    before = x.clone()
    bad = {
        "a permutation of the 4": [(x, None, lam, perm[:3]), (x, None, lam, perm.int()), (x, None, lam, perm[None])],
        "expected lam to be": [(x, None, torch.rand(3), perm), (x, None, torch.ones(4).long(), perm)],
        "a target for each": [(x, torch.ones(3), lam, perm), (x, torch.tensor(1), lam, perm)],
        "not a permutation": [
            (x, None, lam, torch.tensor(p)) for p in ([1, 1, 2, 3], [0, 1, 2, 4], [-1, 0, 1, 2], [3, 3, 3, 3])
        ],
        r"lam in \[0, 1\]": [(x, None, lam + 1, perm), (x, None, -lam - 1e-3, perm), (x, None, lam * torch.nan, perm)],
    }
    for target in TARGETS:
        if target.device != "cpu":
            continue
        for message, calls in bad.items():
            for args, out in itertools.product(calls, (None, x)):
                with forced(target), pytest.raises(RuntimeError, match=message):
                    mixup(*args, out=out)
    for args, options in (
        ((x, None, 1.5, perm), {}),
        ((x, None, lam, perm), {"normalize": (MEAN, STD)}),
        ((x, None, lam, perm), {"dtype": torch.float16}),
        ((x, None, lam, perm), {"out": before}),
        ((torch.zeros(4, 2, 3, 3, dtype=torch.uint8), None, lam, perm), {"normalize": (MEAN, STD)}),
    ):
        with pytest.raises(ValueError, match="mixup"):
            mixup(*args, **options)
    with pytest.raises(TypeError):
        mixup(x.tolist(), None, lam, perm)
    assert torch.equal(x, before)
    leaf = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        mixup(leaf, None, lam, perm, out=leaf)
    overlapping = torch.ones(4, 1).expand(4, 5)
    with pytest.raises(RuntimeError, match="single memory location"):
        mixup(overlapping, None, lam, perm, out=overlapping)


def test_hidden_layers() -> None:
    """Differentiable in x, in place too."""
    lam, perm = torch.rand(5), torch.tensor([2, 0, 1, 3, 4])
    for inplace in (False, True):
        x = torch.randn(5, 7, requires_grad=True)
        h = x.tanh()
        h = h * 1
        y = mixup(h, None, lam, perm, out=h if inplace else None)[0]
        dy = torch.randn(5, 7)
        (ours,) = torch.autograd.grad(y, x, dy)
        (theirs,) = torch.autograd.grad(eager(x.tanh(), lam, perm), x, dy)
        torch.testing.assert_close(ours, theirs)


# ---- module ----------------------------------------------------------------------------------------------------------


def test_module() -> None:
    x, labels = torch.randn(64, 3, 4, 4), torch.randint(0, 10, (64,))
    module = Mixup(0.4)
    mixed, target = module(x, labels)
    assert target.lam.shape == ()
    torch.testing.assert_close(mixed.shape, x.shape)
    assert not torch.equal(mixed, x)
    same, plain = module.eval()(x, labels)
    assert same is x
    assert torch.equal(plain.a, plain.b)
    assert plain.lam == 1
    torch.manual_seed(3)
    first = Mixup(0.4, per_sample=True)(x, labels)
    torch.manual_seed(3)
    again = Mixup(0.4, per_sample=True)(x, labels)
    for a, b in zip((first[0], *first[1]), (again[0], *again[1]), strict=True):
        assert torch.equal(a, b)
    assert first[1].lam.shape == (64,)
    assert "alpha=0.4" in repr(module)
    inf, nan = float("inf"), float("nan")
    for name, values in {
        "alpha": (0, -1, inf, nan),
        "cutmix_alpha": (0, -1, inf, nan),
        "prob": (2, nan),
        "switch_prob": (-0.1, 1.5, nan),
        "partner": ("nobody",),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"Mixup: expected .*{name}"):
                Mixup(**{name: value})


def test_the_generator_is_the_only_source() -> None:
    x, labels = torch.randn(8, 3), torch.arange(8)
    results = []
    for seed in (1, 1):
        before = torch.get_rng_state()
        results.append(Mixup(generator=torch.Generator().manual_seed(seed), cutmix_alpha=None)(x, labels)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lam_is_of_beta(alpha: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); fold keeps the larger part; prob leaves the others at 1."""
    x, n = torch.zeros(200_000, 1), 200_000
    lam = Mixup(alpha, per_sample=True).draw_lam(x, alpha).double()
    assert (lam >= 0).all()
    assert (lam <= 1).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * (variance / n) ** 0.5
    assert abs(lam.var() / variance - 1) < 0.02
    folded = Mixup(alpha, per_sample=True, fold=True).draw_lam(x, alpha)
    assert (folded >= 0.5).all()
    rare = Mixup(8.0, per_sample=True, prob=0.25).draw_lam(x, 8.0)
    assert abs((rare < 1).double().mean() - 0.25) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lam_is_fp32_whatever_the_default(dtype: torch.dtype) -> None:
    x, labels, before = torch.randn(6, 3, 4, 4), torch.arange(6), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for module in (Mixup(1), fusedtricks.nn.CutMix(1), Mixup(0.2, cutmix_alpha=1, switch_prob=1.0)):
            for trained in (True, False):
                mixed, target = module.train(trained)(x, labels)
                assert mixed.dtype == target.lam.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("cls", [Mixup, fusedtricks.nn.CutMix])
def test_no_target(cls: type[torch.nn.Module]) -> None:
    x, module = torch.randn(6, 3, 4, 4), cls()
    module.set_warmup(1)
    for _ in range(2):
        assert module(x, None)[1] is None
    same, target = module.eval()(x, None)
    assert same is x
    assert target is None


def test_partners() -> None:
    labels = torch.randint(0, 10, (500,))
    perm = same_class(labels)
    assert torch.equal(perm.sort().values, torch.arange(500))
    assert torch.equal(labels[perm], labels)
    assert (perm != torch.arange(500)).all()
    assert torch.equal(same_class(torch.tensor([5])), torch.tensor([0]))
    assert not torch.equal(same_class(labels), perm)
    x = torch.randn(500, 2)
    assert torch.equal(*Mixup(partner="same_class")(x, labels)[1][:2])
    assert torch.equal(Mixup(partner="flip")(x, labels)[1].b, labels.flip(0))
    with pytest.raises(RuntimeError, match="class indices"):
        Mixup(partner="same_class")(x, torch.rand(500, 3))


def test_warm_up_and_tuples() -> None:
    x, labels = torch.randn(6, 3), torch.arange(6)
    module = Mixup(8.0)
    module.set_warmup(2)
    assert [module(x, labels)[0] is x for _ in range(4)] == [True, True, False, False]
    (a, b), target = module((x, 2 * x), labels)
    torch.testing.assert_close(b, 2 * a)
    perm = target.b
    torch.testing.assert_close(a, eager(x, target.lam, perm))


def test_switch_to_cutmix() -> None:
    images, labels = torch.arange(6.0)[:, None, None, None].expand(6, 1, 16, 16).contiguous(), torch.arange(6)
    module = Mixup(8.0, cutmix_alpha=1.0, switch_prob=1.0)
    mixed, target = module(images, labels)
    assert torch.equal(mixed, mixed.round())  # pasted, not blended
    own = (mixed == images).flatten(1).double().mean(1)
    moved = target.b != target.a
    torch.testing.assert_close(own[moved], target.lam.double().expand(6)[moved])
    never = Mixup(8.0, cutmix_alpha=1.0, switch_prob=0.0)
    assert not torch.equal(never(images, labels)[0], never(images, labels)[0].round())


def test_the_switch_leaves_dtype_and_range() -> None:
    images, labels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    for switch in (0.0, 1.0):
        module = Mixup(8.0, cutmix_alpha=1.0, switch_prob=switch)
        (mixed, again), target = module([images, images], labels)
        assert mixed.dtype == torch.float32
        assert 0 <= mixed.min() < mixed.max() <= 1
        assert torch.equal(mixed, again)
        assert target.lam.dtype == torch.float32
        assert module.eval()(images, labels)[0] is images
    from_own = (mixed - images / 255).abs() < 1e-6
    assert (from_own | ((mixed - images[target.b] / 255).abs() < 1e-6)).all()


def test_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y, lam, perm: mixup(x, y, lam, perm), fullgraph=True, backend="aot_eager")
    x, labels, lam, perm = torch.randn(6, 5), torch.arange(6), torch.rand(6), torch.randperm(6)
    ours, want = compiled(x, labels, lam, perm), mixup(x, labels, lam, perm)
    assert torch.equal(ours[0], want[0])
    assert torch.equal(ours[1].b, want[1].b)
