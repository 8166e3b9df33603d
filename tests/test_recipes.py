"""recipes.param_groups: which parameter is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


def test_optimizers_take_them() -> None:
    model = Model()
    for module in (optim, torch.optim):
        optimizer = module.AdamW(recipes.param_groups(model, 0.1), lr=0.1)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
        optimizer.step()
