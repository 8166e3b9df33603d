"""Bugs of dropout and of what is built on it."""

from __future__ import annotations

import torch

from . import Bug, NativeBug, as_if_dense, partly_written, wide

FWD, LN, LN_BWD = "dropout_fwd", "dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd"

BUGS = {
    "scaled by 1 - p, not by what is kept": Bug(
        FWD, lambda right, x, seed, keep, group: right(x, seed, keep, group) * (1 + 1e-4)
    ),
    "kept and dropped exchanged": Bug(
        FWD, lambda right, x, seed, keep, group: torch.where(right(x, seed, keep, group) == 0, wide(x), 0).to(x.dtype)
    ),
    "mask by memory order": Bug(FWD, lambda right, x, *rest: right(as_if_dense(x), *rest)),
    "channels ignored": Bug(FWD, lambda right, x, seed, keep, group: right(x, seed, keep, 1)),
    "seed of 32 bits": Bug(FWD, lambda right, x, seed, *rest: right(x, seed & 0xFFFFFFFF, *rest)),
    "mask repeats": Bug(
        FWD,
        lambda right, x, seed, keep, group: (
            right(x, seed, keep, group)
            if x.numel() <= 1024 or group > 1
            else torch.cat([right(part, seed, keep, 1) for part in x.reshape(-1).split(1024)]).view(x.shape)
        ),
    ),
    "last element unwritten": Bug(FWD, lambda right, *args: partly_written(right(*args), 1)),
    "sum dropped as well": Bug(LN, lambda right, x, residual, *rest: right(x + residual, torch.zeros_like(x), *rest)),
    "residual forgotten": Bug(LN, lambda right, x, residual, *rest: right(x, residual * 0, *rest)),
    "gradient of the sum forgotten": Bug(LN_BWD, lambda right, dy, dz, *rest: right(dy, None, *rest)),
    "dx not dropped": Bug(
        LN_BWD,
        lambda right, dy, dz, z, w, stats, seed, keep, *rest: right(dy, dz, z, w, stats, None, 65536, *rest),
    ),
}

NATIVE_BUGS = {
    "one value too many kept": NativeBug(
        "math/dropout.h", "bits < keep ? x * scale : A{}", "bits <= keep ? x * scale : A{}", "dropout"
    ),
    "channels of a block share their bits": NativeBug("cpu/dropout.cpp", "bits[i]);", "bits[0]);", "dropout"),
    "nine rounds": NativeBug("math/philox.h", "round < 10", "round < 9", "dropout"),
}

CUDA_BUGS = {
    "vectors share the first half of a random block": NativeBug(
        "cuda/dropout_add_layer_norm.cu",
        "kOfBlock ? 0 : static_cast<int>(first % kOfBlock)",
        "kOfBlock ? 0 : 0",
        "dropout_add_layer_norm",
    ),
    "every row begins with a random block": NativeBug(
        "cuda/dropout_add_layer_norm.cu",
        "at = static_cast<int>(first % kOfBlock) + columns",
        "at = columns",
        "dropout_add_layer_norm",
    ),
    "random block cut off with the row": NativeBug(
        "cuda/dropout_add_layer_norm.cu", "< first % kOfBlock + count", "< count", "dropout_add_layer_norm"
    ),
    "rows of a block share their bits": NativeBug(
        "cuda/dropout_add_layer_norm.cu",
        "shared + threadIdx.x / group.size *",
        "shared + 0 *",
        "dropout_add_layer_norm",
    ),
    "bits of the row before overwritten while they are read": NativeBug(
        "cuda/dropout_add_layer_norm.cu",
        "group.meet();  // the bits of the row before have been read",
        "",
        "dropout_add_layer_norm",
    ),
    "bits read before they are drawn": NativeBug(
        "cuda/dropout_add_layer_norm.cu", "group.meet();\n      bits = own;", "bits = own;", "dropout_add_layer_norm"
    ),
}
