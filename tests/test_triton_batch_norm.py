"""The Triton kernels of batch normalization in the interpreter: regimes, layouts, what is wanted, and numerics."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from parity import assert_bitwise_equal, assert_no_worse, written_everywhere
from torch import Tensor

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op
from fusedtricks.ops import _batch_norm as bn

triton = pytest.importorskip("triton")
tl = triton.language
kernels = importlib.import_module("fusedtricks.triton_kernels.batch_norm_kernels")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set before Python starts"
)
BF16, HALF = torch.bfloat16, torch.float16
# The interpreter adds the rows of a tile one after another, where a GPU adds them in a tree.
ULPS = 16


def run(way: str, backend: str, *args: Any) -> tuple[Tensor, ...]:
    return Op.registry[f"batch_norm_{way}"].implementation(backend)(*args)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group of channels is left to one program."""
    launchers = importlib.import_module("fusedtricks.triton_kernels.batch_norm")
    for limit in ("FORWARD_WHOLE", "BACKWARD_WHOLE", "FEW_WHOLE"):
        monkeypatch.setattr(launchers, limit, 0)


def check(
    x: Tensor,
    residual: Tensor | None = None,
    activation: int = bn.IDENTITY,
    masked: bool = False,
    training: bool = True,
    dy: Tensor | None = None,
    ulps: float = ULPS,
) -> None:
    """Forward and backward of the kernels against fp64, and no further from it than the reference in this dtype."""
    C = x.shape[1]
    weight, bias, mean = torch.randn(3, C).unbind()
    running = (mean, torch.rand(C) + 0.5, torch.tensor(3))
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy

    def forward(backend: str, averages: tuple[Tensor, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        if training:
            return run("fwd", backend, *tensors, *averages, 0.1, 1e-5, activation, 0.1, True, masked)
        return run("apply", backend, *tensors, averages[0], None, averages[1], 1e-5, activation, 0.1, masked)

    def backward(backend: str, stats: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        signs = mask if masked else None
        return run("bwd", backend, *tensors, stats, signs, None, training, activation, 0.1, *(True,) * 4)

    exact, stock = double(*(t.clone() for t in running)), [t.clone() for t in running]
    truth_y, truth_stats, _ = forward("reference", exact, *double(x, residual, weight, bias))
    ref_y, ref_stats, ref_mask = forward("reference", stock, x, residual, weight, bias)
    ours: list[Tensor] = []

    def forward_anew() -> tuple[Tensor, ...]:
        ours[:] = (t.clone() for t in running)
        return forward("triton", ours, x, residual, weight, bias)

    y, stats, mask = written_everywhere(forward_anew)
    assert_no_worse(y, ref_y, truth_y, name="y", ulps=ulps)
    assert_no_worse(stats[2:], ref_stats[2:], truth_stats[2:], name="rstd, variance", ulps=ulps)
    assert_no_worse(stats[0] + stats[1], ref_stats[0] + ref_stats[1], truth_stats[0] + truth_stats[1], name="mean")
    for name, kernel, ref, true in zip(("running_mean", "running_var"), ours, stock, exact, strict=False):
        assert_no_worse(kernel, ref, true, name=name, ulps=ulps)
    assert ours[2] == stock[2]
    assert mask.shape == ref_mask.shape
    if masked:  # of numbers next to zero the rounding decides
        differing = bn.unpack(mask, torch.empty_like(x)) != bn.unpack(ref_mask, torch.empty_like(x))
        scale = truth_y.abs().max() * torch.finfo(torch.float32).eps * 16
        assert (truth_y[differing].abs() <= scale).all()
    truth = backward("reference", truth_stats, *double(dy, x, residual, weight, bias))
    ref = backward("reference", ref_stats, dy, x, residual, weight, bias)
    grads = written_everywhere(lambda: backward("triton", stats, dy, x, residual, weight, bias))
    for name, kernel, one, true in zip(("dx", "dresidual", "dweight", "dbias"), grads, ref, truth, strict=True):
        assert_no_worse(kernel, one, true, name=name, precision=x.dtype, ulps=ulps)


SHAPES = {
    "two samples": (2, 3),
    "narrow rows": (96, 3),
    "narrow rows, a short one at the end": (65, 3),
    "rows": (150, 72),
    "rows without vectors": (65, 70),
    "one channel": (6, 1, 3, 4),
    "3-D": (6, 5, 7),
    "planes": (4, 6, 5, 7),
    "planes of whole vectors": (3, 4, 8, 8),
    "planes inside a vector": (4, 6, 2, 2),
    "planes past a tile": (2, 2, 70, 71),
    "5-D": (2, 3, 2, 3, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_program_for_a_group(shape):
    check(torch.randn(shape) + 1)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_split_among_programs(shape):
    check(torch.randn(shape) + 1)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(40, 8), (33, 5), (3, 4, 6, 7), (2, 3, 2, 2)], ids=str)
def test_added_and_activated(whole, masked, shape, request):
    if not whole:
        request.getfixturevalue("split")
    for activation in bn.SIGNED if masked else (bn.RELU, bn.SILU, bn.GELU):
        check(torch.randn(shape), torch.randn(shape), activation, masked)
    if masked:
        x = torch.randn(shape)
        check(x, x, bn.RELU, masked)


@pytest.mark.parametrize("shape", [(40, 8), (3, 4, 6, 7)], ids=str)
@pytest.mark.parametrize("activation", [bn.IDENTITY, bn.RELU, bn.LEAKY_RELU, bn.SILU, bn.GELU])
def test_evaluation(shape, activation):
    masked = activation in bn.SIGNED
    check(torch.randn(shape), torch.randn(shape) if masked else None, activation, masked, training=False)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("shape", [(40, 8), (3, 4, 6, 7)], ids=str)
def test_dtypes(dtype, shape, split):
    check(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), bn.RELU, True)


@pytest.mark.parametrize(("whole", "masked"), [(True, False), (False, True)], ids=["whole", "split, masked"])
def test_layouts(whole, masked, request):
    """channels_last, channels_last_3d, permuted, sliced and expanded: one copy at most, the strides torch has."""
    if not whole:
        request.getfixturevalue("split")
    four, five = torch.randn(3, 6, 4, 5), torch.randn(2, 6, 2, 3, 4)
    last = {"memory_format": torch.channels_last}
    inputs = [four.to(**last), five.to(memory_format=torch.channels_last_3d), torch.randn(7, 6, 5).permute(2, 1, 0)]
    inputs += [torch.randn(3, 6, 4, 9)[..., 2:7], torch.randn(3, 12, 4, 5).to(**last)[:, 3:9]]
    for x in inputs:
        residual = torch.randn(x.shape)
        check(x, residual, bn.RELU, masked, dy=torch.ones(()).expand(x.shape))
        check(
            x, residual, bn.LEAKY_RELU, masked, dy=torch.randn(x.shape).transpose(0, -1).contiguous().transpose(0, -1)
        )


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(33, 5), (3, 4, 6, 7)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_subset_of_gradients(whole, shape, training, request):
    if not whole:
        request.getfixturevalue("split")
    x, dy, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    stats = bn.statistics(x, 1e-5)
    args = (dy, x, None, weight, weight, stats, None, None, training, bn.RELU, 0.0)
    everything = run("bwd", "triton", *args, *(True,) * 4)
    for need in itertools.product((True, False), repeat=4):
        for wanted, grad, full in zip(need, run("bwd", "triton", *args, *need), everything, strict=True):
            assert_bitwise_equal(grad, full if wanted else full.new_empty(0))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
def test_given_sums(whole, request):
    """Where the batch is spread over processes: means over all of it come from outside, sums are those of this part."""
    if not whole:
        request.getfixturevalue("split")
    x, dy, weight, given = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.randn(3), torch.randn(2, 3)
    args = (dy, x, None, weight, None, bn.statistics(x, 1e-5), None, given, True, bn.IDENTITY, 0.0)
    for need in ((True, False, True, True), (True, False, False, False)):
        for a, b in zip(*(run("bwd", name, *args, *need) for name in ("triton", "reference")), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_averages():
    """momentum None is the average over all batches; without averages only the counter, if that, is touched."""
    x = torch.randn(12, 3)
    for momentum, counted, tracked in itertools.product((None, 0.1), (True, False), (True, False)):
        if momentum is None and not counted:
            continue
        found = []
        for name in ("triton", "reference"):
            averages = [torch.ones(3), torch.ones(3)] if tracked else [None, None]
            counter = torch.tensor(4) if counted else None
            args = (x, None, None, None, *averages, counter, momentum, 1e-5, 0, 0.0, False, False)
            y, stats, mask = run("fwd", name, *args)
            assert y.numel() == mask.numel() == 0
            found.append([stats, *averages, counter])
        for a, b in zip(*found, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(769, 6), (6, 3, 9, 14)], ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e5])
def test_error_does_not_grow_with_the_mean(whole, shape, mean, request):
    if not whole:
        request.getfixturevalue("split")
    x = torch.randn(shape) + mean
    truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    y, stats, _ = run("fwd", "triton", x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)
    assert (y - truth).abs().max() <= 2e-6 * truth.abs().max()
    dy = torch.randn(shape)
    last = (None, None, True, 0, 0.0, True, False, True, True)
    grads = run("bwd", "triton", dy, x, None, None, None, stats, *last)
    wide = bn.statistics(x.double(), 1e-5)
    exact = run("bwd", "reference", dy.double(), x.double(), None, None, None, wide, *last)
    for grad, true in zip(grads, exact, strict=True):
        assert not grad.numel() or (grad - true).abs().max() <= 2e-6 * true.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of overflow: that is the point
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(150, 5), (6, 4, 9, 9)], ids=str)
def test_hard_values(whole, shape, request):
    """Squares that overflow in some channels, first samples far off, constant channels."""
    if not whole:
        request.getfixturevalue("split")
    x = torch.randn(shape)
    x[:, 1] *= 1e25
    x[:, 2] = 3
    x[:, 3] += 1e4
    x[:2, 3] = -1e3
    check_y = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    y, _, _ = run("fwd", "triton", x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)
    for c in range(shape[1]):
        assert (y[:, c] - check_y[:, c]).abs().max() <= 4e-6 * max(1, check_y[:, c].abs().max()), c


