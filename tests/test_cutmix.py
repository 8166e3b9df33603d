"""cutmix and its module: boxes, the lam of their areas, targets, errors."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from sweep import INTERPRETED, forced, targets

import fusedtricks
from fusedtricks.ops.cutmix import draw_box

cutmix = fusedtricks.functional.cutmix
BACKENDS = pytest.mark.parametrize("target", targets(CASES["cutmix"]), ids=str)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")


@pytest.mark.parametrize("shape", [(), (20_000,)])
def test_boxes(shape: tuple[int, ...]) -> None:
    """M4: inside the image, of the area that lam says, which is the wanted one unless the box was clipped."""
    H, W = 33, 70
    wanted = torch.rand(shape)
    box, lam = draw_box(wanted, H, W)
    top, bottom, left, right = box.unbind(-1)
    for edge, limit in ((top, H), (bottom, H), (left, W), (right, W)):
        assert ((edge >= 0) & (edge <= limit)).all()
    area = (bottom - top) * (right - left)
    assert (area >= 0).all()
    torch.testing.assert_close(1 - lam.reshape(-1), area.float() / (H * W))
    free = (top > 0) & (bottom < H) & (left > 0) & (right < W)
    assert ((1 - wanted.reshape(-1))[free] - area[free] / (H * W)).abs().max() < 0.1 if free.any() else True
    nothing, one = draw_box(torch.ones(()), H, W)
    assert one == 1
    assert nothing[0, 0] == nothing[0, 1]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_dtype(target, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randint(0, 2 if dtype == torch.bool else 99, (5, 3, 8, 9)).to(target.device, dtype, memory_format=layout)
    perm, box = torch.randperm(5, device=x.device), torch.tensor([[1, 5, 2, 9]], device=x.device).expand(5, 4)
    with forced(target):
        y, mixed = cutmix(x, torch.arange(5, device=x.device), 0.5, perm, box=box)
    want = x.clone()
    want[:, :, 1:5, 2:9] = x[perm][:, :, 1:5, 2:9]
    assert torch.equal(y, want)
    assert y.stride() == x.stride()
    torch.testing.assert_close(mixed.lam, torch.full((5,), 1 - 28 / 72, device=x.device))
    assert torch.equal(mixed.b, perm)


def test_a_box_over_the_edge_is_clipped() -> None:
    x, perm = torch.randn(2, 1, 4, 4), torch.tensor([1, 0])
    y, mixed = cutmix(x, torch.arange(2), 0.1, perm, box=torch.tensor([-3, 2, 1, 99]))
    assert torch.equal(y[:, :, :2, 1:], x[perm][:, :, :2, 1:])
    assert mixed.lam == 1 - 6 / 16


def test_errors() -> None:
    x, perm = torch.randn(3, 4, 4), torch.tensor([1, 2, 0])
    for message, args, options in (
        ("images", (torch.randn(3, 4), None, 0.5, perm), {}),
        ("box to be int64", (x, None, 0.5, perm), {"box": torch.zeros(4)}),
        ("box to be int64", (x, None, 0.5, perm), {"box": torch.zeros(2, 4, dtype=torch.int64)}),
        ("permutation", (x, None, 0.5, perm[:2]), {}),
        ("not a permutation", (x, None, 0.5, torch.tensor([0, 0, 1])), {}),
        ("a target for each", (x, torch.zeros(2), 0.5, perm), {}),
        (r"lam in \[0, 1\], but got 1.5", (x, None, torch.tensor([0.5, 1.5, 0.5]), perm), {}),
        (r"lam in \[0, 1\], but got -0.5", (x, None, torch.tensor(-0.5), perm), {"box": torch.tensor([0, 1, 0, 1])}),
        (r"lam in \[0, 1\], but got nan", (x, None, torch.tensor(torch.nan), perm), {}),
    ):
        with pytest.raises(RuntimeError, match=message):
            cutmix(*args, **options)


def test_module() -> None:
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    module = fusedtricks.nn.CutMix(per_sample=True)
    (a, b), target = module((x, x + 1), labels)
    torch.testing.assert_close(b, a + 1)
    assert target.lam.shape == (6,)
    assert module.eval()(x, labels)[0] is x
    soft = torch.nn.functional.one_hot(labels, 6).float()
    torch.testing.assert_close(module.train()(x, soft)[1].sum(1), torch.ones(6))
