"""The CUDA kernels of batch normalization on the CPU (tests/cuda_on_host): regimes, order of threads, sown bugs.

Parity over the whole sweep is in test_cuda_on_host.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from cuda_on_host import build
from parity import assert_bitwise_equal, bits
from torch import Tensor

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op
from fusedtricks.ops import _batch_norm as bn

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
Ops = dict[str, Callable[..., Any]]
SMALL = {"processors": 3, "threads": 64}
STATIC = 4 << 10  # bytes of shared memory that launchers leave to what kernels declare themselves
NO_ROOM = {**SMALL, "shared": STATIC}  # to hold a channel
DEVICES: list[dict[str, int]] = [{}, SMALL, {"processors": 9, "threads": 32}, NO_ROOM]
SHAPES = {
    "planes": (3, 5, 6, 8),
    "planes without vectors": (3, 5, 7, 9),
    "several rounds of a block": (7, 3, 16, 24),
    "several rounds, without vectors": (7, 3, 13, 15),
    "rows": (70, 16),
    "narrow rows": (66, 3),
}
KERNELS = ("measure_channels", "normalize_channels", "sum_channels", "backward_channels")
RESIDENT = ("forward_resident", "backward_resident")


@pytest.fixture(scope="module")
def kernels() -> Iterator[cuda_on_host.Kernels]:
    return cuda_on_host.load()


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, residual, dy; weight, bias."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    return (*tensors, *torch.randn(2, shape[1], generator=generator).unbind())


def everything(ops: Ops, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of forward and backward on fixed data, with a mask and averages; and of a backward that makes z again."""
    x, residual, dy, weight, bias = data(shape, dtype)
    averages = [torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(2)]
    options = (None, 1e-5, bn.RELU, 0.0, True, True)
    y, stats, mask = ops["batch_norm_fwd"](x, residual, weight, bias, *averages, *options)
    grads = ops["batch_norm_bwd"](dy, x, None, weight, None, stats, mask, None, True, bn.RELU, 0.0, *(True,) * 4)
    again = ops["batch_norm_bwd"](dy, x, residual, weight, bias, stats, None, None, True, bn.SILU, 0.0, *(True,) * 4)
    return [y, stats, mask, *averages, *grads, *again]


def reference_ops() -> Ops:
    return {name: op.implementation("reference") for name, op in Op.registry.items()}


