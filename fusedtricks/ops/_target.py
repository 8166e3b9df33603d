"""The target of a mixed sample, made by mixup and cutmix and consumed by the losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MixedTarget(NamedTuple):
    """Two class labels and their mixing weight: the loss of a sample is lam CE(a) + (1 - lam) CE(b).

    `a` and `b` are class indices of one shape and dtype; `lam`, in [0, 1], is a 0-dim tensor for the whole batch or one
    of shape (N,). Being a tuple of tensors it goes through torch.compile, data loaders and tree maps as it is.

    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2.
    """

    a: Tensor
    b: Tensor
    lam: Tensor

    def to(self, *args: object, **kwargs: object) -> MixedTarget:
        """As `Tensor.to`; a dtype changes `lam` alone, since labels stay integers."""
        lam = self.lam.to(*args, **kwargs)
        keep = {k: v for k, v in kwargs.items() if k in ("non_blocking", "copy")}
        return MixedTarget(*(t.to(lam.device, **keep) for t in (self.a, self.b)), lam)
