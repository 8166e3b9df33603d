"""Dropout as torch's, its masks as random as they should be, and the same mask wherever it is drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import CASES
from parity import assert_bitwise_equal
from sweep import DTYPES, INTERPRETED, forced, targets
from torch import Tensor
from torch.testing._internal import common_methods_invocations
from torch.utils.checkpoint import checkpoint

import fusedtricks
from fusedtricks.ops.dropout import dropout_fwd, keep_of, kept

F, TF = fusedtricks.functional, torch.nn.functional
PAIRS = [(getattr(F, name), getattr(TF, name)) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")]
MODULES = [
    (getattr(fusedtricks.nn, name), getattr(torch.nn, name))
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")
]
SIZES = {"dropout": (4, 5), "dropout1d": (4, 5, 6), "dropout2d": (4, 5, 6, 7), "dropout3d": (4, 5, 2, 3, 4)}
TARGETS = targets(CASES["dropout"])
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")


def seeded(fn, *args, **kwargs) -> Tensor:
    torch.manual_seed(5)
    return fn(*args, **kwargs)


# ---- as torch's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=SIZES)
def test_identity_and_zeros(ours, theirs) -> None:
    x = torch.randn(SIZES[theirs.__name__])
    before = torch.get_rng_state()
    assert ours(x, 0.0) is x
    assert ours(x, 0.4, False) is x
    bad = x.clone()
    bad.view(-1)[::3], bad.view(-1)[1::3] = math.inf, math.nan
    bad.requires_grad_()
    y = ours(bad, 1.0)
    assert_bitwise_equal(y, torch.zeros_like(x))
    y.sum().backward()
    assert_bitwise_equal(bad.grad, torch.zeros_like(x))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is random"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=SIZES)
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("training", [True, False])
def test_probabilities_outside(ours, theirs, p: float, training: bool) -> None:
    x = torch.randn(SIZES[theirs.__name__])
    for fn in (ours, *([] if math.isnan(p) else [theirs])):
        with pytest.raises(ValueError, match="probability has to be between 0 and 1"):
            fn(x, p, training)


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="floating"):
        F.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="single memory location"):
        F.dropout(torch.ones(1).expand(3), inplace=True)
    with pytest.raises(RuntimeError, match="2D or 3D"):
        F.dropout1d(torch.ones(2, 2, 2, 2))
    with pytest.warns(UserWarning, match="3D input"):
        F.dropout2d(torch.ones(2, 2, 2))
    with pytest.warns(UserWarning, match="deprecated"):
        F.dropout3d(torch.ones(2, 2, 2))


@pytest.mark.parametrize(("ours", "theirs"), MODULES, ids=SIZES)
def test_modules(ours, theirs) -> None:
    assert issubclass(ours, theirs)
    assert repr(ours(0.2, True)) == repr(theirs(0.2, True))
    module, x = ours(0.4), torch.randn(SIZES[theirs.__name__.lower()])
    assert module.eval()(x) is x
    torch.manual_seed(5)
    y = module.train()(x)
    assert_bitwise_equal(y, seeded(getattr(F, ours.__name__.lower()), x, 0.4))
    with pytest.raises(ValueError, match="between 0 and 1"):
        ours(1.5)


@pytest.mark.parametrize("name", ["nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d"])
@pytest.mark.filterwarnings("ignore:dropout")
def test_torchs_own_samples(name: str) -> None:
    """Shape, dtype, and that every element is zero or scaled."""
    info = next(i for i in common_methods_invocations.op_db if i.name == name)
    fn = getattr(F, name.rsplit(".", 1)[1])
    for sample in info.sample_inputs("cpu", torch.float32):
        x, p = sample.input.detach(), sample.kwargs.get("p", 0.5)
        expected = x.clone()
        y = fn(x.clone(), *sample.args, **sample.kwargs)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        if sample.kwargs.get("training", True) and p:
            scaled = expected * (65536 / keep_of(p)) if p < 1 else expected * 0
            assert torch.all((y == 0) | torch.isclose(y, scaled))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=SIZES)
def test_whole_channels(ours, theirs) -> None:
    size = SIZES[theirs.__name__]
    if len(size) == 2:
        return
    y = seeded(ours, torch.ones(64, 32, *size[2:]), 0.3)
    zero = (y == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2))
    assert 0.25 < zero[:, :, 0].double().mean() < 0.35
    if ours is not F.dropout2d:  # no batch: (C, ...)
        one = seeded(ours, torch.ones(2048, *size[2:]), 0.3)
        assert_bitwise_equal(one.view_as(y), y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_in_place(dtype: torch.dtype) -> None:
    for x in (torch.randn(3, 40), torch.randn(40, 3).t(), torch.randn(6, 50)[::2, 3:43]):
        x = x.to(dtype, memory_format=torch.preserve_format)
        want, version = seeded(F.dropout, x, 0.3), x._version
        got = seeded(F.dropout, x, 0.3, inplace=True)
        assert got is x
        assert x._version > version
        assert_bitwise_equal(got, want)
    leaf = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        F.dropout(leaf, inplace=True)
    y = seeded(F.dropout, leaf * 1, 0.5, inplace=True)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(grad, torch.where(y == 0, 0.0, 2.0))


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds() -> None:
    x = torch.ones(4000)
    first, second = seeded(F.dropout, x), F.dropout(x)
    after = torch.rand(3)
    assert not torch.equal(first, second)
    assert_bitwise_equal(seeded(F.dropout, x), first)
    F.dropout(x)
    assert torch.equal(torch.rand(3), after)
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    mine = F.dropout(x, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert_bitwise_equal(F.dropout(x, generator=torch.Generator().manual_seed(3)), mine)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_mask(use_reentrant: bool) -> None:
    x = torch.randn(300, requires_grad=True)
    block = lambda x: F.dropout(F.dropout(x.sin(), 0.3).cos(), 0.3)  # noqa: E731
    plain = torch.autograd.grad(seeded(block, x).sum(), x)[0]
    y = seeded(checkpoint, block, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert_bitwise_equal(x.grad, plain)


def test_nothing_but_the_seed_is_kept() -> None:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        F.dropout(torch.randn(1000, requires_grad=True))
    assert sizes == [1]


def test_compile_draws_anew() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.dropout(x, 0.3), fullgraph=True, backend="aot_eager")
    x = torch.randn(2000, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first == 0, second == 0)
    for y in (first, second):
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad == 0, y == 0)
        assert torch.equal(y, x * grad)


def test_transforms() -> None:
    x = torch.randn(6, 300)
    for randomness in ("different", "same"):
        y = torch.vmap(lambda x: F.dropout(x, 0.5), randomness=randomness)(x)
        rows = {tuple(row.tolist()) for row in y == 0}
        assert len(rows) == (6 if randomness == "different" else 1)
    grad = torch.func.grad(lambda x: seeded(F.dropout, x, 0.5).sum())(x)
    assert torch.equal(grad, torch.where(seeded(F.dropout, x, 0.5) == 0, 0.0, 2.0))


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_one_mask_everywhere() -> None:
    """Whatever the dtype, the strides, the back end and the number of threads."""
    size, seed, keep = (5, 6, 70, 9), torch.tensor([-987654321]), keep_of(0.3)
    want = kept(torch.Size(size), seed, keep, 1)
    channels = kept(torch.Size(size), seed, keep, 630)
    assert 0.6 < want.double().mean() < 0.8
    layouts = {
        "plain": lambda x: x,
        "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
        "offset": lambda x: torch.cat((x.flatten(), x.flatten()))[1 : x.numel() + 1].view(x.shape),
    }
    for target, dtype, layout in itertools.product(TARGETS, DTYPES.values(), layouts.values()):
        x = layout(torch.ones(size, dtype=dtype)).to(target.device)
        for threads in (1, 2) if target.device == "cpu" else (2,):
            torch.set_num_threads(threads)
            with forced(target):
                assert torch.equal(dropout_fwd(x, seed.to(x.device), keep, 1).cpu() != 0, want)
                assert torch.equal(dropout_fwd(x, seed.to(x.device), keep, 630).cpu() != 0, channels)


@pytest.mark.parametrize("p", [0.003, 0.1, 0.3, 0.5, 0.9])
def test_the_mean_is_kept(p: float) -> None:
    """D3: the scale is that of the probability realised. 5 sigma."""
    n = 1 << 22
    y = seeded(F.dropout, torch.ones(n), p)
    keep = keep_of(p) / 65536
    assert abs(keep - (1 - p)) <= 2**-17
    assert y.unique().tolist() == pytest.approx([0.0, 1 / keep])
    assert abs(y.double().mean() - 1) < 5 * math.sqrt((1 - keep) / keep / n)


@pytest.mark.parametrize("p", [2.0**-24, 1 - 2.0**-24])
def test_extreme_probabilities(p: float) -> None:
    y = seeded(F.dropout, torch.ones(1 << 20), p)
    assert y.isfinite().all()
    assert (y == (1 if p < 0.5 else 65536))[y != 0].all()
    assert p > 0.5 or (y != 0).all()


def test_masks_are_random() -> None:
    """D1, D5: over 1e7 elements, the counts of every pattern of 8 neighbours, and the correlation at many lags."""
    n = 10_000_000
    drop = (seeded(F.dropout, torch.ones(n), 0.5) == 0).numpy()
    import numpy

    patterns = numpy.bincount(numpy.packbits(drop), minlength=256)
    expected = n / 8 / 256
    chi_square = ((patterns - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    sign = drop.astype(numpy.float32) - 0.5
    for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 256, 1024, 2048, 4096, 65536, 1 << 20):
        correlation = float(numpy.dot(sign[:-lag], sign[lag:])) * 4 / (n - lag)
        assert abs(correlation) < 5 / math.sqrt(n - lag), f"lag {lag}: {correlation}"
    again = (F.dropout(torch.ones(n), 0.5) == 0).numpy().astype(numpy.float32) - 0.5
    assert abs(float(numpy.dot(sign, again)) * 4 / n) < 5 / math.sqrt(n)


def test_no_row_repeats() -> None:
    """D1: 1e5 rows of 64 elements, all different."""
    rows = (seeded(F.dropout, torch.ones(100_000, 64), 0.5) == 0).long()
    weights = torch.randint(1, 2**40, (64,))
    assert (rows * weights).sum(1).unique().numel() == 100_000


def test_inference_tensors_are_not_written_to_outside() -> None:
    with torch.inference_mode():
        x = torch.ones(8)
        fusedtricks.functional.dropout(x, 0.5, inplace=True)
    kept = x.clone()
    with pytest.raises(RuntimeError, match="InferenceMode"):
        fusedtricks.functional.dropout(x, 0.5, inplace=True)
    assert torch.equal(x, kept)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("module", [fusedtricks.nn.Dropout2d, fusedtricks.nn.Dropout3d])
def test_without_channels(module: Any) -> None:
    """torch only refuses to drop them."""
    x = torch.ones(5)
    assert module().eval()(x) is x
    assert module(0.0)(x) is x
    assert (module(1.0)(x) == 0).all()
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        module()(x)
