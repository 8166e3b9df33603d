"""The CUDA kernels of mixup, cutmix and shake_shake on the CPU (tests/cuda_on_host): regimes, images, in place.

Parity over the whole sweep is in test_cuda_on_host.py, sown bugs are in test_cuda_seeded_bugs.py.
"""

from __future__ import annotations

import cuda_on_host
import pytest
import sweep
import torch
from parity import assert_bitwise_equal

from fusedtricks._op import Op

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.available(), reason="needs g++ to compile csrc/cuda for the CPU"),
    pytest.mark.skipif(sweep.INTERPRETED, reason="TRITON_INTERPRET=1 tests Triton kernels"),
]
SMALL = {"processors": 3, "threads": 64, "shared": 8 << 10}  # strips of 300 samples do not fit
DEVICES = {"strips": {}, "sample by sample": SMALL}
PERMUTATIONS = {
    "random": lambda N: torch.randperm(N),
    "one cycle": lambda N: torch.arange(N).roll(1),
    "pairs": lambda N: torch.arange(N).flip(0),
    "identity": lambda N: torch.arange(N),
}


@pytest.fixture(scope="module")
def kernels() -> cuda_on_host.Kernels:
    return cuda_on_host.load()


def reference(name: str, *args: object) -> torch.Tensor:
    return Op.registry[name].implementation("reference")(*args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", PERMUTATIONS)
@pytest.mark.parametrize("size", [(1, 3), (5, 2052), (300, 17)], ids=str)
def test_in_place_is_out_of_place(kernels: cuda_on_host.Kernels, size: tuple[int, ...], kind: str, device: str) -> None:
    x, lam, perm = torch.randn(size), torch.rand(size[0]), PERMUTATIONS[kind](size[0])
    with kernels.device(**DEVICES[device]):
        y = kernels.ops["mixup_fwd"](x, lam, perm, None, None, x.dtype)
        torch.testing.assert_close(y, reference("mixup_fwd", x, lam, perm, None, None, x.dtype))
        kernels.ops["mixup_fwd_"](x, lam, perm)
    assert_bitwise_equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(5, 3, 8, 16), (260, 2, 3, 7)], ids=["vectors", "no vectors"])
def test_images(kernels, size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
    """M6: rounded once."""
    x = torch.randint(0, 256, size, dtype=torch.uint8).contiguous(memory_format=layout)
    lam, perm = torch.rand(size[0]), torch.randperm(size[0])
    scale, shift = torch.rand(size[1]), torch.randn(size[1])
    with kernels.device(**DEVICES[device]):
        y = kernels.ops["mixup_fwd"](x, lam, perm, scale, shift, dtype)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, reference("mixup_fwd", x, lam, perm, scale, shift, dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.float16, torch.int64], ids=str)
def test_cutmix_moves_every_dtype(kernels, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randint(0, 2 if dtype == torch.bool else 100, (6, 3, 8, 16)).to(dtype).contiguous(memory_format=layout)
    perm, box = torch.randperm(6), torch.tensor([[-1, 5, 3, 9]] * 5 + [[2, 9, 7, 7]])
    assert_bitwise_equal(kernels.ops["cutmix_fwd"](x, perm, box), reference("cutmix_fwd", x, perm, box))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("partner", [-1, 300, 2**40])
def test_partner_outside_the_batch(kernels: cuda_on_host.Kernels, partner: int, device: str) -> None:
    """Its sample is NaN; nothing outside is read or written, and the others are as they should be."""
    x, lam, perm = torch.randn(300, 1, 2, 8), torch.rand(300), torch.arange(300).roll(1)
    box = torch.tensor([[0, 1, 2, 3]])
    right = reference("mixup_fwd", x, lam, perm, None, None, x.dtype), reference("cutmix_fwd", x, perm, box)
    perm[7] = partner
    with kernels.device(**DEVICES[device]):
        found = kernels.ops["mixup_fwd"](x, lam, perm, None, None, x.dtype), kernels.ops["cutmix_fwd"](x, perm, box)
        kernels.ops["mixup_bwd"](x, lam, perm)
        kernels.ops["cutmix_bwd"](x, perm, box)
    for y, wanted in zip(found, right, strict=True):
        assert y[7].isnan().all()
        wanted[7] = y[7]
        torch.testing.assert_close(y, wanted, equal_nan=True)


def test_regimes(kernels: cuda_on_host.Kernels) -> None:
    """These tests reach every kernel, with vectors and without."""
    for device in DEVICES.values():
        for size in ((300, 1, 4, 16), (300, 1, 3, 5)):
            x, lam, perm, box = torch.randn(size), torch.rand(300), torch.randperm(300), torch.zeros(1, 4).long()
            with kernels.device(**device):
                y = kernels.ops["mixup_fwd"](x, lam, perm, None, None, x.dtype)
                kernels.ops["mixup_fwd"](x.byte(), lam, perm, lam[:1], lam[:1], x.dtype)
                kernels.ops["cutmix_bwd"](
                    kernels.ops["cutmix_fwd"](x, perm, box := torch.zeros(1, 4).long()), perm, box
                )
                kernels.ops["shake_shake_bwd"](kernels.ops["shake_shake_fwd"](x, y, lam), lam)
    types = ("float, float", "unsigned char, float")
    names = [f"{mix}<{T}" for mix in ("mix_columns", "mix_samples") for T in types]
    names += [f"{name}<float" for name in ("cut", "paste", "shake", "shake_backward")]
    for kernel in (f"{name}, {width}" for name in names for width in (1, 4)):
        name = f"void fusedtricks::cuda::{kernel}"
        assert any(k.startswith(name) for k in kernels.launched()), f"{name} was never launched"
