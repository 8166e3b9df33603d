"""How far one step of an optimizer is from float64: what tests bound and `python -m bench --accuracy` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
STEPS, BETAS2 = (1, 10, 1000, 100_000), (0.999, 0.99999)
# The other moments are of squares; that of the mean gradient is below their root, as it must be.
SIGNED = {"exp_avg": 1.0, "momentum_buffer": 1.0, "grad_avg": 0.02}


def one_update(make: Make, rule: Any, t: int, dtype: torch.dtype, device: str = "cpu", size: float = 0.1) -> Tensor:
    """Step t of parameters that are zero, so that they show the update, from moments that float32 holds."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, generator=generator) * size  # noqa: E731
    p = torch.nn.Parameter(torch.zeros(20_000, dtype=dtype, device=device))
    p.grad = draw().to(p)
    optimizer = make([p])
    group, state = optimizer.param_groups[0], optimizer.state[p]
    for name, used in zip(rule.states, rule.uses(group), strict=True):
        moment = draw() * SIGNED[name] if name in SIGNED else draw().square() + 0.01 * size**2
        if used:
            state[name] = (moment * (t > 1)).to(p)
    if rule.counts:
        state["step"] = torch.tensor(float(t - 1), device=device)
    if rule.factor:
        mu = lambda s: group["betas"][0] * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"]))  # noqa: E731
        product = torch.tensor(float(math.prod(mu(s) for s in range(1, min(t, 2000)))))
        state[rule.factor] = product.to(p)  # in double, torch's product does not round the truth
    optimizer.step()
    return p.detach().double().cpu()


def median_error(update: Tensor, truth: Tensor) -> float:
    return ((update - truth) / truth).abs().median().item()


def decay_error(make: Make, device: str = "cpu") -> float:
    """Of bfloat16 weights of 1 after 1000 steps of nothing but lr weight_decay = 1e-4, which leave 0.9048."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))
    p.grad = torch.zeros_like(p)
    optimizer = make([p])
    for _ in range(1000):
        optimizer.step()
    return abs(p.detach().double().mean().item() / (1 - 1e-4) ** 1000 - 1)
