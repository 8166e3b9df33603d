"""Batch normalization (Ioffe, Szegedy 2015, arXiv:1502.03167), alone and with residual add and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, apply, differentiating, leaf, transforming, wants_grad
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _batch_norm as bn
from fusedtricks.ops._dtensor import is_dtensor
from fusedtricks.ops._norm import accumulate_dtype, laid_out_like

# y = activation(x^ weight + bias + residual), x (N, C, *). y has the strides of empty_like(x). stats (4, C), fp32 (fp64
# for fp64): mean, the part of the mean that its own precision rounds away, rstd, biased variance. mask: the signs of
# the preactivation (`_batch_norm.pack`). What is not needed comes as an empty tensor. The counter is incremented, the
# averages are updated.
batch_norm_fwd = Op(
    "batch_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int activation, "
    "float slope, bool need_y, bool need_mask) -> (Tensor y, Tensor stats, Tensor mask)",
    stem="batch_norm",
)
# The same with statistics that are known: those of evaluation, or of a batch spread over processes.
batch_norm_apply = Op(
    "batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor? rest, Tensor var, "
    "float eps, int activation, float slope, bool need_mask) -> (Tensor y, Tensor stats, Tensor mask)",
    stem="batch_norm",
)
# training: x^ depends on x through its statistics. sums (2, C), means over the whole batch of g and of g x^, are given
# where the batch is spread over processes, and measured here where not. dweight and dbias come in the dtype of weight,
# or of stats without one; what is not wanted comes as an empty tensor. `mask`, or else z made again from x and
# residual, tells the activation's derivative.
batch_norm_bwd = Op(
    "batch_norm_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, Tensor? mask, "
    "Tensor? sums, bool training, int activation, float slope, bool need_dx, bool need_dresidual, bool need_dweight, "
    "bool need_dbias) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    stem="batch_norm",
)


def _activated(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: int,
    slope: float,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = bn.preactivation(x, residual, weight, bias, stats)
    y = laid_out_like(bn.activate(z, activation, slope).to(x.dtype), x)
    return y, stats, bn.pack(~(z <= 0), y) if need_mask else x.new_empty(0, dtype=torch.uint8)


@batch_norm_fwd.reference
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    need_y: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = bn.statistics(x, eps)
    bn.track(stats, bn.count(x), running_mean, running_var, num_batches_tracked, momentum)
    if not need_y:
        return x.new_empty(0), stats, x.new_empty(0, dtype=torch.uint8)
    return _activated(x, residual, weight, bias, stats, activation, slope, need_mask)


@batch_norm_apply.reference
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rest: Tensor | None,
    var: Tensor,
    eps: float,
    activation: int,
    slope: float,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = bn.given_statistics(x, mean, rest, var, eps)
    return _activated(x, residual, weight, bias, stats, activation, slope, need_mask)


@batch_norm_bwd.reference
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    sums: Tensor | None,
    training: bool,
    activation: int,
    slope: float,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With z = x^ weight + bias + residual and g = dy activation'(z), which is dresidual:

    dbias = sum(g), dweight = sum(g x^), dx = weight rstd (g - mean(g) - x^ mean(g x^)); the two means, over a channel,
    are there only where the statistics are those of this batch (training).
    """
    xhat, rstd = bn.normalized(x, stats)
    g = dy.to(stats.dtype)
    if mask is not None:
        g = torch.where(bn.unpack(mask, torch.empty_like(x)), g, g * (slope if activation == bn.LEAKY_RELU else 0.0))
    elif activation != bn.IDENTITY:
        g = g * bn.derivative(bn.preactivation(x, residual, weight, bias, stats), activation, slope)
    dtype = stats.dtype if weight is None else weight.dtype
    dx, dresidual, dweight, dbias = (x.new_empty(0, dtype=d) for d in (x.dtype, x.dtype, dtype, dtype))
    here = bn.channel_sums(x, g, stats)
    if need_dx:
        dx = g
        if training:
            means = here / bn.count(x) if sums is None else sums
            mean_g, mean_gx = bn.over(x, means.to(g.dtype))
            dx = g - mean_g - xhat * mean_gx
        dx = dx * rstd
        dx = laid_out_like((dx if weight is None else dx * bn.over(x, weight)).to(x.dtype), x)
    if need_dresidual:
        dresidual = laid_out_like(g.to(x.dtype), x)
    if need_dweight:
        dweight = here[1].to(dtype)
    if need_dbias:
        dbias = here[0].to(dtype)
    return dx, dresidual, dweight, dbias


