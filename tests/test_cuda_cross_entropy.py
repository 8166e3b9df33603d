"""The CUDA kernels of cross_entropy on the CPU (tests/cuda_on_host): what the parity sweep in test_cuda_on_host.py does
not reach, and sown bugs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from cuda_on_host import build
from parity import assert_bitwise_equal, assert_no_worse, bits
from torch import Tensor

import fusedtricks
from fusedtricks import MixedTarget
from fusedtricks.functional import cross_entropy

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
inf, nan = float("inf"), float("nan")
# (size, device): rows of lanes, of a warp, of a block, of several blocks; strided, also in several blocks.
SMALL = {"processors": 3, "threads": 32, "order": 7}
REGIMES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "lanes": ((9, 5), {}),
    "a warp": ((3, 301), {}),
    "a block": ((2, 2100), SMALL),
    "several blocks": ((1, 4099), SMALL),
    "strided": ((2, 6, 3, 5), {}),
    "strided, several blocks": ((1, 301, 2, 2), SMALL),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True, "label_smoothing": 0.2},
    "extras": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "temperature": 2.0, "return_lse": True},
    "ranked": {"topk": (1, 5)},
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[cuda_on_host.Kernels]:
    kernels = cuda_on_host.load()
    with kernels.as_backend():
        yield kernels


def inputs(size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Logits, two columns of labels with some ignored, probabilities."""
    generator = torch.Generator().manual_seed(1)
    classes, lead = size[1], (size[0], *size[2:])
    a, b = (torch.randint(classes, lead, generator=generator) for _ in range(2))
    if a.numel() > 2:
        a.view(-1)[1], b.view(-1)[1], b.view(-1)[2] = -100, -100, -100
    return 3 * torch.randn(size, generator=generator), a, b, torch.rand(size, generator=generator)


def run(
    backend: str, size: tuple[int, ...], kind: str, options: str, reduction: str, dtype: torch.dtype
) -> list[Tensor]:
    x, a, b, p = inputs(size)
    x = x.to(dtype).requires_grad_()
    lam = torch.tensor(0.3) if options == "weighted" else torch.linspace(0, 1, size[0])
    given = {**OPTIONS[options], "reduction": reduction}
    if "weight" in given:
        given["weight"] = torch.linspace(0, 2, size[1], dtype=dtype)
    target: Any = {"hard": a, "probabilities": p.to(dtype)}.get(kind, MixedTarget(a, b, lam.to(dtype)))
    with fusedtricks.backend(backend):
        ys = cross_entropy(x, target, **given)
        ys = ys if isinstance(ys, tuple) else (ys,)
        graded = [y for y in ys if y.requires_grad]
        return [*(y.detach() for y in ys), *torch.autograd.grad(sum(y.sum() for y in graded), x)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "pair", "probabilities"])
@pytest.mark.parametrize("regime", REGIMES)
def test_against_the_reference(kernels: cuda_on_host.Kernels, regime: str, kind: str, options: str) -> None:
    if options == "ranked" and kind == "probabilities":
        return
    size, device = REGIMES[regime]
    reduction = "none" if options in ("smoothed", "extras") else "mean"
    with kernels.device(**device):
        ours = run("cuda_on_host", size, kind, options, reduction, torch.float32)
    reference, truth = (run("reference", size, kind, options, reduction, d) for d in (torch.float32, torch.float64))
    for i, (mine, theirs, true) in enumerate(zip(ours, reference, truth, strict=True)):
        if mine.is_floating_point():
            assert_no_worse(mine, theirs, true.double(), name=f"result {i}")
        else:
            assert torch.equal(mine, true)


@pytest.mark.parametrize("options", ["plain", "extras"])
@pytest.mark.parametrize("regime", REGIMES)
def test_order_of_threads(kernels: cuda_on_host.Kernels, regime: str, options: str) -> None:
    size, device = REGIMES[regime]
    found = []
    for order in (0, 1, 2):
        with kernels.device(**{**device, "order": order}):
            found.append(run("cuda_on_host", size, "pair", options, "mean", torch.float32))
    for results in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], results, strict=True)):
            assert_bitwise_equal(a, b, name=f"result {i}")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("size", [(3, 41), (2, 5, 3, 2)], ids=str)
def test_probabilities_of_another_dtype(
    kernels: cuda_on_host.Kernels, kind: torch.dtype, size: tuple[int, ...]
) -> None:
    x, *_, p = inputs(size)
    x, p = x.bfloat16(), p.to(kind)
    results = []
    for backend in ("cuda_on_host", "reference"):
        leaf = x.clone().requires_grad_()
        with fusedtricks.backend(backend):
            loss = cross_entropy(leaf, p, out_dtype=torch.float32)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0].float()))
    torch.testing.assert_close(*results, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8], ids=["int32", "uint8"])
