"""The optimizers' Triton kernels in the interpreter: parity with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from test_optim_gpu_kernels import IDS, NAMES, OPTIONS, compare, run  # noqa: E402

import fusedtricks  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set before Python starts"
)


# Every option with one rule, every rule without options.
CASES = [pytest.param("AdamW", *option, id=f"AdamW {label}") for option, label in zip(OPTIONS, IDS, strict=True)]
CASES += [pytest.param(name, *OPTIONS[2], id=f"{name} {IDS[2]}") for name in NAMES if name != "AdamW"]


@pytest.mark.parametrize(("name", "dtype", "options"), CASES)
def test_parity(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    amp = dtype != torch.float64 and "stochastic_rounding" not in options
    results = [run(name, dtype, options, backend, amp, kinds=1) for backend in ("triton", "reference")]
    compare(*results, dtype)


def test_float64_is_served_by_the_reference() -> None:
    p, q = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    a, b = fusedtricks.optim.AdamW([p]), fusedtricks.optim.AdamW([q])
    p.grad = q.grad = torch.ones_like(p)
    with fusedtricks.backend("triton"):
        a.step()
    b.step()
    torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