class _BatchNorm(torch.autograd.Function):
    """y and, `apart`, the statistics, which are not differentiable: their caller updates the averages from them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[Any, ...],  # the rest of what `_arguments` takes; one argument, for each costs time
        apart: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _, training, _, eps, activation, slope = settings
        need_mask = _needs_mask(residual, activation)
        y, stats, mask = _op_of(training)(*_arguments(x, residual, weight, bias, *settings, need_mask))
        # z is made again from what it was made of, unless the mask says enough, or y says all.
        again = activation != bn.IDENTITY and not need_mask
        ctx.save_for_backward(
            x, residual if again else None, weight, bias if again else None, stats, mask if need_mask else None
        )
        ctx.training, ctx.eps, ctx.activation, ctx.slope = training, eps, activation, slope
        if not apart:
            return y
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, stats, mask = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        same = ctx.activation == bn.IDENTITY  # then dresidual is dy
        run = batch_norm_bwd
        if differentiating():
            run = batch_norm_bwd.implementation("reference")
            stats = bn.statistics(x, ctx.eps) if ctx.training else stats
        need = (need_x, need_residual and not same, need_weight, need_bias)
        dx, dresidual, dweight, dbias = run(
            dy, x, residual, weight, bias, stats, mask, None, ctx.training, ctx.activation, ctx.slope, *need
        )
        return (
            dx if need_x else None,
            (dy if same else dresidual) if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


def _needs_mask(residual: Tensor | None, activation: int) -> bool:
    return residual is not None and activation in bn.SIGNED


def _op_of(training: bool) -> Op:
    return batch_norm_fwd if training else batch_norm_apply


def _arguments(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: tuple[Tensor | None, ...],
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
    need_mask: bool,
) -> tuple[Any, ...]:
    """What the operator takes."""
    if training:
        return x, residual, weight, bias, *buffers, momentum, eps, activation, slope, True, need_mask
    mean, var, _ = buffers
    return x, residual, weight, bias, mean, None, var, eps, activation, slope, need_mask


def _pair(training: bool, **given: Any) -> Any:
    given |= {"training": training, "sums": None}
    unchanged = "residual" if "need_dresidual" in given else None
    return pair(_BatchNorm, _op_of(training), batch_norm_bwd, given=given, unchanged=unchanged)


# By training and by what the derivative of the activation is known from, as in _BatchNorm: nothing, the mask, or z.
_nodes = {
    (training, known): _pair(training, **given)
    for training in (False, True)
    for known, given in {
        "one": {"residual": None, "bias": None, "mask": None, "need_dresidual": False},
        "mask": {"residual": None, "bias": None},
        "z": {"mask": None},
    }.items()
}


NO_BUFFERS = (None, None, None)


def _run(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: tuple[Tensor | None, ...],
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    slope: float,
) -> Tensor:
    """Everything behind the public functions and modules; `buffers` are running_mean, running_var, counter."""
    bn.check(input, buffers[0], buffers[1], weight, bias, training, eps)
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        # Kernels write both gradients in one dtype; the casts' own backward rounds each to its parameter's.
        weight, bias = (p.to(accumulate_dtype(input.dtype)) for p in (weight, bias))
    settings = (buffers, training, momentum, eps, activation, slope)
    wanted = wants_grad(input, weight, bias) or (residual is not None and wants_grad(residual, None))
    need_mask = wanted and _needs_mask(residual, activation)
    known = "one" if activation == bn.IDENTITY else "mask" if need_mask else "z"
    arguments = _arguments(input, residual, weight, bias, *settings, need_mask)
    if (y := recorded(_nodes[training, known], *arguments)) is not None:
        return y
    if torch.jit.is_tracing() or is_dtensor(input):  # torch's own is what other runtimes know
        z = _traced(input, weight, bias, buffers, training, momentum, eps)
        return bn.activate(z if residual is None else z + residual, activation, slope)
    if transforming():
        stats = bn.statistics(input, eps) if training else bn.given_statistics(input, buffers[0], None, buffers[1], eps)
        y = bn.activate(bn.preactivation(input, residual, weight, bias, stats), activation, slope)
        if training:
            bn.track(stats, bn.count(input), *buffers, momentum)
        return laid_out_like(y.to(input.dtype), input)
    # torch.compile refuses a Function that changes its inputs: there the averages are updated from what it returns.
    apart = training and torch.compiler.is_compiling()
    settings = (NO_BUFFERS if apart else buffers, *settings[1:])
    if wanted:
        y = apply(_BatchNorm, input, residual, weight, bias, settings, apart)
        if apart:
            y, stats = y
    else:
        y, stats, _ = _op_of(training)(*_arguments(input, residual, weight, bias, *settings, False))
    if apart:
        bn.track(stats, bn.count(input), *buffers, momentum)
    elif training and buffers[0] is not None:
        torch.autograd.graph.increment_version([b for b in buffers if b is not None])
    return y


def _traced(x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: tuple[Tensor | None, ...], training: bool,
            momentum: float | None, eps: float) -> Tensor:  # fmt: skip
    running_mean, running_var, counter = buffers
    if counter is not None:
        counter.add_(1)
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter)
    return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.batch_norm`.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance of each channel in the batch
    (training), or with `running_mean` and `running_var` (evaluation).

    Args:
        input: (N, C, *); float32, bfloat16, float16 or float64, any strides. Batches whose channels, or whose planes,
            lie in one run of memory are read in place, others are copied. DTensors are torch's own.
        running_mean, running_var: (C,), updated in place in training: (1 - momentum) old + momentum new, the new
            variance unbiased. Both may be None in training.
        weight, bias: (C,), of any of these dtypes, the same as `input` or not.
        eps: added to the variance.

    Returns:
        A tensor of `input`'s shape, dtype and memory format. Statistics are fp32 or wider, the error does not grow with
        the mean nor with the size of the batch, and on the CPU the result is the same for any number of threads.

    Raises:
        ValueError: one value per channel in training; eps that is not positive (negative in evaluation).
        RuntimeError: a parameter that is not (C,), tensors on different devices, no running statistics in evaluation.
        NotImplementedError: an integer or complex `input`.
    """
    if isinstance(input, Tensor) and input.shape == (0,):  # torch takes it for no samples of no channels
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    buffers = (running_mean, running_var, None)
    return _run(input, None, weight, bias, buffers, training, momentum, eps, bn.IDENTITY, 0.0)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """activation(batch_norm(input) + residual) in one pass more than the statistics; see :func:`batch_norm`.

    Args:
        residual: of `input`'s shape, dtype and device, any strides; may be `input` itself. Its gradient comes out of
            the same pass as that of `input`.
        activation: "relu", "leaky_relu", "silu", "gelu" (with erf) or "identity".
        negative_slope: of leaky_relu.

    For the backward it saves `input`, and with a residual one bit per element ("relu", "leaky_relu") or the residual
    ("silu", "gelu").

    Raises:
        ValueError: an unknown activation. RuntimeError: a residual unlike the input. And those of :func:`batch_norm`.
    """
    code = bn.check_activation(input, residual, activation)
    buffers = (running_mean, running_var, None)
    return _run(input, residual, weight, bias, buffers, training, momentum, eps, code, negative_slope)


