"""swap and unswap keep everything but the forward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from sweep import INTERPRETED

import fusedtricks
from fusedtricks import nn

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")


class Own(torch.nn.BatchNorm2d):
    pass


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=None),
        torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.RMSNorm(6), torch.nn.BatchNorm2d(4, affine=False)),
        Own(4),
        torch.nn.SyncBatchNorm(4).eval(),
    )


def test_forwards_are_ours_and_all_else_stays(capsys: pytest.CaptureFixture[str]) -> None:
    plain = model()
    ours = copy.deepcopy(plain)
    modules, parameters = list(ours.modules()), list(ours.parameters())
    seen = []
    ours[1].register_forward_hook(lambda *_: seen.append(1))
    done = fusedtricks.swap(ours)
    said = capsys.readouterr().out
    assert str(done) in said
    assert list(done.replaced) == ["1", "2.0", "2.1", "2.2", "4"]
    assert list(done.left) == ["3"]
    assert "subclass of BatchNorm2d" in done.left["3"]
    kinds = (nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
    assert tuple(type(ours.get_submodule(name)) for name in done.replaced) == kinds
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert [m.training for m in ours.modules()] == [m.training for m in plain.modules()]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert seen == [1]

    back = fusedtricks.unswap(ours, verbose=False)
    assert list(back.replaced) == list(done.replaced)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert not capsys.readouterr().out
    torch.testing.assert_close(ours(x), plain(x))


def test_twice_is_once() -> None:
    ours = model()
    fusedtricks.swap(ours, verbose=False)
    assert not fusedtricks.swap(ours, verbose=False).replaced


def test_the_model_itself() -> None:
    norm = torch.nn.LayerNorm(4)
    assert list(fusedtricks.swap(norm, verbose=False).replaced) == [""]
    assert type(norm) is nn.LayerNorm


def test_what_is_left_says_why() -> None:
    replaced = torch.nn.LayerNorm(4)
    replaced.forward = lambda x: x
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.LayerNorm(4), dim=None)
    done = fusedtricks.swap(torch.nn.Sequential(replaced, parametrized), verbose=False)
    assert not done.replaced
    assert "instance" in done.left["0"]
    assert "parametrized" in done.left["1"]


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module.*list"):
        fusedtricks.swap([torch.nn.LayerNorm(4)])


def test_zero_init_residual() -> None:
    block = torch.nn.Sequential(torch.nn.BatchNorm1d(3), nn.BatchNormAct1d(4))
    assert fusedtricks.recipes.zero_init_residual([block]) == 1
    assert block[1].weight.abs().sum() == 0
    assert block[0].weight.sum() == 3
    for wrong in (torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(3, affine=False)):
        with pytest.raises(ValueError, match="that has a weight"):
            fusedtricks.recipes.zero_init_residual([wrong])


@pytest.mark.filterwarnings("ignore")  # of torch, that what checks look at is constant in a trace
@pytest.mark.parametrize("training", [False, True])
def test_jit_traces_hold_torch_s_operators(training: bool) -> None:
    """Which a trace can be saved with, and which other runtimes know."""
    plain = model()[:3].train(training)
    ours = copy.deepcopy(plain)
    fusedtricks.swap(ours, verbose=False)
    ours.append(nn.BatchNormAct2d(4).train(training))
    plain.extend([torch.nn.BatchNorm2d(4).train(training), torch.nn.ReLU()])
    x = torch.randn(4, 3, 8, 8)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, x, check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert not [node for node in traced.inlined_graph.nodes() if "fusedtricks" in node.kind()]
    if training:
        plain(x)  # as the tracing itself has
        plain[1].momentum = 1.0  # which a trace holds as the number that it was
    torch.testing.assert_close(traced(x[:3]), plain(x[:3]))
    torch.testing.assert_close(list(traced.buffers()), list(plain.buffers()))


class Everything(torch.nn.Module):
    """One of each of our modules, with whatever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.5), nn.SyncBatchNorm(3).eval())
        self.residual, self.row = nn.BatchNormAct2d(3), torch.nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4))
        self.mix, self.drop, self.loss = nn.ShakeShake(), nn.DropoutAddLayerNorm(4), nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.residual(self.residual(self.image(x)), x)
        x = self.row(x)
        return self.loss(self.drop(self.mix(x, 2 * x), x), labels)


def test_fx_graphs_hold_our_modules() -> None:
    """As they hold those of torch.nn, so that train() and eval() still reach them."""
    model = Everything()
    x, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    graph = torch.fx.symbolic_trace(model)
    called = " ".join(node.target for node in graph.graph.nodes if node.op == "call_module")
    assert called == "image.0 image.1 image.2 residual residual row.0 row.1 mix drop loss"
    for training in (True, False):
        found = []
        for f in (graph, copy.deepcopy(model)):
            torch.manual_seed(0)
            found.append(f.train(training)(x, labels))
        torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(torch.fx.proxy.TraceError, match=r"LayerNorm is a leaf .* trace a module that contains it"):
        torch.fx.symbolic_trace(nn.LayerNorm(4))
