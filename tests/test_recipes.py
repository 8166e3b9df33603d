"""recipes: which parameter is decayed, what counts as a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fusedtricks import optim, recipes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LayerNorm(2))
        self.embedding = nn.Embedding(5, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(2, 2, bidirectional=True)
        self.head = nn.Linear(2, 5)
        self.head.weight = self.embedding.weight  # tied: once
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def names(group: dict) -> set[str]:
    return {name for name, _ in group["params"]}


def test_biases_and_normalizations_are_not_decayed() -> None:
    decayed, kept = recipes.param_groups(Model(), 0.1)
    assert names(decayed) == {
        *("token", "body.0.weight", "body.2.weight", "embedding.weight", "attention.in_proj_weight"),
        *("attention.out_proj.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l0_reverse"),
        "rnn.weight_hh_l0_reverse",
    }
    assert all("bias" in n or n.startswith(("body.1", "body.3")) for n in names(kept))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_by_module_and_by_name() -> None:
    groups = recipes.param_groups(Model(), 0.1, no_decay_modules=(nn.Embedding,), no_decay_names=["^token$"])
    assert {"embedding.weight", "token"} <= names(groups[1])
    assert "weight_decay 0.1: 8 tensors" in str(groups)
    with pytest.raises(ValueError, match="no parameter's name matches tokens"):
        recipes.param_groups(Model(), 0.1, no_decay_names=["tokens"])
    with pytest.raises(ValueError, match="expected weight_decay >= 0"):
        recipes.param_groups(Model(), -1.0)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        recipes.param_groups(nn.ReLU(), 0.1)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_biases_of_cells(cell: type[nn.Module]) -> None:
    decayed, kept = recipes.param_groups(cell(2, 3), 0.1)
    assert (names(decayed), names(kept)) == ({"weight_ih", "weight_hh"}, {"bias_ih", "bias_hh"})


def test_biases_of_keys_and_values() -> None:
    decayed, kept = recipes.param_groups(nn.MultiheadAttention(4, 2, add_bias_kv=True), 0.1)
    assert names(decayed) == {"in_proj_weight", "out_proj.weight"}
    assert names(kept) == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}


@pytest.mark.parametrize("nested", [False, True])
def test_parametrized_parameters(nested: bool) -> None:
    """They are what they stand for; parameters of the parametrization are not."""
    linear, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    parametrizations.weight_norm(linear, "weight")
    parametrizations.weight_norm(linear, "bias")
    parametrize.register_parametrization(norm, "weight", nn.Linear(2, 2))
    start = "0." if nested else ""
    decayed, kept = recipes.param_groups(nn.Sequential(linear) if nested else linear, 0.1)
    assert names(decayed) == {f"{start}parametrizations.weight.original{i}" for i in (0, 1)}
    assert names(kept) == {f"{start}parametrizations.bias.original{i}" for i in (0, 1)}
    for excluded in (f"^{start}weight$", r"weight\.original1$"):
        kept = recipes.param_groups(nn.Sequential(linear) if nested else linear, 0.1, no_decay_names=[excluded])[-1]
        assert f"{start}parametrizations.weight.original1" in names(kept)
    decayed, kept = recipes.param_groups(nn.Sequential(norm) if nested else norm, 0.1)
    assert names(decayed) == {f"{start}parametrizations.weight.0.weight"}
    assert f"{start}parametrizations.weight.original" in names(kept)
    for part in (linear.parametrizations, linear.parametrizations["bias"]):  # without the module that owns them
        assert sum(len(names(group)) for group in recipes.param_groups(part, 0.1)) == len(list(part.parameters()))


def test_shared_parameters_are_excluded_by_any_name_and_module() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 5, bias=False), "embedding": nn.Embedding(5, 2)})
    model["embedding"].weight = model["head"].weight
    for excluded in ({"no_decay_modules": (nn.Embedding,)}, {"no_decay_names": ["embedding"]}):
        (kept,) = recipes.param_groups(model, 0.1, **excluded)
        assert (kept["weight_decay"], names(kept)) == (0.0, {"head.weight"})
    model["again"] = model["head"]
    (kept,) = recipes.param_groups(model, 0.1, no_decay_names=["^again"])
    assert (kept["weight_decay"], names(kept)) == (0.0, {"head.weight"})
    plain = nn.Module()
    plain.scale = nn.Parameter(torch.ones(2))
    plain.norm = nn.LayerNorm(2, bias=False)
    plain.norm.weight = plain.scale
    assert [group["weight_decay"] for group in recipes.param_groups(plain, 0.1)] == [0.0]
    plain.norm.bias = plain.norm.weight  # two names in one module
    assert len(recipes.param_groups(plain, 0.1, no_decay_names=[r"norm\.bias"])[0]["params"]) == 1


def test_one_string_is_not_patterns() -> None:
    with pytest.raises(TypeError, match="expected an iterable of patterns as no_decay_names, got 'weight'"):
        recipes.param_groups(Model(), 0.1, no_decay_names="weight")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_summary_of_uninitialized_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    groups = recipes.param_groups(model, 0.1)
    first, *rest = str(groups).splitlines()
    assert first == "weight_decay 0.1: 2 tensors, 6 parameters, 1 uninitialized"
    assert [line.split() for line in rest if "1.weight" in line] == [["1.weight", "uninitialized"]]
    model(torch.zeros(1, 2))
    assert "uninitialized" not in str(groups)


def test_zero_init_residual_takes_blocks_not_a_module() -> None:
    block = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)))
    for module in (block, nn.Linear(3, 3), nn.ModuleDict({"block": block})):
        with pytest.raises(TypeError, match=f"expected an iterable of blocks, got a {type(module).__name__}"):
            recipes.zero_init_residual(module)
    assert block[0][1].weight.sum() == block[1][1].weight.sum() == 3
    assert recipes.zero_init_residual(nn.ModuleList([block])) == 1
    assert (block[0][1].weight.sum(), block[1][1].weight.sum()) == (3, 0)


def test_optimizers_take_them() -> None:
    model = Model()
    for module in (optim, torch.optim):
        optimizer = module.AdamW(recipes.param_groups(model, 0.1), lr=0.1)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
        optimizer.step()
