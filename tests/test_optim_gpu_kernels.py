"""The optimizers' CUDA kernels, run on the CPU by tests/cuda_on_host, against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import cuda_on_host
import pytest
import torch
from test_optim import NAMES, make

import fusedtricks
from fusedtricks.ops import _optimizer, _shard

needs_compiler = pytest.mark.skipif(not cuda_on_host.available(), reason="no C++ compiler")
OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.float32, {"max_grad_norm": 0.5, "ema_decay": 0.9}),
    (torch.bfloat16, {"state_dtype": torch.float32, "stochastic_rounding": True}),
    (torch.bfloat16, {"master_weights": "fp32", "max_grad_norm": 0.5}),
    (torch.bfloat16, {"master_weights": "remainder", "ema_decay": 0.9}),
    (torch.float16, {"master_weights": "fp32"}),
    (torch.float16, {"eps": 1e-3}),
]
IDS = [f"{str(dtype)[6:]} {' '.join(options)}" for dtype, options in OPTIONS]


def run(
    name: str, dtype: torch.dtype, options: dict[str, Any], kernel: Any, amp: bool, kinds: int = 2
) -> tuple[list[Any], list[Any]]:
    """Four steps by a back end or by a launcher of CUDA kernels: parameters, norms and gradients; states."""
    torch.manual_seed(2)
    options = {k: v for k, v in options.items() if k != "eps" or name != "SGD"}
    sizes = ((9000,), (0,), (7,), (3, 333), (), (8192,))
    base = torch.randn(1001).to(dtype)
    ps = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in sizes]
    ps.append(torch.nn.Parameter(base[1:]))  # no address of it is aligned to a vector
    ps[-1].data = base[1:]
    if kinds == 2:
        ps.append(torch.nn.Parameter(torch.randn(33, dtype=torch.float64)))
    o = make(name, [{"params": ps[::2]}, {"params": ps[1::2], "lr": 0.1}], **options)
    rule, missing = o.rule, ps[2]
    with pytest.MonkeyPatch.context() as patch:
        if callable(kernel):
            patch.setitem(rule.op._implementations, "cuda", kernel)
        if kernel != "reference":
            tiled = lambda *args: _shard.Shard(*args, tiled=True)  # noqa: E731
            patch.setattr(_optimizer, "Shard", tiled)
        norms = []
        with fusedtricks.backend("cuda" if callable(kernel) else kernel):
            for step in range(4):
                for p in ps:
                    p.grad = torch.randn(p.shape).to(p.dtype)
                missing.grad = None if step == 1 else missing.grad
                if amp:
                    o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(2.0 if step == 0 else 0.0)
                o.step()
                norms.append(o.grad_norm.clone())
                assert bool(o.step_skipped) == (amp and step == 0)
    grads = [p.grad for p in ps]
    return [*ps, *norms, *grads], [v for p in ps for v in o.state.get(p, {}).values()]


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=IDS)
def test_parity(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    amp = dtype != torch.float64 and "stochastic_rounding" not in options
    rule_op = f"{getattr(fusedtricks.optim, name).rule.stem}_"
    kernel = cuda_on_host.install()[rule_op]
    compare(*(run(name, dtype, options, by, amp) for by in (kernel, "reference")), dtype)


def compare(ours: tuple[list[Any], list[Any]], right: tuple[list[Any], list[Any]], dtype: torch.dtype) -> None:
    half = dtype in (torch.float16, torch.bfloat16)
    for a, b in zip([*ours[0], *ours[1]], [*right[0], *right[1]], strict=True):
        assert a.dtype == b.dtype
        # A last bit may be rounded either way, and with it what is drawn at random.
        limit = 2 * torch.finfo(dtype).eps if (half and a.dtype == dtype) or a.dtype == torch.int16 else 1e-5
        if a.dtype == torch.int16:
            limit = 2.0**7
        a, b = a.double(), b.double()
        off = ((a - b).abs() > limit * (1 + b.abs())).sum()
        assert off <= (3 if half else 0)
        assert (a.isfinite() == b.isfinite()).all()


@needs_compiler
def test_order_of_blocks_does_not_matter() -> None:
    library, results = cuda_on_host.library(), []
    for order in (0, 1, 7):
        with library.device(processors=1, order=order):
            values, states = run("NAdam", torch.float32, OPTIONS[2][1], library.ops["nadam_"], True)
            results.append([*values, *states])
    for a, b in itertools.chain(zip(results[0], results[1], strict=True), zip(results[0], results[2], strict=True)):
        assert torch.equal(a, b)


@needs_compiler
def test_one_launch_and_two_with_clipping() -> None:
    """For all groups; a launch for each combination of dtypes, and as many for the norm."""
    launches, library = [], cuda_on_host.library()
    for clip in (None, 1.0):
        ps = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
        o = make("AdamW", [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(ps)], max_grad_norm=clip)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(o.rule.op._implementations, "cuda", library.ops["adamw_"])
            patch.setattr(_optimizer, "Shard", lambda *args: _shard.Shard(*args, tiled=True))
            for p in ps:
                p.grad = torch.ones(5)
            before = library.launches()
            with fusedtricks.backend("cuda"):
                o.step()
        launches.append(library.launches() - before)
    assert launches == [1, 2]
