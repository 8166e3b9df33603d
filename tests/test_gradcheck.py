"""First and second derivatives against finite differences, in fp64."""

import pytest
import torch
from cases import CASES, Case
from sweep import Target, forced, subsets, targets
from torch import Tensor

RUNS = [
    pytest.param(stem, absent, size, target, id=f"{stem}-{target}-{size}{''.join(f'-no {a}' for a in absent)}")
    for stem, case in CASES.items()
    for absent in subsets(case.optional)
    for size in case.small
    for target in targets(case)
    if target.backend != "triton"  # no fp64
]


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
