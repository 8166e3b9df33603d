"""The CUDA kernels on the CPU, thread by thread (tests/cuda_on_host): the parity sweep in every regime, independence of
the order of threads, and bugs sown into the real source that must be caught."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import sweep
import torch
from cases import CASES, Case
from cuda_on_host import build
from parity import assert_bitwise_equal, bits
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]

# Rows of a few hundred elements are long on a small device: they no longer fit registers, then shared memory. The order
# of threads differs as well.
DEVICES: dict[str, dict[str, int]] = {
    "a real device": {},
    "64 threads, 12 KB": {"processors": 3, "threads": 64, "shared": 12 << 10, "order": 5},
    "32 threads, 8 KB": {"processors": 9, "threads": 32, "shared": 8 << 10, "order": 1},
}
KERNELS = {
    "normalize_rows<{c}, float, 4, 4>": "rows in registers",
    "normalize_rows<{c}, float, 4, 0>": "rows in shared memory",
    "normalize_rows<{c}, __nv_bfloat16, 1, 4>": "odd alignment",
    "measure_strips<{c}, float, 4>": "rows in strips, statistics",
    "normalize_strips<{c}, float, 4>": "rows in strips, normalization",
    "backward_rows<{c}, float, 4, 2, false>": "sums in registers",
    "backward_rows<{c}, float, 4, 8, true>": "sums in shared memory",
    "backward_rows<{c}, __nv_bfloat16, 1, 2, false>": "odd alignment",
    "project_strips<{c}, float, 4>": "rows in strips, projections",
}
STEMS = [stem for stem in CASES if (build.CSRC / "cuda" / f"{stem}.cu").exists()]
NORMS = [stem for stem in STEMS if CASES[stem].family == "norm"]


HOST = sweep.Target("cpu", "cuda_on_host")


@pytest.fixture(scope="module")
def kernels() -> Iterator[cuda_on_host.Kernels]:
    kernels = cuda_on_host.load()
    with kernels.as_backend():
        yield kernels


def sample(case: Case, device: str) -> list[sweep.Config]:
    """Small shapes at the edges of the regimes, then a seeded choice of everything."""

    def elements(config: sweep.Config) -> int:
        return math.prod(sweep.shape_of(case, config)[0])

    rng = random.Random(zlib.crc32(f"{case.stem} {device}".encode()))

    def some(configs: list[sweep.Config], count: int) -> list[sweep.Config]:
        return rng.sample(configs, min(count, len(configs)))

    every = [c for c in sweep.configurations(case) if elements(c) < 10_000 and len(set(c.params)) < 2]
    edges = [c for c in every if c == sweep.Config(c.shape, c.dtype) and c.dtype in ("fp32", "bf16")]
    hard = [c for c in every if c.adversary and c.dtype == "fp32"]
    return list(dict.fromkeys([*some(edges, 20), *some(hard, 8), *some(every, 40)]))


RUNS = [
    pytest.param(stem, config, device, id=f"{stem}-{device}-{config}")
    for device in DEVICES
    for stem in STEMS
    for config in sample(CASES[stem], device)
]


@pytest.mark.parametrize(("stem", "config", "device"), RUNS)
def test_parity(kernels: cuda_on_host.Kernels, stem: str, config: sweep.Config, device: str) -> None:
    with kernels.device(**DEVICES[device]):
        sweep.check(CASES[stem], config, HOST)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("device", DEVICES)
def test_order_of_threads(kernels: cuda_on_host.Kernels, stem: str, device: str) -> None:
    """Between two barriers and between two launches any order of threads and blocks gives the same bits."""
    case = CASES[stem]
    for shape in {case.shape, *case.layout_shapes}:
        config = sweep.Config(shape)
        tensors, dys = sweep.generated(case, config)
        wanted = [i for i, name in enumerate(case.names) if name not in case.fixed]
        found = []
        for order in (0, 1, 2, 3):
            with kernels.device(**{**DEVICES[device], "order": order}), sweep.forced(HOST):
                rest = case.shapes[shape][1:]
                found.append(sweep.forward_backward(case, case.fn, tensors, wanted, dys, *rest))
        for results in found[1:]:
            for i, (a, b) in enumerate(zip(found[0], results, strict=True)):
                assert_bitwise_equal(a, b, name=f"{shape}, result {i}")


# ---- the row norms, op by op -----------------------------------------------------------------------------------------

Ops = dict[str, Callable[..., Any]]


def run_everything(ops: Ops, stem: str, columns: int = 700, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of forward and backward on fixed data, 13 rows."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(13, columns, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    if stem == "layer_norm":
        y, stats = ops["layer_norm_fwd"](x, weight, bias, 1e-5, 1)
        return [y, stats, *ops["layer_norm_bwd"](dy, x, weight, stats, 1, True, True, True)]
    y, stats = ops["rms_norm_fwd"](x, weight, 1e-5, 1)
    return [y, stats, *ops["rms_norm_bwd"](dy, x, weight, stats, 1, True, True)]


@pytest.mark.parametrize("stem", NORMS)
@pytest.mark.parametrize("columns", [24, 700, 701])
@pytest.mark.parametrize("device", DEVICES)
def test_order_of_threads_in_every_regime(kernels: cuda_on_host.Kernels, stem: str, columns: int, device: str) -> None:
    found = []
    for order in (0, 1, 2, 3):
        with kernels.device(**{**DEVICES[device], "order": order}):
            found.append(run_everything(kernels.ops, stem, columns))
    for results in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], results, strict=True)):
            assert_bitwise_equal(a, b, name=f"result {i}")


@pytest.mark.parametrize("stem", NORMS)
def test_regimes(kernels: cuda_on_host.Kernels, stem: str) -> None:
    """These tests reach every kernel."""
    for device in DEVICES.values():
        for columns in (24, 700, 1500):
            with kernels.device(**device):
                run_everything(kernels.ops, stem, columns)
                run_everything(kernels.ops, stem, columns + 1, torch.bfloat16)
    center = "true" if stem == "layer_norm" else "false"
    for name, regime in KERNELS.items():
        kernel = f"void fusedtricks::cuda::{name.format(c=center)}"
        assert kernel in kernels.launched(), f"{regime}: {kernel} was never launched"


@pytest.mark.parametrize("size", [1e3, 4e17, 1e25])
def test_strips_of_large_values(kernels: cuda_on_host.Kernels, size: float) -> None:
    """4e17: the squares of a strip fit fp32, those of the row do not."""
    x = torch.randn(2, 4096) * size
    with kernels.device(**DEVICES["32 threads, 8 KB"]):
        y, stats = kernels.ops["layer_norm_fwd"](x, None, None, 1e-5, 1)
    truth, wide = kernels.ops["layer_norm_fwd"](x.double(), None, None, 1e-5, 1)
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[2].double(), wide[2], rtol=1e-6, atol=0)


def test_wanted_gradients(kernels: cuda_on_host.Kernels) -> None:
    """What is not wanted is empty; what is, does not depend on the rest."""
    x, dy, weight = torch.randn(3, 5, 40), torch.randn(3, 5, 40), torch.randn(40)
    for device in DEVICES.values():
        with kernels.device(**device):
            _, stats = kernels.ops["layer_norm_fwd"](x, weight, None, 1e-5, 1)
            every = kernels.ops["layer_norm_bwd"](dy, x, weight, stats, 1, True, True, True)
            for wanted in itertools.product((True, False), repeat=3):
                for whole, part, want in zip(
                    every, kernels.ops["layer_norm_bwd"](dy, x, weight, stats, 1, *wanted), wanted, strict=True
                ):
                    if want:
                        assert_bitwise_equal(whole, part)
                    else:
                        assert part.shape == (0,)
                        assert part.dtype == whole.dtype


def past_48_kb(ops: Ops) -> None:
    """Launches with 48 KB of shared memory to the byte, beside which the kernels declare some."""
    if "layer_norm_fwd" in ops:
        run_everything(ops, "layer_norm", 6144)
        ops["layer_norm_fwd"](torch.randn(1, 12001), None, None, 1e-5, 1)
    run_everything(ops, "rms_norm", 12288, torch.bfloat16)


def test_shared_memory_that_kernels_declare_counts(kernels: cuda_on_host.Kernels) -> None:
    past_48_kb(kernels.ops)
    for kernel in ("backward_rows<true, float, 4, 8, true>", "normalize_rows<true, float, 1, 0>"):
        assert f"void fusedtricks::cuda::{kernel}" in kernels.launched()
    assert "void fusedtricks::cuda::backward_rows<false, __nv_bfloat16, 8, 8, true>" in kernels.launched()


# ---- sown bugs -------------------------------------------------------------------------------------------------------


def with_bug(path: str, old: str, new: str, **options: Any) -> Path:
    return build.build({path: (old, new)}, stems=("rms_norm",), **options)


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def test_missing_barrier_is_caught() -> None:
    old = "    __syncthreads();\n    value = threadIdx.x % kWarp"
    kernels = cuda_on_host.Kernels(with_bug("cuda/reduce.cuh", old, old.replace("__syncthreads();", "")))
    found = []
    for order in (0, 1):
        with kernels.device(order=order):
            found.append(run_everything(kernels.ops, "rms_norm"))
    assert not equal(*found)


def test_divergent_barrier_is_caught() -> None:
    write = "partial[threadIdx.x / kWarp] = value;"
    old = f"    if (threadIdx.x % kWarp == 0) {write}\n    __syncthreads();"
    new = f"    if (threadIdx.x % kWarp == 0) {{ {write} __syncthreads(); }}"
    kernels = cuda_on_host.Kernels(with_bug("cuda/reduce.cuh", old, new))
    with pytest.raises(RuntimeError, match="divergent synchronisation"):
        run_everything(kernels.ops, "rms_norm")


def test_store_out_of_bounds_is_caught() -> None:
    old = "if (j < count) cuda::store<Width, cache>"
    kernels = cuda_on_host.Kernels(with_bug("cuda/vector.cuh", old, old.removeprefix("if (j < count) ")))
    with pytest.raises(RuntimeError, match="out-of-bounds write"):
        run_everything(kernels.ops, "rms_norm")


def test_counters_not_zeroed_is_caught() -> None:
    old = "if (parameters || project) device.zero(a.counters, counters.numel() * sizeof(unsigned));"
    kernels = cuda_on_host.Kernels(with_bug("cuda/row_norm_backward.cuh", old, ""))
    assert run_everything(kernels.ops, "rms_norm")[-1].isnan().all()


def test_declared_shared_memory_forgotten_is_caught() -> None:
    kernels = cuda_on_host.Kernels(with_bug("cuda/launch.cuh", "(48 << 10) - kStaticShared", "48 << 10"))
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        past_48_kb(kernels.ops)


def test_load_out_of_bounds_is_caught() -> None:
    """A stray read whose value is not used shows to AddressSanitizer alone."""
    asan = subprocess.check_output([build.compiler(), "-print-file-name=libasan.so"], text=True).strip()
    if not Path(asan).is_absolute():
        pytest.skip("AddressSanitizer is not installed")
    old = "if (j < count) cuda::load<Width, cache>"
    path = with_bug("cuda/vector.cuh", old, old.removeprefix("if (j < count) "), asan=True)
    code = f"import test_cuda_on_host as t; t.run_everything(t.cuda_on_host.Kernels({str(path)!r}).ops, 'rms_norm')"
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    env = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": options, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert run.returncode != 0, run.stdout
    # What lies beyond the tensor is no allocation, or one that is gone.
    assert re.search("AddressSanitizer: heap-(buffer-overflow|use-after-free)", run.stderr), run.stderr[-2000:]
