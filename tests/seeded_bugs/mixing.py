"""Bugs of mixup, cutmix and shake_shake."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Bug, NativeBug, as_if_dense, partly_written

MIX, MIX_, MIX_BWD, CUT, CUT_BWD = "mixup_fwd", "mixup_fwd_", "mixup_bwd", "cutmix_fwd", "cutmix_bwd"
SHAKE, SHAKE_BWD = "shake_shake_fwd", "shake_shake_bwd"


def in_place_too_soon(right, x: Tensor, lam: Tensor, perm: Tensor) -> None:
    """M1: partners that have been overwritten already."""
    for i, j in enumerate(perm.tolist()):
        weight = lam.reshape(-1)[i if lam.numel() > 1 else 0]
        x[i] = (weight * x[i] + (1 - weight) * x[j]).to(x.dtype)


BUGS = {
    "in place over its partners": Bug(MIX_, in_place_too_soon),
    "weights exchanged": Bug(MIX, lambda right, x, lam, *rest: right(x, 1 - lam, *rest)),
    "one lam for all": Bug(MIX, lambda right, x, lam, *rest: right(x, lam.reshape(-1)[:1], *rest)),
    "partner by the inverse": Bug(MIX, lambda right, x, lam, perm, *rest: right(x, lam, perm.argsort(), *rest)),
    "input strides ignored": Bug(MIX, lambda right, x, *rest: right(as_if_dense(x), *rest)),
    "last element unwritten": Bug(MIX, lambda right, *args: partly_written(right(*args), 1)),
    "gradient by the permutation itself": Bug(MIX_BWD, lambda right, dy, lam, perm: right(dy, lam, perm.argsort())),
    "gradient of the sample alone": Bug(
        MIX_BWD, lambda right, dy, lam, perm: right(dy, lam, torch.arange(perm.numel())) if perm.numel() else dy
    ),
    "box shifted by one": Bug(CUT, lambda right, x, perm, box: right(x, perm, box + 1)),
    "rows and columns of the box exchanged": Bug(CUT, lambda right, x, perm, box: right(x, perm, box[:, [2, 3, 0, 1]])),
    "one box for all": Bug(CUT, lambda right, x, perm, box: right(x, perm, box[:1])),
    "gradient inside the box lost": Bug(CUT_BWD, lambda right, dy, perm, box: right(dy, perm, box) * (dy != 0) * 0),
    "alpha for both branches": Bug(SHAKE, lambda right, x1, x2, alpha: right(x1, x1, alpha)),
    "beta for both branches": Bug(SHAKE_BWD, lambda right, dy, beta: (right(dy, beta)[0], right(dy, beta)[0].clone())),
}

NATIVE_BUGS = {
    "weights exchanged in C++": NativeBug(
        "math/mixup.h", "own * of_own + partner * of_partner", "own * of_partner + partner * of_own", "mixup"
    ),
    "gradient of short samples by their own weight alone": NativeBug(
        "cpu/mixup.cpp", "weight(Transposed ? j : i)", "weight(i)", "mixup"
    ),
}

CUDA_BUGS = {
    "strip used before it is whole": NativeBug(
        "cuda/mixup.cu", "  __syncthreads();\n  for (int at", "  for (int at", "mixup"
    ),
    "gradient of the box by the wrong sample": NativeBug(
        "cuda/cutmix.cu",
        "cut[k] = a.inside<Width>(i, column);",
        "cut[k] = a.inside<Width>(piece.sample, column);",
        "cutmix",
    ),
}