def test_labels_of_other_dtypes(kernels: cuda_on_host.Kernels, kind: torch.dtype) -> None:
    x, y = torch.randn(5, 9), torch.randint(9, (5,))
    with fusedtricks.backend("cuda_on_host"):
        assert_bitwise_equal(cross_entropy(x, y), cross_entropy(x, y.to(kind)))


@pytest.mark.parametrize("classes", [30, 4099])
def test_bad_rows(kernels: cuda_on_host.Kernels, classes: int) -> None:
    """Ignored rows are inert, a row without a finite logit is NaN, and so is a label that is no class."""
    x = torch.randn(5, classes)
    x[1], x[2] = nan, -inf
    y = torch.tensor([3, -100, 4, classes, 5])
    with kernels.device(**SMALL), fusedtricks.backend("cuda_on_host"):
        x.requires_grad_()
        loss = cross_entropy(x, y, reduction="none", label_smoothing=0.1)
        (made,) = torch.autograd.grad(loss, x, torch.ones(5))
    assert loss.isnan().tolist() == [False, False, True, True, False]
    assert loss[1] == 0
    assert (made[1] == 0).all()
    assert made.isnan().any(1).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_minus_infinity_in_every_block(kernels: cuda_on_host.Kernels, smoothing: float) -> None:
    for classes, finite in itertools.product((7, 4099), (0, 1, -1)):
        x, weight = torch.full((1, classes), -inf), torch.zeros(classes)
        x[0, finite], weight[finite] = 3.0, 1.0
        y = torch.tensor([finite % classes])
        with kernels.device(**SMALL), fusedtricks.backend("cuda_on_host"):
            x.requires_grad_()
            loss = cross_entropy(x, y, weight, label_smoothing=smoothing)
            (made,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert (made == 0).all()


def test_no_rows_and_no_order_of_memory(kernels: cuda_on_host.Kernels) -> None:
    """Nothing to do, and rows that take more than two levels of strides: these go through copies."""
    with fusedtricks.backend("cuda_on_host"):
        assert cross_entropy(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).isnan()
        assert cross_entropy(torch.empty(0, 3), torch.empty(0, dtype=torch.long), reduction="sum") == 0
    x = torch.randn(7, 5, 6, 8, 3)[:5, :, ::2, ::2].movedim(-1, 1)
    y = torch.randint(3, (5, 5, 3, 4))
    made = []
    for backend in ("cuda_on_host", "reference"):
        leaf = x.detach().requires_grad_()
        with fusedtricks.backend(backend):
            made.append(torch.autograd.grad(cross_entropy(leaf, y), leaf)[0])
    torch.testing.assert_close(*made)
    assert made[0].stride() == made[1].stride()


# ---- sown bugs -------------------------------------------------------------------------------------------------------

BUGS = {
    "head of a row forgotten": (
        "cross_entropy.cuh",
        "return e < head ? e : e + slots * L;",
        "return e + slots * L;",
        "a warp",
    ),
    "parts not rescaled": (
        "cross_entropy_forward.cuh",
        "seen.sums = join(seen.sums, part, Exp<A>());",
        "seen.sums.total += part.total;",
        "several blocks",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_caught(name: str) -> None:
    file, old, new, regime = BUGS[name]
    size, device = REGIMES[regime]
    bad = cuda_on_host.Kernels(build.build({f"cuda/{file}": (old, new)}, stems=("cross_entropy",)))
    with bad.as_backend(), bad.device(**device):
        found = run("cuda_on_host", size, "pair", "smoothed", "none", torch.float32)
    truth = run("reference", size, "pair", "smoothed", "none", torch.float64)
    assert not all(torch.allclose(a.double(), b, 1e-5, 1e-5) for a, b in zip(found, truth, strict=True))


def test_counters_not_zeroed_is_caught() -> None:
    patch = {"cuda/cross_entropy.cu": ("device.zero(call.counters, needed * sizeof(unsigned));", "")}
    bad = cuda_on_host.Kernels(build.build(patch, stems=("cross_entropy",)))
    with bad.as_backend():
        found = run("cuda_on_host", (9, 5), "hard", "plain", "mean", torch.float32)
    assert not torch.equal(bits(found[0]), bits(run("reference", (9, 5), "hard", "plain", "mean", torch.float32)[0]))
