"""First and second derivatives against finite differences, in fp64."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case
from sweep import Target, forced, functions_alone, subsets, targets
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedtricks import MixedTarget
from fusedtricks import functional as F

RUNS = [
    pytest.param(stem, absent, size, target, id=f"{stem}-{target}-{size}{''.join(f'-no {a}' for a in absent)}")
    for stem, case in CASES.items()
    for absent in subsets(case.optional)
    for size in case.small
    for target in targets(case)
    if target.backend != "triton"  # no fp64
]

Call = Callable[..., Tensor]
LABELS, OTHER = torch.arange(6) % 5, torch.arange(6).flip(0) % 5
# Of x (6, 5) and w (5, 5).
LOSSES: dict[str, Call] = {
    "cross_entropy": lambda x, w, of: F.cross_entropy(x @ w, LABELS, reduction=of),
    "cross_entropy, inplace_backward": lambda x, w, of: F.cross_entropy(
        x @ w, LABELS, reduction=of, inplace_backward=True
    ),
    "cross_entropy of probabilities": lambda x, w, of: F.cross_entropy(x, (x @ w).softmax(1), reduction=of),
    "linear_cross_entropy": lambda x, w, of: F.linear_cross_entropy(x, w, LABELS, reduction=of, chunk=4),
    "linear_cross_entropy of pairs": lambda x, w, of: F.linear_cross_entropy(
        x, w, MixedTarget(LABELS, OTHER, x[:, 0].sigmoid()), reduction=of, chunk=4
    ),
    "distillation_loss": lambda x, w, of: F.distillation_loss(x, x @ w, LABELS, 2.0, reduction=of),
}


def function(case: Case, absent: tuple[str, ...], size: str, device: str) -> tuple:
    shape, *rest = case.small[size]
    tensors = [t.to(device) for t in case.inputs(shape, *rest)]
    present = [i for i, name in enumerate(case.names) if name not in (*absent, *case.fixed)]

    def call(*given: Tensor) -> Tensor:
        full = [t if name in case.fixed else None for name, t in zip(case.names, tensors, strict=True)]
        for i, t in zip(present, given, strict=True):
            full[i] = t
        return case.call(case.fn, full, *rest)

    return call, [tensors[i].requires_grad_() for i in present]


@pytest.mark.parametrize(("stem", "absent", "size", "target"), RUNS)
def test_gradcheck(stem: str, absent: tuple[str, ...], size: str, target: Target) -> None:
    call, tensors = function(CASES[stem], absent, size, target.device)
    with forced(target):
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_of_the_default(stem: str, create_graph: bool) -> None:
    """create_graph=True gives the same first gradients as the kernel, and gradients that have a graph."""
    case = CASES[stem]
    first = next(iter(case.small))
    torch.manual_seed(3)
    call, tensors = function(case, (), first, "cpu")
    torch.manual_seed(3)
    theirs = [
        t if n in case.fixed else t.clone() for n, t in zip(case.names, case.inputs(*case.small[first]), strict=True)
    ]
    [t.requires_grad_() for n, t in zip(case.names, theirs, strict=True) if n not in case.fixed]
    reference = case.call(case.torch_fn, theirs, *case.small[first][1:])
    theirs = [t for n, t in zip(case.names, theirs, strict=True) if n not in case.fixed]
    dy = torch.randn_like(reference).requires_grad_()  # the gradient of bias depends on nothing else
    ours = torch.autograd.grad(call(*tensors), tensors, dy, create_graph=create_graph)
    expected = torch.autograd.grad(reference, theirs, dy, create_graph=True)
    torch.testing.assert_close(ours, tuple(e.detach() for e in expected), rtol=1e-11, atol=1e-11)
    assert [g.requires_grad for g in ours] == [create_graph] * len(ours)
    if create_graph:
        penalty, their_penalty = (sum(g.square().sum() for g in grads) for grads in (ours, expected))
        torch.testing.assert_close(
            torch.autograd.grad(penalty, tensors, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(their_penalty, theirs, allow_unused=True, materialize_grads=True),
            rtol=1e-10,
            atol=1e-10,
        )


def gradients_of(
    call: Call, given: list[Tensor], wanted: list[Tensor], create_graph: bool, again: bool
) -> list[Tensor]:
    torch.manual_seed(3)
    y = checkpoint(call, *given, use_reentrant=False) if again else call(*given)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph)
    return [*first, *(torch.autograd.grad(sum(g.sum() for g in first), wanted) if create_graph else ())]


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("in_python", [False, True])
def test_checkpointed(stem: str, create_graph: bool, in_python: bool) -> None:
    """Non-reentrant checkpointing gives what a node saved away once."""
    call, tensors = function(CASES[stem], (), next(iter(CASES[stem].small)), "cpu")
    with functions_alone() if in_python else contextlib.nullcontext():
        made = [gradients_of(call, tensors, tensors, create_graph, again) for again in (False, True)]
    torch.testing.assert_close(*made, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed_losses(name: str, create_graph: bool, reduction: str) -> None:
    torch.manual_seed(4)
    x, w = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((6, 5), (5, 5)))
    made = [
        gradients_of(lambda x, w: LOSSES[name](x, w, reduction), [x, w], [x, w], create_graph, again)
        for again in (False, True)
    ]
    torch.testing.assert_close(*made, rtol=0, atol=0)
