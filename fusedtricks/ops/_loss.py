"""What the losses share: argument checks, the three definitions of label smoothing, targets as kernels take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedtricks.ops._norm import FLOATS, accumulate_dtype
from fusedtricks.ops._target import MixedTarget

LABELS = frozenset((torch.int64, torch.int32, torch.uint8))
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class Target(NamedTuple):
    """Class probabilities (*, C), or labels (*) with an optional second label and the mixing weight lam, () or (*)."""

    first: Tensor
    other: Tensor | None
    lam: Tensor | None


class Options(NamedTuple):
    """The scalars of an operator call. The smoothed target is on * target + off; z = scale * cap(logits)."""

    ignore_index: int
    on: float
    off: float
    z_loss: float
    softcap: float  # 0: none
    scale: float
    reduction: int


def smoothing(mode: str, epsilon: float, classes: int) -> tuple[float, float]:
    """(on, off): the smoothed target is on * target + off in every class.

    "uniform": eps / K over all classes (Szegedy et al. 2016, section 7; torch). "others": eps / (K - 1) over the other
    classes, 1 - eps on the true one. "lecture": eps / K over the other classes, 1 - eps on the true one, which sums to
    1 - eps / K.
    """
    if mode == "uniform":
        return 1.0 - epsilon, epsilon / max(classes, 1)
    if mode == "others":
        off = epsilon / max(classes - 1, 1)
        return 1.0 - epsilon - off, off
    if mode == "lecture":
        off = epsilon / max(classes, 1)
        return 1.0 - epsilon - off, off
    raise ValueError(f"smoothing_mode must be 'uniform', 'others' or 'lecture', got {mode!r}")


def class_last(t: Tensor) -> Tensor:
    """(C), (N, C) or (N, C, d1, ...) as a view with the classes last, as operators take it."""
    return t.movedim(1, -1) if t.dim() > 2 else t


def check_positive(op: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def check_weight(op: str, weight: Tensor | None, classes: int, device: torch.device) -> Tensor | None:
    if weight is not None and (weight.shape != (classes,) or weight.dtype not in FLOATS):
        raise RuntimeError(
            f"{op}: weight tensor should be defined either for all {classes} classes or no classes but got weight "
            f"tensor of shape {list(weight.shape)} and dtype {weight.dtype}"
        )
    if weight is not None and weight.device != device:
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device, {device}, got weight {weight.device}")
    return weight


def mixed(op: str, input: Tensor, target: MixedTarget) -> Target:
    """A checked MixedTarget; lam in the accumulation dtype, () or of the labels' shape."""
    a, b, lam = target
    shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=accumulate_dtype(input.dtype), device=input.device)
    for name, labels in (("a", a), ("b", b)):
        if not isinstance(labels, Tensor) or labels.dtype not in LABELS:
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{op}: MixedTarget.{name} must be an int64, int32 or uint8 tensor, got {kind}")
        if labels.shape != shape:
            raise ValueError(
                f"{op}: MixedTarget.{name} must have shape {list(shape)} for an input of shape {list(input.shape)}, "
                f"got {list(labels.shape)}"
            )
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: MixedTarget.a and .b must have one dtype, got {a.dtype} and {b.dtype}")
    if lam.dtype not in FLOATS:
        raise TypeError(f"{op}: MixedTarget.lam must be a floating tensor, got {lam.dtype}")
    if lam.dim() > 0 and (not shape or lam.shape != shape[:1]):
        expected = "()" if not shape else f"() or ({shape[0]},)"
        raise ValueError(f"{op}: MixedTarget.lam must have shape {expected}, got {tuple(lam.shape)}")
    if not (a.device == b.device == lam.device == input.device):
        raise RuntimeError(
            f"{op}: Expected all tensors to be on the same device, but got input on {input.device}, a on {a.device}, "
            f"b on {b.device}, lam on {lam.device}"
        )
    lam = lam.to(accumulate_dtype(input.dtype))
    if lam.dim() == 1 and len(shape) > 1:
        lam = lam.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
    return Target(a, b, lam)


def labels_or_probabilities(op: str, input: Tensor, target: Tensor, call_torch: Any, ignore_index: int) -> Target:
    """A checked tensor target. What torch refuses, torch explains: `call_torch()` raises its error."""
    probabilities = target.shape == input.shape
    labels = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    fine = (
        input.dim() > 0
        and target.device == input.device
        and (
            target.dtype in FLOATS and ignore_index < 0
            if probabilities
            else target.dtype in LABELS and target.shape == labels
        )
    )
    if not fine:
        if target.device != input.device:
            raise RuntimeError(
                f"{op}: Expected all tensors to be on the same device, but got input on {input.device} and target on "
                f"{target.device}"
            )
        call_torch()
        raise RuntimeError(
            f"{op}: expected labels of shape {list(labels)} and dtype int64, int32 or uint8, or class probabilities of "
            f"shape {list(input.shape)}, got shape {list(target.shape)} and dtype {target.dtype}"
        )
    return Target(class_last(target) if probabilities else target, None, None)


def autocasting(kind: str) -> bool:
    """Is autocast on for this kind of device? torch raises for one it has none for, such as "meta"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def output_dtype(input: Tensor, wanted: torch.dtype | None, target: Tensor | None = None) -> torch.dtype:
    """What torch returns: the input's dtype, with probabilities the wider of both, and fp32 for 16-bit input under
    autocast."""
    if wanted is not None:
        return wanted
    if target is not None and target.is_floating_point() and target.dtype != input.dtype:
        return torch.promote_types(input.dtype, target.dtype)
    if input.dtype in (torch.bfloat16, torch.float16) and autocasting(input.device.type):
        return torch.float32
    return input.dtype
