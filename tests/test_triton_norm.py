"""The Triton kernels of the row norms in the interpreter: regimes, strides and numerics."""

from __future__ import annotations

import importlib
import itertools
from threading import get_ident

import pytest
import torch
from parity import LAYOUTS, assert_bitwise_equal, assert_no_worse, written_everywhere
from torch import Tensor

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op

triton = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set before Python starts")

STEMS = ("layer_norm", "rms_norm")
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def run(stem: str, way: str, backend: str, *args):
    return Op.registry[f"{stem}_{way}"].implementation(backend)(*args)


def parameters(stem: str, C: tuple[int, ...], dtype: torch.dtype | None) -> list[Tensor | None]:
    return [None if dtype is None else torch.randn(C).to(dtype) for _ in range(2 if stem == "layer_norm" else 1)]


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def laid_out(value: Tensor, layout: str) -> Tensor:
    """`value`, or what of it survives expansion, with the strides of a layout of parity.LAYOUTS."""
    _, strides_of, offset = LAYOUTS[layout]
    strides = strides_of(value.shape)
    if 0 in strides:
        return value[tuple(slice(0, None if stride else 1) for stride in strides)].clone().expand(value.shape)
    room = offset + 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    return torch.full((room,), float("nan"), dtype=value.dtype).as_strided(value.shape, strides, offset).copy_(value)


def check(stem: str, x: Tensor, dy: Tensor, params: list[Tensor | None], dims: int = 1, eps: float = 1e-5) -> None:
    """Forward and backward of the kernels against fp64, and no further from it than the reference in this dtype."""
    need = (True,) * (1 + len(params))
    truth_y, truth_stats = run(stem, "fwd", "reference", *double(x, *params), eps, dims)
    ref_y, ref_stats = run(stem, "fwd", "reference", x, *params, eps, dims)
    y, stats = written_everywhere(lambda: run(stem, "fwd", "triton", x, *params, eps, dims))
    assert_no_worse(y, ref_y, truth_y, name="y")
    assert stats.shape == ref_stats.shape
    assert stats.dtype == FLOAT
    truth = run(stem, "bwd", "reference", *double(dy, x, params[0], truth_stats), dims, *need)
    ref = run(stem, "bwd", "reference", dy, x, params[0], ref_stats, dims, *need)
    grads = written_everywhere(lambda: run(stem, "bwd", "triton", dy, x, params[0], stats, dims, *need))
    for name, kernel, stock, exact in zip(("dx", "dweight", "dbias"), grads, ref, truth, strict=False):
        assert_no_worse(kernel, stock, exact, name=name, precision=x.dtype)


SHAPES = {
    "one column": (70, 1),
    "several rows per program, odd": (300, 7),
    "several rows per program": (70, 64),
    "one row short of a tile": (15, 256),
    "vectors, masked": (9, 1000),
    "no vectors, masked": (5, 1001),
    "a tile exactly": (12, 1024),
    "one row per program": (3, 4096),
    "widest backward in registers": (2, 8192),
    "backward split, forward in registers": (2, 8200),
    "both split, last chunk short": (2, 16400),
    "split without vectors": (2, 8193),
    "one row, split": (1, 8201),
}


@interpreted
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_regime(stem, shape):
    check(stem, torch.randn(shape) + 1, torch.randn(shape), parameters(stem, shape[-1:], FLOAT))


@interpreted
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    ("dtype", "parameter"), [(BF16, BF16), (HALF, HALF), (BF16, FLOAT), (FLOAT, BF16), (HALF, None)]
)
def test_dtypes(stem, dtype, parameter):
    x, dy = torch.randn(2, 9, 200).to(dtype)
    check(stem, x, dy, parameters(stem, (200,), parameter))


@interpreted
@pytest.mark.parametrize("stem", STEMS)
def test_float64_is_served_by_the_reference(stem):
    x, (weight, *bias) = torch.randn(3, 8).double(), double(*parameters(stem, (8,), FLOAT))
    for kernel, reference in zip(
        *(run(stem, "fwd", b, x, weight, *bias, 1e-5, 1) for b in ("triton", "reference")), strict=True
    ):
        assert_bitwise_equal(kernel, reference)


@interpreted
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_nothing_to_do(stem, shape):
    x, params = torch.randn(shape), parameters(stem, shape[-1:], FLOAT)
    y, stats = run(stem, "fwd", "triton", x, *params, 1e-5, 1)
    assert y.shape == x.shape
    for grad in run(stem, "bwd", "triton", x, x, params[0], stats, 1, True, *(True for _ in params))[1:]:
        assert_bitwise_equal(grad, torch.zeros(shape[-1:]))


@interpreted
@pytest.mark.parametrize("C", [1000, 8201])
@pytest.mark.parametrize("mean", [1e2, 1e5])
def test_error_does_not_grow_with_the_mean(mean, C):
    x = torch.randn(2, C) + mean
    truth, truth_stats = run("layer_norm", "fwd", "reference", x.double(), None, None, 1e-5, 1)
    y, stats = run("layer_norm", "fwd", "triton", x, None, None, 1e-5, 1)
    assert (y - truth).abs().max() < 4e-6
    dy = torch.randn(2, C)
    grads = run("layer_norm", "bwd", "triton", dy, x, None, stats, 1, True, True, False)
    exact = run("layer_norm", "bwd", "reference", dy.double(), x.double(), None, truth_stats, 1, True, True, False)
    for grad, true in zip(grads[:2], exact[:2], strict=True):
        assert (grad - true).abs().max() < 2e-5


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of overflow: that is the point
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("C", [33, 8201])
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_huge_rows_stay_finite(stem, C, scale):
    x = torch.randn(3, C)
    x[1] *= scale  # a row that must be rescued between two that must not
    check(stem, x, torch.randn(3, C), parameters(stem, (C,), FLOAT))


