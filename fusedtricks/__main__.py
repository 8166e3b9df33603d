"""`python -m fusedtricks`: the environment, and which kernel runs each operation here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

import fusedtricks
from fusedtricks import _op


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The best instruction set that a compiled CPU kernel of ours uses on this machine."""
    used = [op.cpu.removeprefix("cpu:") for op in _op.Op.registry.values() if op.cpu]
    return ", ".join(dict.fromkeys(used)) or "none"


def environment() -> dict[str, str | int]:
    """What a figure or a bug report has to be read with."""
    native = _op._C
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    if native is None:
        compiled, archs = "not built: no C++ compiler was found at installation", "none"
    else:
        compiled, archs = f"built with {native.compiler}", native.cuda_archs or "not built: no nvcc was found"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fusedtricks": fusedtricks.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or torch.version.hip or "none",
        "triton": triton,
        "compiled kernels": compiled,
        "autograd nodes": "C++" if _op._node else "Python: fusedtricks._node was not built, or for another torch",
        "CUDA architectures": archs,
        "CPU": cpu_model(),
        "CPU threads": torch.get_num_threads(),
        "torch's CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "our CPU kernels": instruction_set(),
        "GPU": ", ".join(gpus) or "none",
    }


def main() -> None:
    values = environment()
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")
    print()
    fusedtricks.backends()


if __name__ == "__main__":
    main()
