"""What layer_norm and rms_norm share: argument checks, statistics, layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic and statistics are fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def trailing(dims: int) -> tuple[int, ...]:
    return tuple(range(-dims, 0))


def row_count(x: Tensor, dims: int) -> int:
    return math.prod(x.shape[: x.dim() - dims])


def sum_rows(value: Tensor, dims: int) -> Tensor:
    """Sum over the leading dimensions (of which there may be none: torch reads an empty tuple as all)."""
    rows = tuple(range(value.dim() - dims))
    return value.sum(rows) if rows else value


def rstd_of(centred: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """1 / sqrt(mean(centred^2) + eps), finite for rows whose squares overflow.

    Where the mean of squares overflows, the row is scaled by a power of two s first, which is exact:
    rstd = s / sqrt(mean((s c)^2) + s^2 eps).
    """
    power = 512 if centred.dtype == torch.float64 else 64
    with torch.no_grad():
        overflow = ~torch.isfinite(centred.detach().square().mean(axes, keepdim=True))
        scale = torch.ones_like(overflow, dtype=centred.dtype).masked_fill(overflow, 2.0**-power)
    return scale * torch.rsqrt((centred * scale).square().mean(axes, keepdim=True) + eps * scale.square())


def laid_out_like(value: Tensor, template: Tensor) -> Tensor:
    """`value` with the strides of `torch.empty_like(template)`: those of a dense one, so memory formats are kept."""
    return laid_out(value, torch.empty_like(template).stride())


def strides_like(t: Tensor) -> tuple[int, ...]:
    """Those of `torch.empty_like(t)`, for a backward that does not keep t."""
    return t.stride() if t.is_contiguous() else torch.empty_like(t, device="meta").stride()


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`value` with these strides: a gradient may come in another layout than the tensor had."""
    if value.stride() == strides:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)  # of values under vmap as well


def check(
    name: str, input: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, bias: Tensor | None = None
) -> int:
    """Raise torch's error for input that torch refuses; return the number of normalised dimensions, or 0 where torch's
    own code is to look at it.

    One expression decides, for this runs on every call; what was wrong is worked out only when something is.
    """
    try:
        dims = len(shape)
        fine = (
            dims > 0
            and input.shape[-dims:] == shape
            and not isinstance(shape[-1], float)
            and input.dtype in FLOATS
            and (weight is None or (weight.shape == shape and weight.device == input.device and weight.dtype in FLOATS))
            and (bias is None or (bias.shape == shape and bias.device == input.device and bias.dtype in FLOATS))
        )
    except (AttributeError, TypeError, RuntimeError):
        if getattr(input, "is_nested", False):  # strided, without a shape
            return 0
        fine = False
    return dims if fine else _explain(name, input, shape, weight=weight, bias=bias)


def _explain(name: str, input: Tensor, shape: tuple[int, ...], **parameters: Tensor | None) -> int:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    try:
        shape = tuple(shape)
    except TypeError:
        kind = type(shape).__name__
        raise TypeError(
            f"{name}(): argument 'normalized_shape' (position 2) must be tuple of ints, not {kind}"
        ) from None
    dims = len(shape)
    if dims == 0:
        raise RuntimeError(
            f"{name}: Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, "
            "but got normalized_shape = []"
        )
    if any(isinstance(size, float) for size in shape):
        raise TypeError(f"{name}(): argument 'normalized_shape' must be tuple of ints, but got {shape}")
    if input.ndim < dims or input.shape[-dims:] != shape:
        expected = ", ".join(["*", *map(str, shape)])
        # torch's own type, which differs for an input of too few dimensions.
        error = ValueError if input.ndim < dims and name == "rms_norm" else RuntimeError
        raise error(
            f"{name}: Given normalized_shape={list(shape)}, expected input with shape [{expected}], "
            f"but got input of size{list(input.shape)}"
        )
    if input.dtype not in FLOATS:
        kind = str(input.dtype).removeprefix("torch.")
        raise NotImplementedError(
            f'"{name}" not implemented for {kind}; expected float32, bfloat16, float16 or float64'
        )
    for label, parameter in parameters.items():
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name}(): argument '{label}' must be Tensor, not {type(parameter).__name__}")
        if parameter.shape != shape:
            raise RuntimeError(
                f"{name}: Expected {label} to be of same shape as normalized_shape, but got {label} of shape "
                f"{list(parameter.shape)} and normalized_shape = {list(shape)}"
            )
        if parameter.device != input.device:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but got {label} on {parameter.device} "
                f"and input on {input.device}"
            )
        if parameter.dtype not in FLOATS:
            raise RuntimeError(f"{name}: Expected {label} of a floating dtype, but got {parameter.dtype}")
    return dims  # a list where a tuple was expected


def autocast_fp32(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """torch's autocast policy for normalisation: fp32 on CUDA, untouched on CPU."""
    if tensors[0].is_cuda and torch.is_autocast_enabled("cuda"):
        return tuple(t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)
    return tensors