def reference(shape: tuple[int, ...]) -> list[Tensor]:
    return everything(reference_ops(), shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_order_of_threads(kernels: cuda_on_host.Kernels, shape: tuple[int, ...], device: dict[str, int]) -> None:
    found = []
    for order in (0, 1, 2):
        with kernels.device(**device, order=order):
            found.append(everything(kernels.ops, shape))
    for results in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], results, strict=True)):
            assert_bitwise_equal(a, b, name=f"result {i}")
    for ours, theirs in zip(found[0], reference(shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_regimes(kernels: cuda_on_host.Kernels) -> None:
    """These tests reach every kernel, in both layouts, with whole vectors and without."""
    for shape, dtype in itertools.product(SHAPES.values(), (torch.float32, torch.bfloat16)):
        everything(kernels.ops, shape, dtype)
        with kernels.device(**NO_ROOM):
            everything(kernels.ops, shape, dtype)
        x, residual, dy, weight, bias = data(shape, dtype)
        stats = kernels.ops["batch_norm_apply"](
            x, residual, weight, bias, weight, None, bias.abs(), 1e-5, bn.GELU, 0.0, False
        )[1]
        kernels.ops["batch_norm_bwd"](
            dy, x, residual, weight, bias, stats, None, None, False, bn.GELU, 0.0, *(True,) * 4
        )
    launched = "\n".join(kernels.launched())
    for kernel, planes in itertools.product(KERNELS, ("true", "false")):
        last = [", true", ", false"] if kernel == "backward_channels" else [""]
        for dtype, end in itertools.product(("float, 4", "__nv_bfloat16, 8"), last):
            name = f"{kernel}<{dtype}, {planes}{end}>"
            assert name in launched, f"{name} was never launched"
    for kernel, dtype in itertools.product(RESIDENT, ("float, 4", "float, 1", "__nv_bfloat16, 8", "__nv_bfloat16, 1")):
        assert f"{kernel}<{dtype}>" in launched, f"{kernel}<{dtype}> was never launched"
    for name in ("take_statistics", "count_batch", "measure_channels<float, 1, true>"):
        assert name in launched


def launches(kernels: cuda_on_host.Kernels, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[int]:
    """Of a forward and of a backward."""
    x, _, dy, weight, bias = data(shape, dtype)
    running = (torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0))
    counts = [kernels.launches()]
    _, stats, _ = kernels.ops["batch_norm_fwd"](x, None, weight, bias, *running, 0.1, 1e-5, bn.RELU, 0.0, True, False)
    counts.append(kernels.launches())
    kernels.ops["batch_norm_bwd"](dy, x, None, weight, bias, stats, None, None, True, bn.RELU, 0.0, *(True,) * 4)
    counts.append(kernels.launches())
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.parametrize(
    ("shape", "device", "expected"),
    [
        pytest.param((2, 3, 16, 32), {"shared": STATIC + 4096}, [1, 2], id="x fits exactly"),
        pytest.param((2, 3, 16, 32), {"shared": STATIC + 4095}, [2, 2], id="a byte less"),
        pytest.param((2, 3, 16, 32), {"shared": STATIC + 8192}, [1, 1], id="x and dy fit exactly"),
        pytest.param((2, 3, 5, 5), {"shared": STATIC + 32 * 32}, [1, 2], id="bundles of a warp"),
        pytest.param((2, 3, 5, 5), {"shared": STATIC + 32 * 32 - 1}, [2, 2], id="a byte less than those"),
        pytest.param((2, 1, 32, 128), {"processors": 8}, [1, 2], id="32 KB: no device need be filled"),
        pytest.param((1, 6, 72, 128), {"processors": 8}, [1, 1], id="six of eight processors"),
        pytest.param((1, 5, 72, 128), {"processors": 8}, [2, 2], id="five of eight processors"),
        pytest.param((1, 9, 72, 128), {"processors": 8}, [2, 2], id="a second round with one block"),
        pytest.param((66, 16), {}, [2, 2], id="rows"),
    ],
)
def test_who_is_resident(
    kernels: cuda_on_host.Kernels, shape: tuple[int, ...], device: dict[str, int], expected: list[int]
) -> None:
    """Channels that a block holds take one launch, counter and averages included; others two."""
    with kernels.device(**device):
        assert launches(kernels, shape) == expected


@pytest.mark.parametrize("device", [{}, NO_ROOM], ids=["resident", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_bytes(kernels: cuda_on_host.Kernels, device: dict[str, int], dtype: torch.dtype, added: bool) -> None:
    """The bytes that the head of batch_norm.cuh states, but for bits, which are not counted.

    There are no parameters: each thread of a block would count the same one.
    """
    x, residual, dy, *_ = data((7, 6, 32, 32), dtype)
    size, reads = x.numel() * x.element_size(), 2 if device else 1
    options = (None, None, None, 0.1, 1e-5, bn.RELU, 0.0, True, added)
    found = [kernels.moved()]
    with kernels.device(**device):
        _, stats, mask = kernels.ops["batch_norm_fwd"](x, residual if added else None, None, None, *options)
        found.append(kernels.moved())
        signs = mask if added else None
        need = (True, added, True, True)
        kernels.ops["batch_norm_bwd"](dy, x, *(None,) * 3, stats, signs, None, True, bn.RELU, 0.0, *need)
        found.append(kernels.moved())
    floors = ((reads + added, 1), (2 * reads, 1 + added))
    for before, after, floor in zip(found, found[1:], floors, strict=False):
        for start, end, times in zip(before, after, floor, strict=True):
            assert times * size <= end - start <= 1.05 * times * size


@pytest.mark.parametrize("device", [{}, NO_ROOM], ids=["resident", "streaming"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [SHAPES["planes"], SHAPES["rows"]], ids=str)
def test_averages(
    kernels: cuda_on_host.Kernels, device: dict[str, int], momentum: float | None, shape: tuple[int, ...]
) -> None:
    found = []
    with kernels.device(**device):
        for ops in (kernels.ops, reference_ops()):
            averages = [torch.zeros(shape[1]), torch.ones(shape[1], dtype=torch.float64), torch.tensor(2)]
            for seed in range(3):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                ops["batch_norm_fwd"](x, None, None, None, *averages, momentum, 1e-5, 0, 0.0, True, False)
            found.append(averages)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", [SMALL, NO_ROOM], ids=["resident", "streaming"])
@pytest.mark.parametrize("shape", ["several rounds of a block", "several rounds, without vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_options(kernels: cuda_on_host.Kernels, device: dict[str, int], shape: str, dtype: torch.dtype) -> None:
    """Every activation, with a residual and without, by its signs and by z made again, with parameters and without."""
    x, residual, dy, weight, bias = data(SHAPES[shape], dtype)
    theirs = reference_ops()
    for activation, added, affine in itertools.product(range(len(bn.ACTIVATIONS)), (None, residual), (True, False)):
        parameters, masked = (weight, bias) if affine else (None, None), added is not None and activation in bn.SIGNED
        options = (None, None, None, 0.1, 1e-5, activation, 0.1, True, masked)
        _, stats, _ = theirs["batch_norm_fwd"](x, added, *parameters, *options)
        found = []
        for ops in (kernels.ops, theirs):
            with kernels.device(**device):
                y, own, mask = ops["batch_norm_fwd"](x, added, *parameters, *options)
                again = (None, *parameters, stats, mask) if masked else (added, *parameters, stats, None)
                need = (True, added is not None, True, True)
                grads = ops["batch_norm_bwd"](dy, x, *again, None, True, activation, 0.1, *need)
            found.append([y, own, mask, *grads])
        for ours, expected in zip(*found, strict=True):
            eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
            torch.testing.assert_close(ours, expected, rtol=8 * eps, atol=(8 if ours.dim() > 2 else 256) * eps)


@pytest.mark.parametrize("shape", [(3, 5, 6, 8), (66, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", [{}, NO_ROOM], ids=["resident", "streaming"])
def test_wanted_gradients(
    kernels: cuda_on_host.Kernels, shape: tuple[int, ...], training: bool, device: dict[str, int]
) -> None:
    """What is not wanted is empty; what is, does not depend on the rest."""
    x, _, dy, weight, bias = data(shape)
    stats = bn.statistics(x, 1e-5)
    args = (dy, x, None, weight, bias, stats, None, None, training, bn.SILU, 0.0)
    truth = reference_ops()["batch_norm_bwd"](*args, *(True,) * 4)
    found: dict[bool, list[Tensor]] = {}
    for need in itertools.product((True, False), repeat=4):
        with kernels.device(**device):
            grads = kernels.ops["batch_norm_bwd"](*args, *need)
        whole = found.setdefault(need[0], grads)  # without dx, sums are taken by other kernels
        for true, first, part, want in zip(truth, whole, grads, need, strict=True):
            assert_bitwise_equal(part, first if want else first.new_empty(0))
            torch.testing.assert_close(part, true if want else part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(769, 6), (6, 5, 9, 14)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e5])
@pytest.mark.parametrize("device", [SMALL, NO_ROOM], ids=["resident", "streaming"])
def test_error_does_not_grow_with_the_mean(
    kernels: cuda_on_host.Kernels, shape: tuple[int, ...], mean: float, device: dict[str, int]
) -> None:
    x = data(shape)[0] + mean
    x[:, 1] *= 1e20
    x[:2, 3] -= 1e3  # a shift taken from these is a bad one
    truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    with kernels.device(**device):
        y = kernels.ops["batch_norm_fwd"](x, *(None,) * 6, 0.1, 1e-5, 0, 0.0, True, False)[0]
    error = (y - truth).transpose(0, 1).flatten(1).abs().amax(1)
    assert (error <= 2e-6 * truth.transpose(0, 1).flatten(1).abs().amax(1)).all(), error


# ---- sown bugs -------------------------------------------------------------------------------------------------------


def with_bug(path: str, old: str, new: str) -> cuda_on_host.Kernels:
    built: Path = build.build({f"cuda/{path}": (old, new)}, stems=("batch_norm",))
    return cuda_on_host.Kernels(built)


# Those of the resident kernels that parity notices are in seeded_bugs/batch_norm.py.
BUGS = {
    "sign at zero": ("batch_norm_forward.cuh", "!(z <= A(0))", "!(z < A(-1))"),
    "rest forgotten": ("batch_norm_backward.cuh", "means[c] - rest * incline[i]", "means[c] + incline[i]"),
    "biased running variance": (
        "batch_norm_forward.cuh",
        "var * (static_cast<A>(a.samples)",
        "var * (static_cast<A>(a.samples - 1)",
    ),
    "residual not kept": (
        "batch_norm_backward.cuh",
        "if (a.residual) held_residual.put(put.slot, bundle[k].residual);",
        "",
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_bug_is_caught(bug: tuple[str, str, str]) -> None:
    shape = SHAPES["planes"]
    found, expected = everything(with_bug(*bug).ops, shape), reference(shape)
    assert not all(torch.allclose(a.double(), b.double(), 1e-5, 1e-5) for a, b in zip(found, expected, strict=True))


def test_counting_in_every_block_is_caught() -> None:
    kernels = with_bug("batch_norm_forward.cuh", "!a.cumulative && blockIdx.x == 0", "!a.cumulative")
    tracked = torch.tensor(0)
    running = (torch.zeros(5), torch.ones(5), tracked)
    kernels.ops["batch_norm_fwd"](data(SHAPES["planes"])[0], *(None,) * 3, *running, 0.1, 1e-5, 0, 0.0, True, False)
    assert tracked == 5


@pytest.mark.parametrize(
    "bug",
    [
        ("batch_norm_forward.cuh", "if (put.left()) held.put", "held.put"),
        ("batch_norm_resident.cuh", "int64_t{sizeof(T)} + bits)", "int64_t{sizeof(T)})"),
    ],
    ids=["put past the channel", "no room for signs"],
)
def test_too_little_shared_memory_is_caught(bug: tuple[str, str, str]) -> None:
    with pytest.raises(RuntimeError, match="out-of-bounds write past"):
        everything(with_bug(*bug).ops, SHAPES["planes"])


def test_shared_memory_not_asked_for_is_caught() -> None:
    kernels = with_bug("launch.cuh", "kWithoutOptIn = (48 << 10)", "kWithoutOptIn = (1 << 20)")
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        everything(kernels.ops, (2, 2, 72, 128))


def test_room_for_static_memory_forgotten_is_caught(kernels: cuda_on_host.Kernels) -> None:
    """The host knows of no static shared memory; that kernels declare no more than is left, test_cuda_compile shows."""
    bug = with_bug("batch_norm_resident.cuh", "shared_per_block() - kStaticShared", "shared_per_block()")
    with kernels.device(shared=8 << 10), bug.device(shared=8 << 10):
        assert launches(kernels, (2, 3, 24, 32)) == [2, 2]
        assert launches(bug, (2, 3, 24, 32)) == [1, 2]


def test_missing_barrier_is_caught() -> None:
    """Between the writing and the reading of sums over the rows of a block."""
    old = "        __syncthreads();\n        if (threadIdx.x < half) {"
    kernels = with_bug("batch_norm.cuh", old, old.replace("__syncthreads();", ""))
    found = []
    for order in (0, 1):
        with kernels.device(order=order):
            found.append(everything(kernels.ops, SHAPES["rows"]))
    assert any(not torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
