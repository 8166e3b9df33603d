"""Replace torch's modules in a model by the ones of this package, in place, and put them back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusedtricks import nn

# torch's class -> ours. Ours subclass torch's and override `forward` alone, so a module changes sides by changing its
# class; a class whose constructor keeps more than torch's could not.
COUNTERPARTS: dict[type, type] = {
    getattr(torch.nn, name): cls
    for name, cls in vars(nn).items()
    if isinstance(cls, type) and getattr(torch.nn, name, None) in cls.__mro__ and "__init__" not in vars(cls)
}


@dataclass
class Swapped:
    """What was done: names of modules, as `named_modules` gives them, with what happened or why nothing did."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def _reason(module: torch.nn.Module) -> str | None:
    """Why a module that looks replaceable is not; None if it is."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized, which gives it a class of its own"
    return None


def _exchange(model: torch.nn.Module, classes: dict[type, type], verbose: bool) -> Swapped:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap: expected a torch.nn.Module, but got {type(model).__name__}")
    done = Swapped()
    for name, module in model.named_modules():
        kind = type(module)
        base = next((c for c in kind.__mro__ if c in classes), None)
        if base is None or kind in classes.values():
            continue
        if isinstance(module, torch.jit.ScriptModule):
            done.left[name] = "it is a TorchScript module"
        elif reason := _reason(module):
            done.left[name] = f"{kind.__name__}: {reason}"
        elif kind is not base:
            done.left[name] = f"{kind.__module__}.{kind.__qualname__} is a subclass of {base.__name__}"
        else:
            module.__class__ = classes[kind]
            package, other = (c.__module__.split(".")[0] for c in (kind, classes[kind]))
            done.replaced[name] = f"{kind.__name__} of {package} -> {other}"
    if verbose:
        print(done)
    return done


def swap(model: torch.nn.Module, *, verbose: bool = True) -> Swapped:
    """Replace every torch.nn module of `model` that this package has by ours, in place.

    The modules themselves stay, so parameters, buffers, hooks, training mode, names, state_dict, optimizers and
    references held elsewhere do too; only their `forward` is another. Subclasses of torch's classes are left alone, for
    what they changed is theirs to know.

    torch.compile, torch.export, torch.jit.trace and torch.fx take the model as before. TorchScript does not compile
    ours: :func:`unswap` comes before `torch.jit.script`.

    Returns:
        What was replaced, and what was left and why; printed as well unless `verbose` is False.

    Raises:
        TypeError: `model` is no module.
    """
    return _exchange(model, COUNTERPARTS, verbose)


def unswap(model: torch.nn.Module, *, verbose: bool = True) -> Swapped:
    """Put torch's own modules back in place of ours; see :func:`swap`."""
    return _exchange(model, {ours: theirs for theirs, ours in COUNTERPARTS.items()}, verbose)
