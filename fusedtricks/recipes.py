"""Parts of training recipes that are settings rather than kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Their weights and biases scale and shift: decay would only pull them to zero.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


class ParamGroups(list[dict[str, Any]]):
    """Groups for an optimizer; `print` shows which parameter went where."""

    def __str__(self) -> str:
        lines = []
        for group in self:
            count = sum(p.numel() for _, p in group["params"])
            lines.append(
                f"weight_decay {group['weight_decay']:g}: {len(group['params'])} tensors, {count:,} parameters"
            )
            lines += [f"  {name:50} {tuple(p.shape)}" for name, p in group["params"]]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay_modules: tuple[type[nn.Module], ...] = (),
    no_decay_names: Iterable[str] = (),
) -> ParamGroups:
    """Weight decay for weights alone: none for biases and for the parameters of normalization layers.

    The "no bias decay" of He et al. 2019, "Bag of Tricks for Image Classification" (arXiv:1812.01187), section 3.1.

    Args:
        model: its parameters that require gradients are taken, each once.
        weight_decay: of the first group; the second has 0.
        no_decay_modules: further module types whose own parameters get none, such as `torch.nn.Embedding`.
        no_decay_names: regular expressions; a parameter whose full name one of them matches anywhere gets none.

    Returns:
        One or two dicts of named parameters with their `weight_decay`, for any torch or fusedtricks optimizer.

    Raises:
        ValueError: a negative weight_decay, a pattern that matches nothing, a model without trainable parameters.
    """
    if not weight_decay >= 0:
        raise ValueError(f"param_groups: expected weight_decay >= 0, got {weight_decay}")
    patterns = {pattern: re.compile(pattern) for pattern in no_decay_names}
    unused, seen = set(patterns), set()
    decayed: list[tuple[str, torch.nn.Parameter]] = []
    kept: list[tuple[str, torch.nn.Parameter]] = []
    for prefix, module in model.named_modules():
        of_norm = isinstance(module, (*NORMALIZATIONS, *no_decay_modules))
        for short, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            matching = {pattern for pattern, regex in patterns.items() if regex.search(name)}
            unused -= matching
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            bias = short == "bias" or short.endswith("_bias") or re.fullmatch(r"bias_[ih]h_l\d+(_reverse)?", short)
            (kept if of_norm or bias or matching else decayed).append((name, p))
    if unused:
        raise ValueError(f"param_groups: no parameter's name matches {', '.join(sorted(unused))}")
    groups = ((decayed, weight_decay), (kept, 0.0))
    found = ParamGroups({"params": params, "weight_decay": decay} for params, decay in groups if params)
    if not found:
        raise ValueError("param_groups: the model has no parameters that require gradients")
    return found


def zero_init_residual(
    blocks: Iterable[nn.Module], kinds: tuple[type, ...] = (nn.modules.batchnorm._BatchNorm,)
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
        nn.init.zeros_(found[-1].weight)
        done += 1
    return done
