"""The dispatch mechanism: an operator, its implementations, and which of them runs.

The PyTorch dispatcher is the routing table. An `Op` defines a schema once; its reference is registered at
`CompositeExplicitAutograd`, which makes it the definition, the fallback on every device and the fake kernel of
`torch.compile` at once. Compiled kernels (`fusedtricks._C`) list themselves and are put at the CPU and CUDA keys here;
where Triton is the recorded choice for CUDA, its launcher takes that key.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import library

# Absent when the package was built without a compiler: Triton then serves GPUs and the reference CPUs.
_C = importlib.import_module("fusedtricks._C") if importlib.util.find_spec("fusedtricks._C") else None


def for_this_torch(name: str) -> Any:
    """An extension built on torch's own headers, or None where it was not built, or for another torch."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        found = importlib.import_module(name)
    except ImportError:
        return None
    return found if torch.__version__.startswith(getattr(found, "torch", "?")) else None


# Without it operators are called and recorded in Python: see _pair.py.
_node = for_this_torch("fusedtricks._node")

BACKENDS = ("reference", "cpu", "cuda", "triton")
_NAMESPACE = "fusedtricks"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_libraries: dict[str, library.Library] = {}
_forced: str | None = None


def _library(namespace: str) -> library.Library:
    if namespace not in _libraries:
        _libraries[namespace] = library.Library(namespace, "FRAGMENT")
    return _libraries[namespace]


def _compiled(name: str) -> dict[str, int]:
    """Compiled kernels of one operator that run on this machine: {"cpu:avx2": index, ..., "cuda": index}, best last."""
    return {} if _C is None else {k.backend: i for i, k in enumerate(_C.kernels()) if k.op == name and k.runs_here}


class Op:
    """One operator: schema, reference, kernels.

    `schema` is torch's schema syntax, name first. `cuda` is the back end that serves CUDA tensors when both exist:
    "triton" or "cuda"; `why` says on what ground, naming a file under bench/results/ once one has decided it.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(self, schema: str, *, stem: str, cuda: str = "triton", why: str = "default until measured"):
        self.name = schema.split("(", 1)[0]
        self.schema, self.stem, self.prefer, self.why = schema, stem, cuda, why
        self.kernels = _compiled(self.name)
        self._implementations: dict[str, Callable[..., Any]] = {}
        _library(_NAMESPACE).define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.default = getattr(getattr(torch.ops, _NAMESPACE), self.name).default
        # What OpOverload.__call__ forwards to: a tenth of the time of a small call.
        self._direct = getattr(self.default, "_op", self.default)
        if self.cpu:
            _C.register(self.kernels[self.cpu], _NAMESPACE)
        if self.cuda == "cuda":
            _C.register(self.kernels["cuda"], _NAMESPACE)
        elif self.cuda == "triton":
            _library(_NAMESPACE).impl(self.name, self._launch_triton, "CUDA")
        Op.registry[self.name] = self

    @property
    def cpu(self) -> str | None:
        """The CPU kernel in use, such as "cpu:avx512"; None where the reference serves."""
        return next((k for k in reversed(self.kernels) if k.startswith("cpu:")), None)

    @property
    def cuda(self) -> str | None:
        """What serves CUDA tensors: "triton", "cuda", or None for the reference."""
        available = [b for b, there in (("cuda", "cuda" in self.kernels), ("triton", self.has_triton)) if there]
        return self.prefer if self.prefer in available else next(iter(available), None)

    @functools.cached_property
    def has_triton(self) -> bool:
        return _HAS_TRITON and importlib.util.find_spec(f"fusedtricks.triton_kernels.{self.stem}") is not None

    def _launch_triton(self, *args: Any) -> Any:
        return self.implementation("triton")(*args)

    def reference(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: `fn`, in plain PyTorch, defines the operator."""
        _library(_NAMESPACE).impl(self.name, fn, "CompositeExplicitAutograd")
        self._implementations["reference"] = fn
        return fn

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The callable of one back end ("reference", "cpu", "cpu:avx2", "cuda", "triton"), whatever the default is."""
        if backend == "cpu" and self.cpu:
            backend = self.cpu
        found = self._implementations.get(backend)
        if found is None:
            found = self._implementations[backend] = self._find(backend)
        return found

    def _find(self, backend: str) -> Callable[..., Any]:
        if backend == "triton" and self.has_triton:
            return getattr(importlib.import_module(f"fusedtricks.triton_kernels.{self.stem}"), self.name)
        if backend in self.kernels:
            # A namespace for each compiled back end, so that one can be forced without touching the default.
            namespace = f"{_NAMESPACE}_{backend.replace(':', '_')}"
            _library(namespace).define(self.schema)
            _C.register(self.kernels[backend], namespace)
            return getattr(getattr(torch.ops, namespace), self.name).default
        raise RuntimeError(
            f"fusedtricks: {self.name} has no '{backend}' implementation here; available: "
            f"{', '.join(self.available())}. fusedtricks.backends() shows the reasons."
        )

    def available(self) -> list[str]:
        return ["reference", *self.kernels, *(["triton"] if self.has_triton else [])]

    def __call__(self, *args: Any) -> Any:
        if _forced is not None:
            return self.implementation(_forced)(*args)
        return self.default(*args) if torch.compiler.is_compiling() else self._direct(*args)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one back end for every fusedtricks call made inside the block, from any thread.

    `name` is "reference", "cpu", "cuda" or "triton"; "cpu:baseline", "cpu:avx2" and "cpu:avx512" force one instruction
    set. An operator without that back end raises RuntimeError, as does an unknown name (ValueError). A backward that
    runs after the block uses the default again.
    """
    if name.split(":")[0] not in BACKENDS:
        raise ValueError(f"fusedtricks.backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    before = _forced
    try:
        _force(name)
        yield
    finally:
        _force(before)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    if _node is not None and not torch.compiler.is_compiling():  # what is compiled asks the variable, while traced
        _node.force(name is not None)


class Row(NamedTuple):
    op: str
    cpu: str
    cuda: str
    why: str


def table() -> list[Row]:
    """What runs each operator on CPU and on CUDA tensors, and why."""
    rows = []
    for op in Op.registry.values():
        reasons = []
        if not op.cpu:
            reasons.append("no compiled kernels in this build" if _C is None else "no CPU kernel for this operator")
        if op.cuda != op.prefer:
            missing = (
                "triton is not installed" if op.prefer == "triton" and not _HAS_TRITON else f"{op.prefer} not built"
            )
            reasons.append(f"cuda: {missing}")
        else:
            reasons.append(f"cuda: {op.why}")
        rows.append(Row(op.name, op.cpu or "reference", op.cuda or "reference", "; ".join(reasons)))
    return rows


def backends() -> None:
    """Print which implementation runs each operator on CPU and on CUDA tensors, and why."""
    rows = [Row("operator", "CPU tensors", "CUDA tensors", "why"), *table()]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * w for w in widths))


