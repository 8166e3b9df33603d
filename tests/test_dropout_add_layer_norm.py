"""dropout_add_layer_norm against the operations it fuses, rms included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from parity import assert_bitwise_equal, assert_no_worse
from sweep import INTERPRETED, forced, targets

import fusedtricks
from fusedtricks.ops.dropout import keep_of, kept

F = fusedtricks.functional
TARGETS = pytest.mark.parametrize("target", targets(CASES["dropout_add_layer_norm"]), ids=str)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")


def seeded(fn, *args, **kwargs):
    torch.manual_seed(5)
    return fn(*args, **kwargs)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
def test_parts(target, dtype: torch.dtype, rms: bool) -> None:
    """The sum is dropout's mask and one rounding, y is the norm of it, bit for bit; fp32 parameters of 16-bit rows."""
    x, residual = (torch.randn(7, 300, device=target.device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(300, device=target.device) for _ in range(2))
    with forced(target):
        y, z = seeded(
            F.dropout_add_layer_norm, x, residual, weight, None if rms else bias, 0.3, 1e-3, prenorm=True, rms=rms
        )
        want = F.rms_norm(z, (300,), weight, 1e-3) if rms else F.layer_norm(z, (300,), weight, bias, 1e-3)
        mask = seeded(F.dropout, torch.ones_like(x), 0.3) != 0
    assert_bitwise_equal(y, want)
    exact = torch.where(mask, x.double() * (65536 / keep_of(0.3)), 0) + residual.double()
    assert_no_worse(z, exact.to(dtype), exact.cpu(), name="z")


@TARGETS
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("outputs", ["y", "z", "both"])
def test_gradients(target, rms: bool, outputs: str) -> None:
    tensors = [torch.randn(s, device=target.device, requires_grad=True) for s in ((9, 33), (9, 33), (33,), (33,))]
    wanted = tensors[:3] if rms else tensors
    dy, dz = (torch.randn(9, 33, device=target.device) for _ in range(2))

    def loss(pair):
        return (pair[0] * dy).sum() * (outputs != "z") + (pair[1] * dz).sum() * (outputs != "y")

    def fused(t, **options):
        return F.dropout_add_layer_norm(t[0], t[1], t[2], None if rms else t[3], 0.4, prenorm=True, rms=rms, **options)

    def parts(t):
        z = torch.where(mask, t[0] * (65536 / keep_of(0.4)), 0) + t[1]
        norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        return norm(z, (33,), *(t[2:3] if rms else t[2:]), 1e-5), z

    mask = seeded(F.dropout, torch.ones(9, 33, device=target.device), 0.4) != 0
    with forced(target):
        ours = torch.autograd.grad(loss(seeded(fused, tensors)), wanted, materialize_grads=True, allow_unused=True)
    theirs = torch.autograd.grad(loss(parts(tensors)), wanted, materialize_grads=True, allow_unused=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy, dz = dy.double(), dz.double()
    truth = torch.autograd.grad(loss(parts(exact)), exact[: len(wanted)], materialize_grads=True, allow_unused=True)
    for a, b, t, name in zip(ours, theirs, truth, ("dx", "dresidual", "dweight", "dbias"), strict=False):
        assert_no_worse(a, b, t.cpu(), name=name)


def test_nothing_random() -> None:
    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    before = torch.get_rng_state()
    want = F.layer_norm(x + residual, (8,), weight)
    for options in ({"p": 0.0}, {"training": False}):
        assert_bitwise_equal(F.dropout_add_layer_norm(x, residual, weight, None, **options), want)
    assert torch.equal(torch.get_rng_state(), before)
    only = F.dropout_add_layer_norm(x, residual, weight, None, p=1.0)
    assert_bitwise_equal(only, F.layer_norm(residual, (8,), weight))


def test_no_mask_is_kept() -> None:
    x, residual, weight = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128), torch.randn(128)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        F.dropout_add_layer_norm(x, residual, weight, None, 0.5)
    assert sorted(sizes) == [1, 128, 3 * 64, 64 * 128]


def test_mixed_dtypes_and_errors() -> None:
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    assert F.dropout_add_layer_norm(x, residual, None, None).dtype == torch.float32
    for error, args, options in (
        (ValueError, (residual, residual, None, None, 1.1), {}),
        (ValueError, (residual, residual, None, torch.ones(8)), {"rms": True}),
        (RuntimeError, (residual, residual[:2], None, None), {}),
        (RuntimeError, (residual, residual, torch.ones(7), None), {}),
        (NotImplementedError, (residual.long(), residual.long(), None, None), {}),
    ):
        with pytest.raises(error):
            F.dropout_add_layer_norm(*args, **options)


def test_module() -> None:
    module = fusedtricks.nn.DropoutAddLayerNorm(8, 0.3, prenorm=True)
    norm = torch.nn.LayerNorm(8)
    assert list(module.state_dict()) == list(norm.state_dict())
    x, residual = torch.randn(4, 8), torch.randn(4, 8)
    y, z = seeded(module, x, residual)
    assert torch.equal(z == residual, ~kept_by_seed(x))
    torch.testing.assert_close(y, norm(z))
    assert torch.equal(module.eval()(x, residual)[1], x + residual)
    assert "p=0.3" in repr(module)
    assert list(fusedtricks.nn.DropoutAddLayerNorm(8, rms=True).state_dict()) == ["weight"]


def kept_by_seed(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    return kept(x.shape, torch.randint(-(2**63), 2**63 - 1, (1,)), keep_of(0.3), 1)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_second_derivatives_of_permuted_input(rms: bool, prenorm: bool) -> None:
    """Through the sum, which is then a copy of what the kernel made."""
    x = torch.randn(3, 2, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    residual = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def composed() -> Any:
        z = x + residual
        y = torch.nn.functional.rms_norm(z, (4,), eps=1e-5) if rms else torch.nn.functional.layer_norm(z, (4,))
        return (y, z) if prenorm else y

    ours = lambda: fusedtricks.functional.dropout_add_layer_norm(  # noqa: E731
        x, residual, None, None, 0.0, prenorm=prenorm, rms=rms
    )
    results = []
    for f in (ours, composed):
        ys = f()
        first = torch.autograd.grad(
            sum(y.pow(3).sum() for y in (ys if prenorm else (ys,))), (x, residual), create_graph=True
        )
        results.append((*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, residual))))
    torch.testing.assert_close(*results)
