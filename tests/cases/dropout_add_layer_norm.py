"""dropout_add_layer_norm with its seed given. A shape is (size, normalised dimensions, whether both outputs)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cases import Case, Shape
from cases._norm import parameter, randn
from fusedtricks.ops import dropout
from fusedtricks.ops import dropout_add_layer_norm as op


def inputs(size: tuple[int, ...], dims: int, *_: object) -> tuple[Tensor, ...]:
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    return randn(*size), randn(*size), parameter(size, dims), parameter(size, dims), seed


def in_one_dtype(fn: Any, *tensors: Any, p: float, rms: bool, prenorm: bool) -> Any:
    """In the widest dtype of all, since z is rounded to the operator's; results are of x's.

    fp32 parameters of 16-bit rows are in test_dropout_add_layer_norm.py.
    """
    *floating, seed = tensors
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in floating if t is not None])
    y, z = fn(*(t if t is None else t.to(dtype) for t in floating), seed, p, rms)
    if y.requires_grad and not z.requires_grad:
        z = z + 0 * y  # where only parameters are trained: the tests differentiate every output
    return (y.to(tensors[0].dtype), z.to(tensors[0].dtype)) if prenorm else y.to(tensors[0].dtype)


def ours(x: Tensor, residual: Tensor, weight: Any, bias: Any, seed: Tensor, p: float, rms: bool) -> tuple[Tensor, ...]:
    dims = weight.dim() if weight is not None else bias.dim() if bias is not None else 1
    random = (None, 65536) if p == 0 else (seed, dropout.keep_of(p))
    return op.run(x, residual, weight, None if rms else bias, *random, 1e-5, dims, not rms)


def expected(x: Tensor, residual: Tensor, weight: Any, bias: Any, seed: Tensor, p: float, rms: bool) -> Any:
    keep = dropout.keep_of(p)
    kept = dropout.kept(x.shape, seed, keep, 1)
    z = torch.where(kept, x / (keep / 65536), 0) + residual
    shape = (
        z.shape[-(weight if weight is not None else bias).dim() :] if (weight, bias) != (None, None) else z.shape[-1:]
    )
    if rms:
        return torch.nn.functional.rms_norm(z, shape, weight, 1e-5), z
    return torch.nn.functional.layer_norm(z, shape, weight, bias, 1e-5), z


SHAPES: dict[str, Shape] = {
    **{f"C={c}": ((5, c), 1) for c in (3, 8, 17, 129, 1000)},
    "C=4097, several chunks of bits": ((3, 4097), 1),
    "C=20000 longer than a block": ((2, 20000), 1),
    "one dimension": ((40,), 1),
    "no rows": ((0, 8), 1),
    "no columns": ((4, 0), 1),
    "rows past a block of rows": ((257, 33), 1),
    "3-D": ((2, 7, 40), 1),
    "two dimensions normalised": ((4, 3, 50), 2),
    "images": ((2, 3, 4, 18), 1),
}

CASE = Case(
    fn=functools.partial(in_one_dtype, ours),
    torch_fn=functools.partial(in_one_dtype, expected),
    names=("x", "residual", "weight", "bias", "seed"),
    optional=("weight", "bias"),
    fixed=("seed",),
    inputs=inputs,
    call=lambda fn, t, dims, prenorm=True, p=0.3, rms=False: fn(*t, p=p, rms=rms, prenorm=prenorm),
    shapes=SHAPES,
    shape="3-D",
    layout_shapes=("3-D", "images"),
    small={"rows": ((3, 5), 1, False), "both outputs": ((3, 5), 1)},
    large={"narrow rows": ((1033, 33), 1), "wide rows": ((37, 4097), 1)},
    growing=(((3, 40), 1), ((7, 40), 1), ((129, 40), 1)),
    gpu={"narrow": ((300, 129), 1), "wide": ((5, 4097), 1), "strips": ((3, 40000), 1)},
    options={"p=0": {"p": 0.0}, "p=1/2": {"p": 0.5}},
    rowwise=False,
)
