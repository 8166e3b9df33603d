"""Bugs of batch normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedtricks.ops import _batch_norm as bn

from . import Bug, NativeBug, as_if_dense, first, in_place, overruns, partly_written, wide

FWD, APPLY, BWD = "batch_norm_fwd", "batch_norm_apply", "batch_norm_bwd"


def _statistics(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A forward whose y, and saved statistics, come from `change(statistics, wide x)`."""

    def wrong(right: Any, x: Tensor, residual: Tensor | None, weight: Any, bias: Any, *rest: Any) -> Any:
        y, stats, mask = right(x, residual, weight, bias, *rest)
        if not y.numel():
            return y, stats, mask
        stats = change(stats.clone(), wide(x))
        z = bn.preactivation(x, residual, weight, bias, stats)
        return y.copy_(bn.activate(z, rest[5], rest[6])), stats, mask

    return wrong


def _with_variance(stats: Tensor, var: Tensor) -> Tensor:
    stats[3], stats[2] = var, torch.rsqrt(var + 1e-5)
    return stats


def _one_pass(stats: Tensor, x: Tensor) -> Tensor:
    axes = bn.axes(x)
    return _with_variance(stats, (x.square().mean(axes) - x.mean(axes).square()).clamp_min(0))


def _unbiased(stats: Tensor, x: Tensor) -> Tensor:
    return _with_variance(stats, stats[3] * bn.count(x) / max(bn.count(x) - 1, 1))


def _overflowing(stats: Tensor, x: Tensor) -> Tensor:
    stats[2] = torch.where(x.square().mean(bn.axes(x)).isinf(), 0.0, stats[2])
    return stats


def _no_rest(stats: Tensor, x: Tensor) -> Tensor:
    stats[0] *= 1 + 2**-22
    return stats


def _changed_dx(change: Callable[..., Tensor]) -> Callable[..., Any]:
    def wrong(right: Any, *args: Any) -> Any:
        dx, *rest = right(*args)
        return change(dx, *args) if dx.numel() else dx, *rest

    return wrong


def _as_in_evaluation(right: Any, *args: Any) -> Any:
    return right(*args[:8], False, *args[9:])


def _bits_shifted(right: Any, *args: Any) -> Any:
    y, stats, mask = right(*args)
    return y, stats, mask.roll(1) if mask.numel() else mask


BUGS = {
    "E[x^2] - E[x]^2": Bug(FWD, _statistics(_one_pass)),
    "unbiased variance normalises": Bug(FWD, _statistics(_unbiased)),
    "squares overflow": Bug(FWD, _statistics(_overflowing)),
    "mean without its remainder": Bug(FWD, _statistics(_no_rest)),
    "residual dropped": Bug(FWD, lambda right, x, residual, *rest: right(x, None, *rest)),
    "residual dropped in evaluation": Bug(APPLY, lambda right, x, residual, *rest: right(x, None, *rest)),
    "eps ignored": Bug(FWD, lambda right, *args: right(*args[:8], 1e-5, *args[9:])),
    "input strides ignored": Bug(FWD, lambda right, x, *rest: right(as_if_dense(x), *rest)),
    "output always contiguous": Bug(FWD, lambda right, *args: first(right, lambda y: y.contiguous(), *args)),
    "last element unwritten": Bug(FWD, lambda right, *args: first(right, lambda y: partly_written(y, 1), *args)),
    "writes one past the end of its input": Bug(FWD, overruns),
    "mask off by a byte": Bug(FWD, _bits_shifted),
    "statistics of the batch held fixed": Bug(BWD, _as_in_evaluation),
    "incoming gradient overwritten": Bug(BWD, in_place),
    "gradient strides ignored": Bug(BWD, lambda right, dy, *rest: right(as_if_dense(dy), *rest)),
    "dweight and dbias exchanged": Bug(
        BWD, lambda right, *args: (lambda dx, dr, dw, db: (dx, dr, db, dw))(*right(*args))
    ),
    "residual's gradient without the activation": Bug(
        BWD,
        lambda right, dy, *rest: (lambda dx, dr, dw, db: (dx, dy.to(dx.dtype) if dr.numel() else dr, dw, db))(
            *right(dy, *rest)
        ),
    ),
    "dx without the weight": Bug(BWD, lambda right, dy, x, r, w, *rest: _unweighted(right, dy, x, r, w, *rest)),
    "negative slope is zero": Bug(BWD, lambda right, *args: right(*args[:10], 0.0, *args[11:])),
}


def _unweighted(right: Any, dy: Tensor, x: Tensor, residual: Any, weight: Tensor | None, *rest: Any) -> Any:
    dx, *others = right(dy, x, residual, weight, *rest)
    if weight is not None and dx.numel():
        dx = dx / bn.over(x, weight).to(dx.dtype)
    return dx, *others


NATIVE_BUGS = {
    "short planes: one sample for four": NativeBug(
        "cpu/batch_norm.h", "return f(run + r);", "return f(run);", "batch_norm"
    ),
    "registers of two channels: the numbers of the first for both": NativeBug(
        "cpu/batch_norm.h", "select<A>(rest, k[i], next[i])", "k[i]", "batch_norm"
    ),
    "signs of neighbouring runs where there is no head": NativeBug(
        "cpu/vec_bits.h", "run * length_ + shift()", "run * length_", "batch_norm"
    ),
    "rows left over from the streams": NativeBug(
        "cpu/batch_norm.h", "row = first + step * RowCut::kStreams;", "row = full;", "batch_norm"
    ),
    "offset of the gradient has the wrong sign": NativeBug(
        "math/batch_norm.h", "(g - offset) - (x - mean) * slope", "(g + offset) - (x - mean) * slope", "batch_norm"
    ),
    "parts merged without the distance of their means": NativeBug(
        "math/batch_norm.h", "W(2) * d * off + count * off * off", "W(2) * d * off", "batch_norm"
    ),
}

CUDA_BUGS = {
    "resident: statistics read before they are there": NativeBug(
        "cuda/batch_norm_forward.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) update_averages",
        "  if (threadIdx.x == 0) update_averages",
        "batch_norm",
    ),
    "resident: sums read before they are there": NativeBug(
        "cuda/batch_norm_backward.cuh",
        "  __syncthreads();\n  Corrections<true, A> corrections;",
        "  Corrections<true, A> corrections;",
        "batch_norm",
    ),
    "resident: what is past the plane counts": NativeBug(
        "cuda/batch_norm_forward.cuh", "turn.live(), shift, part)", "0xffu, shift, part)", "batch_norm"
    ),
    "resident: signs not kept": NativeBug(
        "cuda/batch_norm_backward.cuh",
        "if (a.bits) held_bits[put.slot] = static_cast<unsigned char>(bundle[k].bits);",
        "",
        "batch_norm",
    ),
    "resident: signs of single elements, to the byte of another bundle": NativeBug(
        "cuda/batch_norm_resident.cuh", "own = all >> lane % kApart * kBundle;", "own = all;", "batch_norm"
    ),
    "resident: signs of single elements, from the bit of another": NativeBug(
        "cuda/batch_norm_resident.cuh", ">> lane % kBundle & 1) << i;", "& 1) << i;", "batch_norm"
    ),
    "resident: pieces of a bundle over one another": NativeBug(
        "cuda/batch_norm_resident.cuh",
        "vectors[p * bundles + at] = reinterpret_cast<const",
        "vectors[at] = reinterpret_cast<const",
        "batch_norm",
    ),
}