def transforming() -> bool:
    """True inside torch.func transforms (vmap, grad, jvp) or forward-mode AD, which need plain PyTorch operations."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`. torch.compile takes no tensor twice, and with `dynamic=True` makes inputs of floats, such as
    default arguments, which it then has to see before it is inside the function."""
    return function.apply(*(_seen(args) if torch.compiler.is_compiling() else args))


def _seen(args: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for a in args:
        if isinstance(a, torch.Tensor):
            a = a.view_as(a) if any(a is b for b in found) else a
        elif isinstance(a, float):
            a = float(a)
        elif isinstance(a, tuple):
            a = a._make(_seen(a)) if hasattr(a, "_make") else tuple(_seen(a))
        found.append(a)
    return found


def leaf(module: torch.nn.Module, *args: Any) -> torch.fx.Proxy:
    """The node of a torch.fx graph that calls `module`. fx makes one for modules of torch.nn alone, and would look
    into ours, which cannot be computed with proxies. The module stays in the graph, and train() and eval() with it."""
    tracer = args[0].tracer
    path = tracer.path_of_module(module)
    if not path:
        kind = type(module).__name__
        raise torch.fx.proxy.TraceError(f"{kind} is a leaf of torch.fx graphs: trace a module that contains it")
    return tracer.create_proxy("call_module", path, args, {})


# The vmap that torch.autograd.grad(is_grads_batched=True) runs a backward under, older than torch.func's.
_BATCHED = torch._C._dispatch_key_parse("Batched")


def readable(t: torch.Tensor) -> bool:
    """May the host look at a value of `t`? Not of a fake tensor, nor under vmap or where operations are traced."""
    plain = type(t) is torch.Tensor and not transforming() and torch._C._len_torch_dispatch_stack() == 0
    return plain and not torch._C._dispatch_keys(t).has(_BATCHED)


def seen(t: torch.Tensor) -> bool:
    """Are the values of `t` there to be checked, without waiting for a device? Also under transforms, unless vmap maps
    over them."""
    if torch.compiler.is_compiling() or type(t) is not torch.Tensor or t.device.type != "cpu":
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(t):
        t = functorch.get_unwrapped(t)
    return not functorch.is_functorch_wrapped_tensor(t) and not torch._C._dispatch_keys(t).has(_BATCHED)


def differentiating() -> bool:
    """True in a backward that must itself be differentiable (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def wants_grad(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> bool:
    """Will a backward through these inputs be recorded? If not, the autograd Function costs more than it is worth."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
