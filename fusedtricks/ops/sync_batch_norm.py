"""Batch normalization over the batches of all processes of a group, on any device torch.distributed serves.

One collective per direction. Forward: every process sends (count, mean, sum of squares about it) of its own batch,
packed in fp64, and merges what all sent in the order of the ranks (Chan, Golub, LeVeque 1979), so counts may differ and
may be zero. Backward: the sums of g and g x^. The gradients of weight and bias are those of the own batch, as in
torch.nn.SyncBatchNorm: DistributedDataParallel averages them. A backward that must itself be differentiable also sums
what the statistics are made of, for they depend on every process's x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import apply, differentiating, leaf
from fusedtricks.ops import _batch_norm as bn
from fusedtricks.ops.batch_norm import (
    NO_BUFFERS,
    _BatchNormAct,
    batch_norm_apply,
    batch_norm_bwd,
    batch_norm_fwd,
    forward_module,
)


def _gathered(packed: Tensor, group: str) -> Tensor:
    """(W, *) from (*,): functional collectives are what torch.compile can trace."""
    from torch.distributed import _functional_collectives as collectives

    # The second is the name before torch 2.13, which warns of it.
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    return collectives.wait_tensor(gather(packed[None], 0, group))


def _summed(packed: Tensor, group: str) -> Tensor:
    """Its derivative, which is torch's, sums gradients: what a process gave is in the sum that each of them got."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(packed, "sum", group))


def _local_moments(x: Tensor, eps: float) -> Tensor:
    """(1 + 2 C,) fp64: count, mean, sum of squares about the mean; zeros for an empty batch."""
    samples = bn.count(x)
    if samples == 0:
        return x.new_zeros(1 + 2 * x.shape[1], dtype=torch.float64)
    stats = batch_norm_fwd(x, None, None, None, *NO_BUFFERS, None, eps, bn.IDENTITY, 0.0, False, False)[1].double()
    return torch.cat((stats.new_full((1,), samples), stats[0] + stats[1], stats[3] * samples))


def _merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, mean and biased variance of all parts (W, 1 + 2 C)."""
    channels = parts.shape[1] // 2
    counts, means, squares = parts.split((1, channels, channels), 1)
    total = counts.sum()
    some = total.clamp_min(1)
    mean = (counts * means).sum(0) / some
    var = (squares + counts * (means - mean).square()).sum(0) / some
    return total, mean, var


def _rounded(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean in `dtype`, and the part of it that is rounded away there."""
    near = mean.to(dtype)
    return near, (mean - near).to(dtype)


def _differentiable_statistics(x: Tensor, total: Tensor, eps: float, group: str) -> Tensor:
    """Those of forward as a function of all processes' x. An empty batch takes part, with sums of nothing."""
    some, exact = total.clamp_min(1), x.double()
    mean = _summed(exact.sum(bn.axes(x)), group) / some
    var = _summed((exact - bn.over(x, mean)).square().sum(bn.axes(x)), group) / some
    return bn.given_statistics(x, *_rounded(mean, bn.accumulate_dtype(x.dtype)), var, eps)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, exact, var = _merged(_gathered(_local_moments(x, eps), group))
        dtype = bn.accumulate_dtype(x.dtype)
        mean, rest = _rounded(exact, dtype)
        y, stats, _ = batch_norm_apply(x, None, weight, bias, mean, rest, var.to(dtype), eps, bn.IDENTITY, 0.0, False)
        ctx.save_for_backward(x, weight, stats, total)
        ctx.mark_non_differentiable(stats, total)
        ctx.eps, ctx.group = eps, group
        return y, stats, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats, total = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        op = batch_norm_bwd
        if differentiating():
            op = batch_norm_bwd.implementation("reference")
            stats = _differentiable_statistics(x, total, ctx.eps, ctx.group)

        def run(sums: Tensor | None, training: bool, weight: Tensor | None, *need: bool) -> tuple[Tensor, ...]:
            return op(
                dy, x, None, weight, None, stats, None, sums, training, bn.IDENTITY, 0.0, need[0], False, *need[1:]
            )

        _, _, sum_gx, sum_g = run(None, False, None, False, True, True)
        dx = None
        if need_x:
            sums = _summed(torch.stack((sum_g, sum_gx)).double(), ctx.group) / total.clamp_min(1)
            dx = run(sums.to(stats.dtype), True, weight, True, False, False)[0]
        dtype = stats.dtype if weight is None else weight.dtype
        return dx, sum_gx.to(dtype) if need_weight else None, sum_g.to(dtype) if need_bias else None, None, None


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """Drop-in for :class:`torch.nn.SyncBatchNorm`: same arguments, parameters and state_dict; see :func:`batch_norm`.

    Works on the CPU (gloo) as on GPUs (NCCL), with batches of different sizes and empty ones, and under
    `torch.compile(fullgraph=True)`. Derivatives of any order are those of the sum of all processes' losses, and must be
    asked for by all. In evaluation, and where there is one process, it is :class:`BatchNorm2d` for any number of
    dimensions.

    Raises:
        ValueError: fewer than two dimensions, no channels; and those of :func:`batch_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return forward_module(self, input)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return forward_module(self, input)
        buffers = NO_BUFFERS
        if self.track_running_stats:
            buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        # Sizes are nobody's business but all processes' together: one sample here may be one of many.
        bn.check(input, *buffers[:2], self.weight, self.bias, True, self.eps, alone=False)
        weight, bias = self.weight, self.bias
        if weight is not None and bias is not None and weight.dtype != bias.dtype:
            weight, bias = (p.to(bn.accumulate_dtype(input.dtype)) for p in (weight, bias))
        y, stats, total = apply(_SyncBatchNorm, input, weight, bias, self.eps, group.group_name)
        bn.track(stats, total, *buffers, self.momentum)
        return y

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """As torch's: every BatchNorm of `module`, torch's or ours, becomes one of these.

        Parameters, buffers, names, mode and hooks are kept. A BatchNormAct does more than this class, and raises
        TypeError.
        """
        if isinstance(module, _BatchNormAct):
            raise TypeError(f"convert_sync_batchnorm: {type(module).__name__} has no counterpart over processes")
        converted = module
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            converted = cls.__new__(cls)
            converted.__dict__ = module.__dict__.copy()
            converted._parameters, converted._buffers = module._parameters.copy(), module._buffers.copy()
            converted.process_group = process_group
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted
