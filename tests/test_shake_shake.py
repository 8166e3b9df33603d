"""S1: shake-shake draws alpha forward and an independent beta backward, and neither in eval."""

from __future__ import annotations

import pytest
import torch
from sweep import INTERPRETED
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedtricks

shake_shake = fusedtricks.functional.shake_shake
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")


def branches(N: int = 64) -> tuple[Tensor, Tensor]:
    return torch.ones(N, 3, requires_grad=True), torch.zeros(N, 3, requires_grad=True)


def test_eval_is_the_mean() -> None:
    x1, x2 = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    before = torch.get_rng_state()
    y = shake_shake(x1, x2, False)
    torch.testing.assert_close(y, (x1 + x2) / 2)
    for grad in torch.autograd.grad(y.sum(), (x1, x2)):
        assert torch.equal(grad, torch.full((5, 7), 0.5))
    assert torch.equal(torch.get_rng_state(), before)
    double = [t.detach().double().requires_grad_() for t in (x1, x2)]
    assert torch.autograd.gradcheck(lambda a, b: shake_shake(a, b, False), double)
    assert torch.autograd.gradgradcheck(lambda a, b: shake_shake(a, b, False), double)


@pytest.mark.parametrize("per_sample", [True, False])
def test_alpha_and_beta(per_sample: bool) -> None:
    x1, x2 = branches(4096)
    y = shake_shake(x1, x2, True, per_sample)
    alpha = y[:, 0].detach()
    first, second = (torch.autograd.grad(y.sum(), (x1, x2), retain_graph=True) for _ in range(2))
    for g1, g2 in (first, second):
        torch.testing.assert_close(g1 + g2, torch.ones(4096, 3))
        assert torch.equal(g1[:, 0], g1[:, 2])
    betas = [first[0][:, 0], second[0][:, 0]]
    if per_sample:
        for draw in (alpha, *betas):
            assert abs(draw.mean() - 0.5) < 5 * (1 / 12 / 4096) ** 0.5
            assert abs(draw.var() * 12 - 1) < 0.1
        for a, b in ((alpha, betas[0]), (alpha, betas[1]), (betas[0], betas[1])):
            assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 5 / 64
    else:
        assert alpha.unique().numel() == betas[0].unique().numel() == 1
        assert len({alpha[0].item(), betas[0][0].item(), betas[1][0].item()}) == 3
    assert not torch.equal(shake_shake(x1, x2, True, per_sample), y)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_keeps_alpha(use_reentrant: bool) -> None:
    seen = []
    x1, x2 = branches()

    def block(a: Tensor, b: Tensor) -> Tensor:
        y = shake_shake(a, b)
        seen.append(y.detach().clone())
        return y.exp().log()  # which saves something, or nothing would be recomputed

    checkpoint(block, x1, x2, use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    torch.testing.assert_close(x1.grad + x2.grad, torch.ones(64, 3))


def test_transforms() -> None:
    x1, x2 = (t.detach() for t in branches(6))
    value, vjp = torch.func.vjp(lambda a, b: shake_shake(a, b), x1, x2)
    g1, g2 = vjp(torch.ones(6, 3))
    torch.testing.assert_close(g1 + g2, torch.ones(6, 3))
    assert not torch.allclose(g1, value)


def test_module_and_errors() -> None:
    module = fusedtricks.nn.ShakeShake(per_sample=False)
    x1, x2 = branches()
    assert module(x1, x2).unique().numel() == 1
    assert (module.eval()(x1, x2) == 0.5).all()
    assert repr(module) == "ShakeShake(per_sample=False)"
    generator = torch.Generator().manual_seed(1)
    first = shake_shake(x1, x2, generator=generator)
    assert torch.equal(shake_shake(x1, x2, generator=generator.manual_seed(1)), first)
    for bad in ((x1, x2[:2]), (x1, x2.double()), (x1.long(), x2.long()), (torch.tensor(1.0), torch.tensor(1.0))):
        with pytest.raises(RuntimeError, match="shake_shake"):
            shake_shake(*bad)
