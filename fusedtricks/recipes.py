"""Training recipes around the operations."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def zero_init_residual(
    blocks: Iterable[torch.nn.Module], kinds: tuple[type, ...] = (torch.nn.modules.batchnorm._BatchNorm,)
) -> int:
    """Set the weight of the last normalization of each residual block to zero, so that every block starts as its
    shortcut.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", section 5.1.

    Args:
        blocks: residual branches, such as `(m for m in model.modules() if isinstance(m, Block))`. The last module of
            `kinds` in the order of registration is the one; name a normalization of the shortcut before those of the
            branch, or pass the branch alone.
        kinds: classes of normalization.

    Returns:
        The number of blocks.

    Raises:
        ValueError: a block without such a module, or whose last one has no weight.
    """
    done = 0
    for block in blocks:
        found = [m for m in block.modules() if isinstance(m, kinds)]
        if not found or getattr(found[-1], "weight", None) is None:
            raise ValueError(
                f"zero_init_residual: expected {type(block).__name__} to end with one of "
                f"{[k.__name__ for k in kinds]} that has a weight"
            )
        torch.nn.init.zeros_(found[-1].weight)
        done += 1
    return done
