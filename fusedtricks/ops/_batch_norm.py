"""What batch_norm and sync_batch_norm share: argument checks, statistics per channel, activations, the sign mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedtricks.ops._norm import FLOATS, accumulate_dtype

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
IDENTITY, RELU, LEAKY_RELU, SILU, GELU = range(5)
SIGNED = (RELU, LEAKY_RELU)  # their derivative is known from the sign of z

# ---- statistics ------------------------------------------------------------------------------------------------------


def axes(x: Tensor) -> tuple[int, ...]:
    """Every dimension but the channels'."""
    return (0, *range(2, x.dim()))


def over(x: Tensor, values: Tensor) -> Tensor:
    """(..., C) shaped to broadcast over x (N, C, *)."""
    return values.reshape(*values.shape[:-1], 1, x.shape[1], *(1,) * (x.dim() - 2))


def count(x: Tensor) -> int:
    """Samples per channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def statistics(x: Tensor, eps: float) -> Tensor:
    """(4, C): mean, the part of the mean that its own precision rounds away, rstd, biased variance.

    A mean of 1e5 in fp32 is rounded by up to 0.004; centring by both parts keeps the error independent of the mean.
    """
    dims, dtype = axes(x), accumulate_dtype(x.dtype)
    exact = x.to(_exact_dtype(x))
    near = exact.mean(dims, keepdim=True)
    off = (exact - near).mean(dims, keepdim=True)
    mean = near.to(dtype)
    rest = (near - mean) + off
    var = (exact - near - off).square().mean(dims, keepdim=True)
    parts = (mean, rest.to(dtype), torch.rsqrt(var + eps).to(dtype), var.to(dtype))
    return torch.stack(parts).reshape(4, x.shape[1])


def _exact_dtype(x: Tensor) -> torch.dtype:
    """Sums over a channel, which may have millions of samples, are fp64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def channel_sums(x: Tensor, g: Tensor, stats: Tensor) -> Tensor:
    """(2, C): sums of g and of g x^ over each channel, in a dtype at least as wide as that of the statistics."""
    g, mean, rest, rstd = (t.to(_exact_dtype(x)) for t in (g, *over(x, stats)[:3]))
    xhat = (x.to(g.dtype) - mean - rest) * rstd
    return torch.stack((g.sum(axes(x)), (g * xhat).sum(axes(x))))


