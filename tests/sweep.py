"""The parity sweep: which configurations of a case are run, on which back ends, and what each must fulfil."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import CASES, Case, Tensors
from parity import GRAD_LAYOUTS, INPUT_LAYOUTS, Guarded, assert_no_worse, assert_within, largest, written_everywhere
from torch import Tensor

from fusedtricks import _op, backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
# The interpreter takes milliseconds for each program: small shapes show all it can show.
INTERPRETER_ELEMENTS, INTERPRETER_ROWS = 10_000, 64
devices: list[str] = ["cpu"]  # set by conftest.py


def seed(number: int) -> None:
    """torch.manual_seed for the devices of this run alone, a hundred times faster."""
    torch.default_generator.manual_seed(number)
    if "cuda" in devices:
        torch.cuda.manual_seed_all(number)


class Target(NamedTuple):
    device: str
    backend: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"gpu:{self.backend}"


def targets(case: Case) -> list[Target]:
    """Every back end that serves all operators of the case, on the devices of this run."""
    common = [b for b in case.operators[0].available() if all(b in op.available() for op in case.operators)]
    if INTERPRETED:
        return [Target("cpu", "triton")] if "triton" in common else []
    on = {
        "cpu": [Target("cpu", b) for b in common if b == "reference" or b.startswith("cpu:")],
        "cuda": [Target("cuda", b) for b in common if b in ("reference", "cuda", "triton")],
    }
    return [target for device in devices for target in on[device]]


def takes(target: Target, dtype: torch.dtype) -> bool:
    """Triton kernels accumulate in fp32 and leave fp64 to others."""
    return target.backend != "triton" or dtype != torch.float64


@dataclass(frozen=True)
class Config:
    shape: str
    dtype: str = "fp32"
    params: tuple[str, ...] = ()  # dtype of each tensor after the first, where not `dtype`
    layout: str = "plain"
    param_layout: str = "plain"
    grad_layout: str = "plain"
    absent: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # tensors that do not require grad
    options: str = ""
    adversary: str = ""

    def __str__(self) -> str:
        said = [self.adversary or self.shape, self.dtype]
        said += [f"params {'+'.join(self.params)}"] if self.params else []
        said += [self.layout] if self.layout != "plain" else []
        said += [f"params {self.param_layout}"] if self.param_layout != "plain" else []
        said += [f"dy {self.grad_layout}"] if self.grad_layout != "plain" else []
        said += [f"no {'+'.join(self.absent)}"] if self.absent else []
        said += [f"frozen {'+'.join(self.frozen)}"] if self.frozen else []
        return ", ".join([*said, self.options] if self.options else said)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


def fitting(layouts: dict[str, Any], size: Sequence[int]) -> list[str]:
    return [name for name, (fewest, _, _) in layouts.items() if len(size) >= fewest]


def configurations(case: Case, *, samples: int = 120) -> list[Config]:
    """Each axis in full against defaults of the others, then a seeded sample of the whole product."""
    parameters = len(case.floating) - 1
    found = [Config(shape, dtype) for shape in case.shapes for dtype in DTYPES]
    for shape in case.layout_shapes:
        inputs, grads = fitting(INPUT_LAYOUTS, case.shapes[shape][0]), fitting(GRAD_LAYOUTS, case.shapes[shape][0])
        found += [Config(shape, layout=a, grad_layout=b) for a in inputs for b in grads]
        found += [Config(shape, dtype, layout=a) for a in inputs for dtype in DTYPES]
        found += [Config(shape, dtype, grad_layout=b) for b in grads for dtype in DTYPES]
        found += [
            Config(shape, dtype, param_layout=a) for a in ("offset by one", "every second row") for dtype in DTYPES
        ]
    mixes = [mix for mix in itertools.product(DTYPES, repeat=parameters)]
    found += [Config(case.shape, dtype, params=mix) for dtype in DTYPES for mix in mixes if {dtype} != set(mix)]
    for absent in subsets(case.optional):
        present = [name for name in case.floating if name not in absent]
        found += [
            Config(case.shape, dtype, absent=absent, frozen=frozen) for frozen in subsets(present) for dtype in DTYPES
        ]
    found += [Config(case.shape, dtype, options=name) for name in case.options for dtype in DTYPES]
    found += [Config("", NAME_OF[d], adversary=name) for name, a in case.adversaries.items() for d in a.dtypes]

    rng = random.Random(zlib.crc32(case.stem.encode()))
    for _ in range(samples):
        shape = rng.choice([s for s, (size, *_) in case.shapes.items() if math.prod(size) < 200_000])
        size = case.shapes[shape][0]
        absent = rng.choice(subsets(case.optional))
        found.append(
            Config(
                shape,
                dtype=rng.choice(list(DTYPES)),
                params=rng.choice([(), rng.choice(mixes)]),
                layout=rng.choice(fitting(INPUT_LAYOUTS, size)),
                param_layout=rng.choice(["plain", "plain", "offset by one", "every second row"]),
                grad_layout=rng.choice(fitting(GRAD_LAYOUTS, size)),
                absent=absent,
                frozen=rng.choice(subsets([n for n in case.floating if n not in absent])),
                options=rng.choice(["", *case.options]),
            )
        )
    found = list(dict.fromkeys(found))
    return [c for c in found if in_interpreter(case, c)] if INTERPRETED else found


def in_interpreter(case: Case, config: Config) -> bool:
    size = shape_of(case, config)[0]
    small = math.prod(size) <= INTERPRETER_ELEMENTS and math.prod(size[:-1]) <= INTERPRETER_ROWS
    # Transposed, a kernel may take columns for rows.
    small = small and (config.layout != "transposed" or math.prod(size[1:]) <= 16 * INTERPRETER_ROWS)
    return small and config.dtype in ("fp32", "bf16") and "fp64" not in config.params


def shape_of(case: Case, config: Config) -> tuple[Any, ...]:
    return case.adversaries[config.adversary].shape if config.adversary else case.shapes[config.shape]


def dtypes_of(case: Case, config: Config) -> list[torch.dtype | None]:
    """None for a tensor that keeps its own."""
    chosen = iter([config.dtype, *(config.params or [config.dtype] * (len(case.floating) - 1))])
    return [None if name in case.fixed else DTYPES[next(chosen)] for name in case.names]


# ---- one configuration -----------------------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def forward_backward(
    case: Case,
    fn: Callable[..., Any],
    tensors: Tensors,
    wanted: Sequence[int],
    dys: Sequence[Tensor] | None,
    *rest: Any,
    **options: Any,
) -> list[Tensor]:
    """The outputs and the gradients of the tensors `wanted`. Without `dys`, outputs alone."""
    leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    ys = outputs(case.call(fn, leaves, *rest, **options))
    grads = torch.autograd.grad(ys, [leaves[i] for i in wanted], dys) if wanted and dys is not None else ()
    return [*(y.detach() for y in ys), *grads]


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` in `dtype`; labels and the like, and what is absent, as it is."""
    return t.to(dtype) if t is not None and t.is_floating_point() else t


