"""Shapes are (size of x (N, C, *),); what else there is to choose, the options say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedtricks
from cases import Adversary, Case, Shape
from cases._norm import DTYPES, randn, truth_noise

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


def eager(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
) -> Tensor:
    """batch_norm_act in torch's own operations; parameters of 16 bits go in as fp32, which is how torch keeps them."""
    if x.dtype in (torch.bfloat16, torch.float16):
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
    z = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def call(
    fn: Any,
    t: list[Tensor],
    training: bool = True,
    residual: str = "",
    activation: str = "identity",
    eps: float = 1e-5,
    tracked: bool = True,
) -> Tensor:
    """Running statistics of values that every dtype has; the residual is made of x, so its gradient is in dx."""
    x, weight, bias = t
    running = (None, None)
    if tracked or not training:
        index = torch.arange(x.shape[1], device=x.device)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        running = ((index % 7 - 3).to(wide) / 4, (index % 4 + 2).to(wide) / 4)
    other = {"": None, "itself": x, "another": x.flip(0)}[residual]
    return fn(x, *running, weight, bias, other, training, 0.1, eps, activation)


SHAPES: dict[str, Shape] = {
    "two samples": ((2, 3),),
    "narrow rows": ((65, 3),),
    "rows of a few vectors": ((37, 40),),
    "rows around 64 channels": ((9, 65),),
    "65537 narrow rows, past a 16-bit grid": ((65537, 3),),
    "rows past a block of rows": ((300, 72),),
    "more channels than a block": ((4, 2100),),
    "one channel": ((6, 1, 3, 4),),
    "one channel of rows": ((40, 1),),
    "3-D": ((6, 5, 7),),
    "3-D, short runs": ((9, 20, 3),),
    "4-D": ((4, 6, 5, 7),),
    "4-D, whole vectors": ((3, 8, 8, 8),),
    "4-D, one pixel": ((8, 20, 1, 1),),
    "4-D, pixels inside a vector": ((4, 24, 2, 2),),
    "4-D, 7x7": ((3, 70, 7, 7),),
    "4-D, short planes of many samples": ((11, 40, 4, 5),),
    "4-D, groups of channels": ((5, 26, 9, 8),),
    "4-D, few channels, channel past a chunk": ((1, 2, 150, 151),),
    "4-D, many short planes past a chunk": ((250, 2, 13, 13),),
    "one image": ((1, 5, 9, 11),),
    "5-D": ((2, 6, 3, 4, 5),),
    "no samples": ((0, 4, 3, 3),),
    "no pixels": ((4, 3, 0, 3),),
}
# The true dx of two samples is almost zero: rstd, at most 1 / sqrt(eps), times the rounding of what cancels.
# The same gradient for every sample makes dweight the sum of x^: zero but for the rounding of up to thousands of terms.
AMPLIFIED = {"two samples": 320.0, "dy expanded scalar": 128.0, "dy expanded rows": 128.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "eps=0.3": {"eps": 0.3},
    "untracked": {"tracked": False},
    "eval": {"training": False},
    **{a: {"activation": a} for a in ACTIVATIONS if a != "identity"},
    **{f"eval {a}": {"activation": a, "training": False} for a in ("relu", "silu")},
    "added": {"residual": "another"},
    **{f"added {a}": {"residual": "another", "activation": a} for a in ACTIVATIONS if a != "identity"},
    "added itself relu": {"residual": "itself", "activation": "relu"},
    "eval added relu": {"residual": "another", "activation": "relu", "training": False},
    "eval added gelu": {"residual": "another", "activation": "gelu", "training": False},
}

PLANES, SHORT_PLANES, ROWS = ((6, 5, 9, 14),), ((27, 6, 4, 7),), ((769, 6),)


def shifted(shape: Shape, mean: float) -> Adversary:
    """E[x^2] - E[x]^2, or a padding lane that enters the sums, shows at a mean far from zero."""
    dtypes = tuple(d for d in DTYPES if mean < torch.finfo(d).max)
    return Adversary(shape, lambda x, *rest: (x + mean, *rest), noise=truth_noise(mean), dtypes=dtypes)