def test_float64_and_nothing_are_served_by_the_reference():
    for x in (torch.randn(4, 3).double(), torch.randn(0, 3)):
        args = (x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)
        for a, b in zip(*(run("fwd", name, *args) for name in ("triton", "reference")), strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("shape", [(70, 3), (5, 6, 4, 4)], ids=str)
def test_counters_return_to_zero(shape):
    common = importlib.import_module("fusedtricks.triton_kernels.common")
    x = torch.randn(shape)
    for _ in range(2):
        _, stats, _ = run("fwd", "triton", x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)
        run("bwd", "triton", x, x, None, None, None, stats, None, None, True, 0, 0.0, True, False, True, True)
        assert common._counters
        assert not any(counter.any() for counter in common._counters.values())


def test_a_channel_longer_than_32_bits_is_left_to_the_reference():
    batch_norm = importlib.import_module("fusedtricks.triton_kernels.batch_norm")
    countable = lambda *size: batch_norm.countable(torch.empty(size, device="meta"))  # noqa: E731
    assert countable(2, 3, 5)
    assert countable(2**12, 2, 2**20)
    assert not countable(2**12, 1, 2**20)
    assert not countable(0, 3, 5)
    stats = torch.empty((4, 1), device="meta")
    x = torch.empty((2**12, 1, 2**20), device="meta", dtype=torch.bfloat16)
    fwd, bwd = (Op.registry[f"batch_norm_{way}"].implementation("triton") for way in ("fwd", "bwd"))
    y, _, _ = fwd(x, None, None, None, None, None, None, 0.1, 1e-5, 0, 0.0, True, False)
    dx, *_ = bwd(x, x, None, None, None, stats, None, None, True, 0, 0.0, True, False, False, False)
    assert y.shape == dx.shape == x.shape


@triton.jit
def _counted(
    out, runs, units, C, inner, total, across, down, along, chunks,
    PLANES: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HELPED: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, HELPED)[None, :]
    found = tl.zeros([1, HELPED], tl.int64)
    for first in range(0, kernels.contributors(units, C, chunks, across, PLANES, ALIGN), kernels.depth(HELPED)):
        _, _, count = kernels.contributor(
            first, channel, runs, units, C, inner, total, across, down, along, chunks, PLANES, ALIGN, ROWS, BLOCK
        )
        found += tl.sum(count.to(tl.int64), 0, keep_dims=True)
    tl.store(out + channel, found, mask=channel < C)


@pytest.mark.parametrize("shape", [(32_767, 65_537), (1000, 48)], ids=str)
def test_samples_are_counted_up_to_32_bits(shape: tuple[int, int]) -> None:
    launchers = importlib.import_module("fusedtricks.triton_kernels.batch_norm")
    layout = launchers.Layout(shape[0], shape[1], 1)
    c = launchers.cut(layout, False, False, torch.device("meta"))
    args = launchers.sizes(layout, *c[:3]) | launchers.chunking(c)
    del args["TAIL"]
    out = torch.zeros(c.helped, dtype=torch.int64)
    _counted[(1,)](out, **args, HELPED=c.helped)
    assert (out[: shape[1]] == shape[0]).all()