def given_statistics(x: Tensor, mean: Tensor, rest: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """`statistics` from a mean and a variance that are known."""
    dtype = accumulate_dtype(x.dtype)
    mean, var = mean.to(dtype), var.to(dtype)
    rest = torch.zeros_like(mean) if rest is None else rest.to(dtype)
    return torch.stack((mean, rest, torch.rsqrt(var + eps), var))


@torch.no_grad()
def track(
    stats: Tensor,
    samples: int | Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Update the running statistics in place: (1 - f) old + f new, with the unbiased variance.

    f is `momentum`; where that is None it is 1 / num_batches_tracked, which makes the plain average over all batches.
    The counter counts an empty batch too; the averages are left alone by one, as torch does.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or (isinstance(samples, int) and samples == 0):
        return
    mean, rest, _, var = stats.detach()
    factor = momentum
    if momentum is None:
        factor = 0.0 if num_batches_tracked is None else 1 / num_batches_tracked.to(mean.dtype)
    if isinstance(samples, Tensor):  # counted over processes: no host sync
        factor = factor * (samples > 0)
        unbiased = var * (samples / (samples - 1).clamp_min(1)).to(var.dtype)
    else:
        unbiased = var * (samples / (samples - 1))
    for running, new in ((running_mean, mean + rest), (running_var, unbiased)):
        running.copy_(running.to(new.dtype) * (1 - factor) + new * factor)


def normalized(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """x^ = (x - mean) rstd in the accumulation dtype, and rstd shaped to broadcast over x."""
    mean, rest, rstd, _ = over(x, stats)
    return (x.to(stats.dtype) - mean - rest) * rstd, rstd


def preactivation(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> Tensor:
    """z = x^ weight + bias + residual."""
    z, _ = normalized(x, stats)
    if weight is not None:
        z = z * over(x, weight)
    if bias is not None:
        z = z + over(x, bias)
    return z if residual is None else z + residual


# ---- activations -----------------------------------------------------------------------------------------------------


def activate(z: Tensor, activation: int, slope: float) -> Tensor:
    if activation == RELU:
        return torch.relu(z)
    if activation == LEAKY_RELU:
        return torch.nn.functional.leaky_relu(z, slope)
    if activation == SILU:
        return z * torch.sigmoid(z)
    if activation == GELU:
        return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))
    return z


def derivative(z: Tensor, activation: int, slope: float) -> Tensor:
    """d activate / dz; at 0 that of the negative side, as torch has it."""
    if activation in SIGNED:
        return torch.ones_like(z).masked_fill(z <= 0, 0.0 if activation == RELU else slope)
    if activation == SILU:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


# ---- the mask --------------------------------------------------------------------------------------------------------


SHORT_RUN = 16


def mask_rows(template: Tensor) -> tuple[int, int]:
    """Elements of a dense tensor (N, C, *) as (rows, columns): a bit row of the mask starts at a whole byte.

    A row is one channel's run of neighbours in memory; where runs are shorter than 16, the whole tensor.
    """
    total, channels = template.numel(), template.shape[1]
    inner = 1
    for d, size in enumerate(template.shape):
        if channels == 1 or (d != 1 and size > 1 and template.stride(d) < template.stride(1)):
            inner *= size
    return (1, total) if inner < SHORT_RUN else (total // inner if total else 0, inner)


def pack(positive: Tensor, template: Tensor) -> Tensor:
    """One bit per element in the memory order of `template` (dense): bit j % 8 of byte j // 8 of its row."""
    rows, columns = mask_rows(template)
    flat = torch.empty_like(template, dtype=torch.bool).copy_(positive).as_strided((rows, columns), (columns, 1))
    padded = torch.nn.functional.pad(flat, (0, -columns % 8)).reshape(rows, (columns + 7) // 8, 8)
    return (padded.long() << torch.arange(8, device=flat.device)).sum(-1).to(torch.uint8)


def unpack(mask: Tensor, template: Tensor) -> Tensor:
    """The bits that `pack` made, as a boolean tensor laid out like `template`."""
    rows, columns = mask_rows(template)
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    flat = bits.reshape(rows, (columns + 7) // 8 * 8)[:, :columns].bool()
    out = torch.empty_like(template, dtype=torch.bool)
    out.as_strided((rows, columns), (columns, 1)).copy_(flat)
    return out


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    *,
    alone: bool = True,
) -> None:
    """Raise torch's error for input that torch refuses. One expression decides; what was wrong is worked out after.

    `alone`: is the batch all that its statistics are of, so that it must have two samples?
    """
    try:
        shape = input.shape
        channels, device = shape[1:2], input.device
        fine = (
            len(shape) >= 2
            and input.dtype in FLOATS
            and (eps > 0 or (eps == 0 and not training))
            and (running_mean is None) == (running_var is None)
            and (training or running_mean is not None)
            and not (alone and training and input.numel() == shape[1] and count(input) == 1)
            and (running_mean is None or _belongs(running_mean, channels, device))
            and (running_var is None or _belongs(running_var, channels, device))
            and (weight is None or _belongs(weight, channels, device))
            and (bias is None or _belongs(bias, channels, device))
        )
    except (AttributeError, TypeError):
        fine = False
    if not fine:
        _explain(
            input, training, eps, alone, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
        )


def _belongs(parameter: Tensor, shape: torch.Size, device: torch.device) -> bool:
    return parameter.shape == shape and parameter.device == device and parameter.dtype in FLOATS


def _explain(input: Tensor, training: bool, eps: float, alone: bool, **parameters: Tensor | None) -> None:
    if not isinstance(input, Tensor):
        raise AttributeError(f"batch_norm: expected input to be a Tensor, but got {type(input).__name__}")
    if input.ndim < 2:
        raise IndexError(f"batch_norm: expected input of at least 2 dimensions (N, C, *), but got {input.ndim}")
    if alone and training and count(input) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    for label, parameter in parameters.items():
        if parameter is not None and not isinstance(parameter, Tensor):
            raise TypeError(f"batch_norm(): argument '{label}' must be Tensor, not {type(parameter).__name__}")
    mean, var = parameters["running_mean"], parameters["running_var"]
    if not training and (mean is None or var is None):
        raise RuntimeError(f"{'running_mean' if mean is None else 'running_var'} must be defined in evaluation mode")
    if (mean is None) != (var is None):
        raise ValueError("batch_norm: expected running_mean and running_var to be both None or both tensors")
    if input.dtype not in FLOATS:
        kind = str(input.dtype).removeprefix("torch.")
        raise NotImplementedError(
            f'"batch_norm" not implemented for {kind}; expected float32, bfloat16, float16 or float64'
        )
    channels = input.shape[1]
    for label, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.shape != (channels,):
            raise RuntimeError(
                f"batch_norm: expected {label} of shape [{channels}], one element per channel of input "
                f"{list(input.shape)}, but got {list(parameter.shape)}; {label} should contain {channels} elements "
                f"not {parameter.numel()}"
            )
        if parameter.device != input.device:
            raise RuntimeError(
                f"batch_norm: expected all tensors on the same device, but got {label} on {parameter.device} "
                f"and input on {input.device}"
            )
        if parameter.dtype not in FLOATS:
            raise RuntimeError(f"batch_norm: expected {label} of a floating dtype, but got {parameter.dtype}")


def check_activation(input: Tensor, residual: Tensor | None, activation: str) -> int:
    """The code of an activation; the residual must be a tensor like the input."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm_act: expected activation to be one of {ACTIVATIONS}, but got {activation!r}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"batch_norm_act(): argument 'residual' must be Tensor, not {type(residual).__name__}")
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(input, what), getattr(residual, what)
            if ours != theirs:
                raise RuntimeError(f"batch_norm_act: expected residual of the input's {what} {ours}, but got {theirs}")
    return ACTIVATIONS.index(activation)