def scaled(shape: Shape, scale: float) -> Adversary:
    """Squares overflow fp32 from 1e19 on."""
    return Adversary(shape, lambda x, *rest: (x * scale, *rest), dtypes=(torch.float32, torch.bfloat16))


def some_channels_huge(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    factors = torch.tensor([1.0, 1e25, 1e-3, 1e30, 1e2, 1.0], dtype=x.dtype)[: x.shape[1]]
    return x * factors.reshape(-1, *(1,) * (x.dim() - 2)), *rest


def first_samples_far_off(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """A shift taken from the first samples is then a bad one."""
    x = x + 1e4
    x[:2] = -1e3
    return x, *rest


def gamma_zero_or_negative(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """A backward that recovers x^ from y divides by gamma."""
    weight = weight.clone()
    weight[::3], weight[1::3] = 0, -weight[1::3].abs()
    return x, weight, bias


def constant(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return x * 0 + x.transpose(0, 1).flatten(1).mean(1).reshape(1, -1, *(1,) * (x.dim() - 2)), *rest


# Sums of a million products of both signs, about 1000 in size, that cancel to any smaller value.
ADVERSARIES = {
    f"{name}, {where}": adversary
    for where, shape in (("planes", PLANES), ("short planes", SHORT_PLANES), ("rows", ROWS))
    for name, adversary in {
        **{f"mean {mean:.0e}": shifted(shape, mean) for mean in (0, 1e1, 1e2, 1e3, 1e4, 1e5)},
        **{f"values of {scale:.0e}": scaled(shape, scale) for scale in (1e18, 1e20, 1e30)},
        "some channels huge": Adversary(shape, some_channels_huge, dtypes=(torch.float32, torch.bfloat16)),
        "first samples far off": Adversary(shape, first_samples_far_off, noise=truth_noise(1e4), bound=4e-6),
        "constant channels": Adversary(shape, constant, noise=truth_noise(10), dtypes=DTYPES[:3]),
        "gamma zero or negative": Adversary(shape, gamma_zero_or_negative),
        "fp16 sums past 65504": Adversary(shape, lambda x, *rest: (x * 300, *rest)),
    }.items()
} | {
    "one million pixels": Adversary(
        ((1, 1, 1001, 1001),), lambda x, *rest: (x + 10, *rest), noise=5e-4, dtypes=(torch.float32,)
    ),
    "150000 rows": Adversary(((150_001, 3),), lambda x, *rest: (x + 10, *rest), noise=5e-4, dtypes=(torch.float32,)),
}

CASE = Case(
    fn=fusedtricks.functional.batch_norm_act,
    torch_fn=eager,
    names=("x", "weight", "bias"),
    optional=("weight", "bias"),
    inputs=lambda size: (randn(*size), randn(size[1]), randn(size[1])),
    call=call,
    shapes=SHAPES,
    amplified=AMPLIFIED,
    shape="4-D",
    layout_shapes=("rows past a block of rows", "3-D", "4-D", "5-D"),
    small={"planes": ((3, 2, 4),), "rows": ((5, 3),)},
    large={
        "planes": ((5, 3, 77, 79),),
        "many planes": ((64, 70, 7, 7),),
        "rows": ((4099, 33),),
        "wide rows": ((37, 4097),),
    },
    growing=(((3, 5, 7),), ((7, 5, 7),), ((129, 5, 7),)),
    gpu={
        **{name: SHAPES[name] for name in ("4-D", "rows past a block of rows", "4-D, whole vectors", "5-D")},
        "channels that take a block more than 48 KB": ((16, 512, 28, 28),),
        "channels too few for blocks of their own": ((5, 3, 77, 79),),
    },
    rowwise=False,
    options=OPTIONS,
    adversaries=ADVERSARIES,
    modules=(
        (fusedtricks.nn.BatchNorm1d, torch.nn.BatchNorm1d),
        (fusedtricks.nn.BatchNorm2d, torch.nn.BatchNorm2d),
        (fusedtricks.nn.BatchNorm3d, torch.nn.BatchNorm3d),
    ),
)
