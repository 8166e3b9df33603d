"""What the tests of the optimizers share: the optimizers with all their states in use, tensors in every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedtricks import optim

# The files whose tests stand in for a Case of each optimizer, which is no function of tensors.
TESTS = (
    *("test_optim.py", "test_optim_arguments.py", "test_optim_precision.py", "test_optim_fuzz.py"),
    *("test_optim_torch.py", "test_optim_dtensor.py", "test_cuda_optim.py", "test_triton_optim.py"),
    *("test_optim_life.py", "test_optim_gpu.py", "test_gpu_optim.py", "test_optim_devices.py", "test_optim_bugs.py"),
)
NAMES = ("Adagrad", "Adam", "AdamW", "NAdam", "RMSprop", "SGD")
# Every state that a rule has is in use.
FULL: dict[str, dict[str, Any]] = {
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True, "weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
}
CANARY = 7.0
PARAM_LAYOUTS = ("plain", "offset", "transposed", "every second")
GRAD_LAYOUTS = (*PARAM_LAYOUTS, "expanded")
each_name = pytest.mark.parametrize("name", NAMES)


def make(name: str, params: Any, theirs: bool = False, **kwargs: Any) -> torch.optim.Optimizer:
    kwargs = {"lr": 0.01, **FULL[name], **kwargs}
    return getattr(torch.optim if theirs else optim, name)(params, **(kwargs | ({"foreach": False} if theirs else {})))


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """`value` in a layout, and the buffer around it, which holds canaries elsewhere."""
    room = torch.full((4 * value.numel() + 64,), CANARY, dtype=value.dtype)
    shape = tuple(value.shape)
    row_major = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    strides = {
        "plain": row_major,
        "offset": row_major,
        "transposed": [math.prod(shape[:d]) for d in range(len(shape))],
        "every second": [2 * s for s in row_major],
        "expanded": [0] * len(shape),
    }[layout]
    view = room.as_strided(shape, strides, 17 if layout == "offset" else 16)
    if layout == "expanded":
        view.reshape(-1)[:1].fill_(0.5)
        room[16] = 0.5
    else:
        view.copy_(value)
    return view, room


def canaries_unharmed(view: Tensor, room: Tensor) -> bool:
    touched = torch.zeros_like(room, dtype=torch.bool)
    touched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool((room[~touched] == CANARY).all())


def close(a: Any, b: Any, dtype: torch.dtype = torch.float64) -> None:
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6}.get(dtype, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