X_LAYOUTS = ("transposed", "batch swapped", "offset by one", "row-sliced", "every second row", "expanded")
DY_LAYOUTS = ("plain", "transposed", "batch swapped", "row-sliced", "expanded", "expanded columns")


@interpreted
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_strides(x_layout, dy_layout):
    x, dy = (laid_out(torch.randn(3, 5, 40), layout) for layout in (x_layout, dy_layout))
    check("layer_norm", x, dy, parameters("layer_norm", (40,), FLOAT))


@interpreted
def test_strides_of_split_rows():
    x, dy = laid_out(torch.randn(2, 2, 8200), "batch swapped"), torch.ones(()).expand(2, 2, 8200)
    check("layer_norm", x, dy, parameters("layer_norm", (8200,), FLOAT))


@interpreted
def test_several_normalised_dimensions():
    check(
        "layer_norm",
        torch.randn(4, 3, 5, 8),
        torch.randn(4, 3, 5, 8),
        parameters("layer_norm", (3, 5, 8), FLOAT),
        dims=3,
    )


@interpreted
def test_strided_rows_are_read_in_place():
    from bench.traffic import count_traffic

    x = torch.randn(4, 8, 300)[:, ::2, :256]
    with count_traffic() as traffic:
        y, stats = run("layer_norm", "fwd", "triton", x, None, None, 1e-5, 1)
    assert traffic.bytes == 4 * (x.numel() + y.numel() + stats.numel())


@interpreted
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("C", [40, 8200])
def test_every_subset_of_gradients(stem, C):
    x, dy, params = torch.randn(3, C), torch.randn(3, C), parameters(stem, (C,), FLOAT)
    _, stats = run(stem, "fwd", "triton", x, *params, 1e-5, 1)
    everything = run(stem, "bwd", "triton", dy, x, params[0], stats, 1, True, *(True for _ in params))
    for need in itertools.product((True, False), repeat=1 + len(params)):
        some = run(stem, "bwd", "triton", dy, x, params[0], stats, 1, *need)
        for wanted, grad, full in zip(need, some, everything, strict=True):
            assert_bitwise_equal(grad, full if wanted else full.new_empty(0))


@interpreted
@pytest.mark.parametrize("C", [40, 8201])
def test_counters_return_to_zero(C):
    common = importlib.import_module("fusedtricks.triton_kernels.common")
    x, params = torch.randn(9, C), parameters("layer_norm", (C,), FLOAT)
    for _ in range(2):
        _, stats = run("layer_norm", "fwd", "triton", x, *params, 1e-5, 1)
        run("layer_norm", "bwd", "triton", x, x, params[0], stats, 1, True, True, True)
        assert common._counters
        assert not any(counter.any() for counter in common._counters.values())


@pytest.mark.skipif(INTERPRETED, reason="one program at a time has no helpers")
@pytest.mark.parametrize("C", [768, 65536])
def test_helpers_find_room_on_small_devices(C, monkeypatch):
    """Helpers wait for programs that may not run yet: where they fill the device, nothing ends."""
    row_norm = importlib.import_module("fusedtricks.triton_kernels.row_norm")
    x, stats = torch.empty((4096, C), device="meta"), torch.empty((3, 4096), device="meta")
    args = row_norm.describe({"dy": x, "x": x, "dx": x}, 1)
    for processors in (132, 14, 1):
        monkeypatch.setattr(row_norm.common, "processors", lambda device, count=processors: count)
        launch = row_norm.plan_backward(x, x, x[0], stats, x, x[0], x[0], args, True)
        assert 1 <= launch.args["helpers"] <= min(processors, row_norm.HELPERS)


def test_counters_lie_outside_pools(monkeypatch):
    """A pool of memory serves the thread that opened it, and what outlives the call must not come from there."""
    common = importlib.import_module("fusedtricks.triton_kernels.common")
    zeros, makers = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: makers.append(get_ident()) or zeros(*args, **options))
    monkeypatch.setattr(common, "_counters", {})
    lasting = common.counters(torch.device("cpu"), 5)
    assert common.counters(torch.device("cpu"), 5) is lasting
    assert len(makers) == 1
    assert makers[0] != get_ident()


def test_collapse_rows():
    common = importlib.import_module("fusedtricks.triton_kernels.common")
    assert common.collapse_rows((), ()) == []
    assert common.collapse_rows((4, 1, 5), (50, 7, 10), (5, 0, 1)) == [(20, (10, 1))]
    assert common.collapse_rows((4, 5), (10, 40), (5, 1)) == [(5, (40, 1)), (4, (10, 5))]
    assert common.collapse_rows((4, 5), (50, 10), (0, 0)) == [(20, (10, 0))]
    assert common.walk_rows((2, 3, 4), (1000, 100, 1), (1, 2, 6)) is None
