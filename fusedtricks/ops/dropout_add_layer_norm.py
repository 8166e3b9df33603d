"""y = LayerNorm(dropout(x) + residual), the seam between two blocks of a transformer, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedtricks._op import Op, apply, differentiating, leaf, transforming
from fusedtricks._pair import pair, recorded
from fusedtricks.ops import _norm, layer_norm, rms_norm
from fusedtricks.ops._philox import DRAW, Seed, drawn, new_seed
from fusedtricks.ops.dropout import drop, keep_of

# z = dropout(x) + residual, y = LayerNorm(z) with `center`, else RMSNorm(z), over the trailing `dims` dimensions. All
# tensors of x's shape are contiguous. seed and keep as in dropout.py; keep 65536 needs no seed. stats as layer_norm_fwd
# and rms_norm_fwd return them.
dropout_add_layer_norm_fwd = Op(
    "dropout_add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int keep, "
    "float eps, int dims, bool center) -> (Tensor y, Tensor z, Tensor stats)",
    stem="dropout_add_layer_norm",
)
# dresidual = dz + the gradient of z through y; dx = dropout(dresidual), with the same bits. What is not wanted comes as
# an empty tensor.
dropout_add_layer_norm_bwd = Op(
    "dropout_add_layer_norm_bwd(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor stats, Tensor? seed, int keep, "
    "int dims, bool center, bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    stem="dropout_add_layer_norm",
)


def add(x: Tensor, residual: Tensor, seed: Tensor | None, keep: int) -> Tensor:
    """dropout(x) + residual in the accumulation dtype."""
    wide = x.to(_norm.accumulate_dtype(x.dtype))
    return (wide if seed is None else drop(wide, seed, keep, 1)) + residual.to(wide.dtype)


@dropout_add_layer_norm_fwd.reference
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    keep: int,
    eps: float,
    dims: int,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = add(x, residual, seed, keep).to(x.dtype)
    if center:
        y, stats = layer_norm.layer_norm_fwd.implementation("reference")(z, weight, bias, eps, dims)
    else:
        y, stats = rms_norm.rms_norm_fwd.implementation("reference")(z, weight, eps, dims)
    return y, z, stats


@dropout_add_layer_norm_bwd.reference
def _(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    keep: int,
    dims: int,
    center: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    through = need_dx or need_dresidual
    # In the accumulation dtype, so that the sum with dz is rounded once.
    wide, w = z.to(stats.dtype), weight if weight is None else weight.to(stats.dtype)
    if center:
        bwd = layer_norm.layer_norm_bwd.implementation("reference")
        total, dweight, dbias = bwd(dy, wide, w, stats, dims, through, need_dweight, need_dbias)
    else:
        bwd = rms_norm.rms_norm_bwd.implementation("reference")
        total, dweight = bwd(dy, wide, w, stats, dims, through, need_dweight)
        dbias = dweight.new_empty(0)
    dx, dresidual = z.new_empty(0), z.new_empty(0)
    if through:
        total = (total if dz is None else total + dz).to(z.dtype)
        dresidual = total if need_dresidual else dresidual
        dx = dx if not need_dx else total.clone() if seed is None else drop(total, seed, keep, 1)
    kind = stats.dtype if weight is None else weight.dtype
    return dx, dresidual, dweight.to(kind), dbias.to(kind)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        keep: int,
        eps: float,
        dims: int,
        center: bool,
    ) -> tuple[Tensor, Tensor]:
        y, z, stats = forward(x, residual, weight, bias, seed, keep, eps, dims, center)
        ctx.strides = tuple(_norm.strides_like(t) for t in (x, residual))
        z = _norm.laid_out(z, ctx.strides[0])
        ctx.save_for_backward(z, weight, stats, seed)  # the sum that is returned: second derivatives go through it
        ctx.set_materialize_grads(False)
        ctx.keep, ctx.eps, ctx.dims, ctx.center = keep, eps, dims, center
        return _norm.laid_out(y, ctx.strides[0]), z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, stats, seed = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if dy is None and dz is None:
            return (None,) * 9
        run = dropout_add_layer_norm_bwd
        if differentiating():
            run = run.implementation("reference")
            of = layer_norm if ctx.center else rms_norm
            stats = of.statistics(z, ctx.eps, ctx.dims)
        dy = torch.zeros_like(z) if dy is None else dy
        dz = None if dz is None else dz.contiguous()
        grads = run(dy, dz, z.contiguous(), weight, stats, seed, ctx.keep, ctx.dims, ctx.center, *need)
        dx, dresidual = (_norm.laid_out(g, s) if n else g for g, s, n in zip(grads, ctx.strides, need, strict=False))
        grads = (dx, dresidual, *grads[2:])
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 5


_node = pair(
    _DropoutAddLayerNorm,
    dropout_add_layer_norm_fwd,
    dropout_add_layer_norm_bwd,
    returned=2,
    laid_out=("x", "residual"),
    contiguous=("dz",),
)


def forward(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dropout_add_layer_norm_fwd(x.contiguous(), residual.contiguous(), *rest)


def run(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Seed | None,
    keep: int,
    eps: float,
    dims: int,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """y and z."""
    args = (weight, bias, seed, keep, eps, dims, center)
    if x.is_contiguous() and residual.is_contiguous() and (both := recorded(_node, x, residual, *args)) is not None:
        return both
    args = (weight, bias, drawn(seed, x.device), keep, eps, dims, center)
    if transforming():
        y, z, _ = dropout_add_layer_norm_fwd.implementation("reference")(x, residual, *args)
        return y, z
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return apply(_DropoutAddLayerNorm, x, residual, *args)
    y, z, _ = forward(x, residual, *args)
    strides = _norm.strides_like(x)
    return _norm.laid_out(y, strides), _norm.laid_out(z, strides)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    *,
    rms: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(dropout(x) + residual), with dropout's mask recomputed in backward and never stored.

    Args:
        x, residual: (*, *normalized_shape), float32, bfloat16, float16 or float64, any strides; of different dtypes,
            both are taken in the wider.
        weight, bias: the normalized shape, or None; without a weight the last dimension is normalised.
        p: as in :func:`dropout`, which this draws the same elements as for the same seed.
        eps: added to the variance.
        training: False drops nothing and draws nothing.
        prenorm: also return the sum that was normalised, for the next block's residual.
        rms: RMSNorm instead; takes no bias.
        generator: where the seed is drawn, on the device of x; default: torch's own.

    Returns:
        y, or (y, sum) with prenorm; gradients flow through both. They have the shape and memory format of x. The sum is
        rounded to the dtype of x before it is measured, so backward sees what forward saw.

    Raises:
        ValueError: p outside [0, 1]; a bias with rms.
        RuntimeError: shapes or devices that do not match.
        NotImplementedError: an integer or complex x.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if rms and bias is not None:
        raise ValueError("dropout_add_layer_norm: rms takes no bias")
    shape = tuple(x.shape[-1:]) if weight is None else tuple(weight.shape)
    dims = _norm.check("dropout_add_layer_norm", x, shape, weight, bias)
    if not dims:
        raise NotImplementedError("dropout_add_layer_norm: expected dense tensors, but got a nested one")
    if residual.shape != x.shape or residual.device != x.device or residual.dtype not in _norm.FLOATS:
        raise RuntimeError(
            f"dropout_add_layer_norm: expected residual to be floating, of the shape and device of x, {list(x.shape)} "
            f"on {x.device}, but got {residual.dtype} of shape {list(residual.shape)} on {residual.device}"
        )
    x, residual, weight, bias = _norm.autocast_fp32(x, residual, weight, bias)
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = (t.to(_norm.accumulate_dtype(x.dtype)) for t in (weight, bias))
    random = training and p > 0 and x.numel() > 0
    seed, keep = None, 65536
    if random:
        seed, keep = DRAW if generator is None else new_seed(x.device, generator), keep_of(p)
    y, z = run(x, residual, weight, bias, seed, keep, eps, dims, not rms)
    return (y, z) if prenorm else y


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` of dropout(x) + residual: its parameters and state_dict, and `p`, `prenorm`, `rms`.

    Called with x and residual; see :func:`dropout_add_layer_norm`. With `rms` there is no bias.
    """

    def __init__(
        self,
        normalized_shape: Any,
        p: float = 0.1,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        prenorm: bool = False,
        rms: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        super().__init__(normalized_shape, eps, elementwise_affine, bias and not rms, device=device, dtype=dtype)
        self.p, self.prenorm, self.rms = p, prenorm, rms

    def forward(self, x: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return leaf(self, x, residual)
        weight = self.weight
        if weight is None and len(self.normalized_shape) > 1:
            weight = torch.ones(self.normalized_shape, dtype=x.dtype, device=x.device)
        return dropout_add_layer_norm(
            x, residual, weight, self.bias, self.p, self.eps, self.training, self.prenorm, rms=self.rms
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}, rms={self.rms}"
