"""Parts of training recipes that are settings rather than kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

# Their weights and biases scale and shift: decay would only pull them to zero.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)

# in_proj_bias, bias_k and bias_v are attention's; bias_ih and bias_hh those of recurrent cells; layers add a number.
_BIAS = re.compile(r"(.*_)?bias|bias_[kv]|bias_[ih]h(_l\d+(_reverse)?)?")


class ParamGroups(list[dict[str, Any]]):
    """Groups for an optimizer; `print` shows which parameter went where."""

    def __str__(self) -> str:
        lines = []
        for group in self:
            count = sum(p.numel() for _, p in group["params"] if not is_lazy(p))
            lazy = sum(is_lazy(p) for _, p in group["params"])
            lines.append(
                f"weight_decay {group['weight_decay']:g}: {len(group['params'])} tensors, {count:,} parameters"
                + (f", {lazy} uninitialized" if lazy else "")
            )
            lines += [f"  {name:50} {'uninitialized' if is_lazy(p) else tuple(p.shape)}" for name, p in group["params"]]
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
    A shared parameter gets no decay if it is a bias, of a normalization or excluded in any of its places. A
    parametrized one (`torch.nn.utils.parametrize`) counts as what it stands for, in the module that is parametrized.

    Args:
        model: its parameters that require gradients are taken, each once.
        weight_decay: of the first group; the second has 0.
        no_decay_modules: further module types whose own parameters get none, such as `torch.nn.Embedding`.
        no_decay_names: regular expressions; a parameter gets none if one matches anywhere in one of its full names.

    Returns:
        One or two dicts of named parameters with their `weight_decay`, for any torch or fusedtricks optimizer.

    Raises:
        TypeError: no_decay_names is one string.
        ValueError: a negative weight_decay, a pattern that matches nothing, a model without trainable parameters.
    """
    if not weight_decay >= 0:
        raise ValueError(f"param_groups: expected weight_decay >= 0, got {weight_decay}")
    if isinstance(no_decay_names, str):
        raise TypeError(f"param_groups: expected an iterable of patterns as no_decay_names, got {no_decay_names!r}")
    patterns = {pattern: re.compile(pattern) for pattern in no_decay_names}
    unused = set(patterns)
    first: dict[torch.nn.Parameter, str] = {}
    spared: set[torch.nn.Parameter] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        for short, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = meant = f"{prefix}.{short}" if prefix else short
            owner = module
            path = prefix.split(".")
            if isinstance(module, ParametrizationList) and path[-2:-1] == ["parametrizations"]:
                *outer, _, short = path
                owner, meant = modules[".".join(outer)], ".".join((*outer, short))
            matching = {pattern for pattern, regex in patterns.items() if regex.search(name) or regex.search(meant)}
            unused -= matching
            if not p.requires_grad:
                continue
            first.setdefault(p, name)
            if matching or isinstance(owner, (*NORMALIZATIONS, *no_decay_modules)) or _BIAS.fullmatch(short):
                spared.add(p)
    if unused:
        raise ValueError(f"param_groups: no parameter's name matches {', '.join(sorted(unused))}")
    decayed = [(name, p) for p, name in first.items() if p not in spared]
    kept = [(name, p) for p, name in first.items() if p in spared]
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
            branch, or pass the branch alone, as `[branch]`.
        kinds: classes of normalization.

    Returns:
        The number of blocks.

    Raises:
        TypeError: blocks is itself a module, other than a `torch.nn.ModuleList`.
        ValueError: a block without such a module, or whose last one has no weight.
    """
    # The children of an `nn.Sequential` may be blocks as well as the parts of one, whose every norm would become zero.
    if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList):
        raise TypeError(
            f"zero_init_residual: expected an iterable of blocks, got a {type(blocks).__name__}; "
            "pass [module] if it is one block, module.children() if its children are blocks"
        )
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