# ---- modules ---------------------------------------------------------------------------------------------------------


def forward_module(
    module: torch.nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: int = bn.IDENTITY,
    slope: float = 0.0,
) -> Tensor:
    """The forward of torch's modules. The counter is counted by the kernel, and `momentum=None` read there: no sync."""
    if isinstance(input, Proxy):
        return leaf(module, input)
    module._check_input_dim(input)
    training = module.training or (module.running_mean is None and module.running_var is None)
    buffers = NO_BUFFERS
    if not module.training or module.track_running_stats:
        buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
    if not module.training:
        buffers = (*buffers[:2], None)
    momentum = module.momentum
    counter = buffers[2]
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        # Kernels count in int64; a checkpoint may have brought another.
        counter.add_(1)
        momentum = 1.0 / float(counter) if momentum is None else momentum
        buffers = (*buffers[:2], None)
    elif momentum is None and counter is None:
        momentum = 0.0
    return _run(input, residual, module.weight, module.bias, buffers, training, momentum, module.eps, activation, slope)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`: same arguments, parameters and state_dict. See :func:`batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return forward_module(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`: same arguments, parameters and state_dict. See :func:`batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return forward_module(self, input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`: same arguments, parameters and state_dict. See :func:`batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return forward_module(self, input)


class _BatchNormAct:
    """activation(batch_norm(input) + residual): torch's arguments, then `activation` and `negative_slope`."""

    def __init__(self, *args: Any, activation: str = "relu", negative_slope: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation not in bn.ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: expected activation to be one of {bn.ACTIVATIONS}, but got {activation!r}"
            )
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input, residual)
        code = bn.check_activation(input, residual, self.activation)
        return forward_module(self, input, residual, code, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}"


class BatchNormAct1d(_BatchNormAct, torch.nn.BatchNorm1d):
    """:class:`BatchNorm1d`, residual add and activation in one; see :func:`batch_norm_act`.

    `forward(input, residual=None)`; keyword arguments `activation="relu"` and `negative_slope=0.01` besides torch's.
    """


class BatchNormAct2d(_BatchNormAct, torch.nn.BatchNorm2d):
    """:class:`BatchNorm2d`, residual add and activation in one; see :class:`BatchNormAct1d`."""


class BatchNormAct3d(_BatchNormAct, torch.nn.BatchNorm3d):
    """:class:`BatchNorm3d`, residual add and activation in one; see :class:`BatchNormAct1d`."""