@dataclass
class Expected:
    tensors: list[Tensor | None]  # contiguous, in the dtypes of the configuration
    dys: list[Tensor]
    wanted: list[int]
    truth: list[Tensor]
    torch: list[Tensor]
    slack: list[float]


def generated(case: Case, config: Config) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs and the gradients of the outputs, rounded to their dtypes: the truth sees what kernels see."""
    seed(zlib.crc32(f"{case.stem} {config}".encode()))
    size, *rest = shape_of(case, config)
    values = list(case.inputs(size, *rest))
    if config.adversary:
        values = list(case.adversaries[config.adversary].change(*values))
    layouts = [config.layout] + [config.param_layout] * (len(values) - 1)
    tensors = [
        None if name in config.absent else Guarded(v.to(dtype or v.dtype), layout).tensor.contiguous()
        for name, v, dtype, layout in zip(case.names, values, dtypes_of(case, config), layouts, strict=True)
    ]
    wide = [cast(t, torch.float64) for t in tensors]
    ys = outputs(case.call(case.torch_fn, wide, *rest, **case.options.get(config.options, {})))
    dys = [Guarded(torch.randn_like(y).to(tensors[0].dtype), config.grad_layout).tensor.contiguous() for y in ys]
    return tensors, dys


@functools.lru_cache(maxsize=2)
def expected(stem: str, config: Config) -> Expected:
    """The truth, in fp64, and what torch makes of it in the same dtypes.

    torch refuses most mixtures of dtypes; it then computes in the widest, and its result is rounded. fp64 has no wider
    truth: torch's fp64 result stands in for it, and how much rounding the values amplify is learned from torch in fp32.
    """
    case = CASES[stem]
    rest, options = shape_of(case, config)[1:], case.options.get(config.options, {})
    tensors, dys = generated(case, config)
    still = (*config.frozen, *case.fixed)
    wanted = [i for i, name in enumerate(case.names) if name not in still and tensors[i] is not None]

    def run(*dtypes: torch.dtype) -> list[Tensor]:
        def through(t: Tensor | None) -> Tensor | None:
            return functools.reduce(cast, dtypes, t)

        return forward_backward(
            case, case.torch_fn, [*map(through, tensors)], wanted, [*map(through, dys)], *rest, **options
        )

    widest = functools.reduce(
        torch.promote_types, {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    )
    truth, result = run(torch.float64), run(widest)
    kinds = [tensors[0].dtype] * len(dys) + [tensors[i].dtype for i in wanted]
    accumulator = torch.float64 if config.dtype == "fp64" else torch.float32
    unit = 4 * torch.finfo(accumulator).eps
    everywhere = unit * case.amplified.get(config.shape, 0.0)
    # A layout of the gradient makes sums over it cancel: those of the parameters, and nothing else.
    of_parameters = max(everywhere, unit * case.amplified.get(f"dy {config.grad_layout}", 0.0))
    slack = [everywhere] * len(dys) + [of_parameters if i else everywhere for i in wanted]
    if tensors[0].dtype == torch.float64:
        ratio = 64 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        pairs = zip(run(torch.float32), run(torch.float32, torch.float64), strict=True)
        slack = [s + ratio * largest(narrow.double() - wide) for s, (narrow, wide) in zip(slack, pairs, strict=True)]
    return Expected(tensors, dys, wanted, truth, [r.to(k) for r, k in zip(result, kinds, strict=True)], slack)


@contextlib.contextmanager
def forced(target: Target) -> Iterator[None]:
    with backend(target.backend):
        yield


@contextlib.contextmanager
def functions_alone() -> Iterator[None]:
    """Every call is made and recorded in Python, as without fusedtricks._node."""
    force = (lambda _: None) if _op._node is None else _op._node.force
    force(True)
    try:
        yield
    finally:
        force(False)


def check(case: Case, config: Config, target: Target) -> None:
    """Values, gradients, strides, dtypes; every element written; nothing written or read outside."""
    want = expected(case.stem, config)
    rest, options = shape_of(case, config)[1:], case.options.get(config.options, {})
    layouts = [config.layout] + [config.param_layout] * (len(want.tensors) - 1)
    guards = [
        None if t is None else Guarded(t.to(target.device), layout)
        for t, layout in zip(want.tensors, layouts, strict=True)
    ]
    dy_guards = [Guarded(dy.to(target.device), config.grad_layout) for dy in want.dys]
    tensors, dys = [g and g.tensor for g in guards], [g.tensor for g in dy_guards]

    def run() -> list[Tensor]:
        with forced(target):
            return forward_backward(case, case.fn, tensors, want.wanted, dys, *rest, **options)

    results = written_everywhere(run)
    names = [*(f"y{i or ''}" for i in range(len(dys))), *(f"d{case.names[i]}" for i in want.wanted)]
    like = [tensors[0]] * len(dys) + [tensors[i] for i in want.wanted]
    precision = torch.float64 if config.dtype == "fp64" else torch.float32
    each = zip(names, results, want.torch, want.truth, want.slack, like, strict=True)
    for name, result, torchs, truth, slack, template in each:
        assert result.device.type == target.device, f"{name}: on {result.device}, expected {target.device}"
        # What has the shape of the first input has its memory format; anything else is laid out as torch does.
        follows = template is tensors[0] and result.shape == template.shape
        strides = torch.empty_like(template).stride() if follows else None
        assert_no_worse(result, torchs, truth, strides=strides, name=name, precision=precision, slack=slack)
    for name, guard in zip(
        [*case.names, *(f"dy{i or ''}" for i in range(len(dys)))], [*guards, *dy_guards], strict=True
    ):
        if guard is not None:
            guard.check(name)


def check_accuracy(case: Case, config: Config, target: Target) -> None:
    """The bound of an adversary, whatever torch does: where torch returns zeros, `check` would excuse zeros."""
    want, hard = expected(case.stem, config), case.adversaries[config.adversary]
    tensors, dys = ([v.to(target.device) for v in values] for values in (want.tensors, want.dys))
    with forced(target):
        results = forward_backward(case, case.fn, tensors, want.wanted, dys, *hard.shape[1:])
    for i, (result, truth) in enumerate(zip(results, want.truth, strict=True)):
        name = f"y{i or ''}" if i < len(dys) else f"d{case.names[want.wanted[i - len(dys)]]}"
        # In 16 bits the rounding of the result itself is half an eps of each element.
        relative = max(1e-10 if config.dtype == "fp64" else hard.bound, 0.75 * torch.finfo(result.dtype).eps)
        finite = result.cpu().isfinite() == truth.to(result.dtype).isfinite()
        assert finite.all(), f"{name}: not finite where the truth is, in {(~finite).sum()} elements"
        assert_within(result.cpu(), truth, relative * largest(truth) + hard.noise, name=name)
