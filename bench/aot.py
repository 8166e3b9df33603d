"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be present: `python -m bench.aot [stem ...]`.

What the compiled code shows: registers, spills, shared memory, and how wide the accesses to global memory are.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fusedtricks.nn  # noqa: F401  (registers the operators)
from fusedtricks._op import Op
from fusedtricks.triton_kernels.common import Launch, releasing_lanes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TYPES = {
    **{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"},
    **{torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"},
}


@dataclass(frozen=True)
class Compiled:
    registers: int
    spills: int  # bytes of stack per thread (NVIDIA), spilled registers (AMD)
    shared: int  # bytes
    loads: dict[int, int]  # bytes per thread -> how many instructions
    stores: dict[int, int]
    asm: dict[str, str | bytes]


def stems() -> list[str]:
    """The operations whose launchers list their specialisations."""
    with_kernels = sorted({op.stem for op in Op.registry.values() if op.has_triton})
    return [stem for stem in with_kernels if hasattr(module(stem), "specialisations")]


def module(stem: str) -> Any:
    return importlib.import_module(f"fusedtricks.triton_kernels.{stem}")


def specialisations(stem: str) -> Iterator[tuple[str, Launch]]:
    """(note, launch) for representative shapes."""
    return module(stem).specialisations()


def complaints(note: str, code: Compiled, target: str) -> list[str]:
    """What is wrong with compiled code: spills, too much shared memory, narrow accesses in aligned shapes.

    A note with the words "without vectors" is of a shape that rules them out; one with "stores statistics" is of a
    kernel whose results are a few numbers a row.
    """
    found = [f"{code.spills} bytes of spills"] if code.spills else []
    found += [f"{code.shared} bytes of shared memory"] if code.shared > SHARED[target] else []
    if "without vectors" not in note:
        found += [f"widest load {max(code.loads, default=0)} bytes"] if max(code.loads, default=0) < 16 else []
        narrow = max(code.stores, default=0) < 16 and "stores statistics" not in note
        found += [f"widest store {max(code.stores, default=0)} bytes"] if narrow else []
    return found


def source(launch: Launch, target: GPUTarget) -> ASTSource:
    """What Triton's own launcher would compile for these arguments: aligned pointers, 1 and None as constants."""
    args = launch.checked().args
    if "LANES" in args:
        args = {**args, "LANES": releasing_lanes(launch.num_warps, amd=target.backend == "hip")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = args[parameter.name]
        specialised = isinstance(value, int) and not (parameter.is_constexpr or parameter.do_not_specialize)
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (specialised and value != 1 and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as NVIDIA's own tool reads them from the binary."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def ptx_accesses(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    loads, stores = collections.Counter(), collections.Counter()
    for kind, modifiers in re.findall(r"\b(ld|st)\.global((?:[.:]+\w+)+)", ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        bits = int(re.search(r"\.[bfsu](\d+)", modifiers)[1])
        (loads if kind == "ld" else stores)[int(vector[1] if vector else 1) * bits // 8] += 1
    for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)(?:,[^;]*)?;", ptx):
        loads[int(size, 0)] += 1
    return dict(loads), dict(stores)


def amdgcn_accesses(text: str) -> tuple[dict[int, int], dict[int, int]]:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
    loads, stores = collections.Counter(), collections.Counter()
    for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_(?:lds_)?(dwordx?\d?|u?short|u?byte)", text):
        (loads if kind == "load" else stores)[sizes[width]] += 1
    return dict(loads), dict(stores)


def compile_specialisation(launch: Launch, target: str) -> Compiled:
    gpu = TARGETS[target]
    compiled = triton.compile(source(launch, gpu), target=gpu, options=launch.options(amd=gpu.backend == "hip"))
    asm = compiled.asm
    if target.startswith("sm_"):
        registers, spills = resources(asm["cubin"])
        loads, stores = ptx_accesses(asm["ptx"])
    else:
        metadata = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
        registers = int(metadata["vgpr_count"])
        spills = int(metadata["vgpr_spill_count"])
        loads, stores = amdgcn_accesses(asm["amdgcn"])
    return Compiled(registers, spills, compiled.metadata.shared, loads, stores, asm)


def widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{count}x{size}" for size, count in sorted(accesses.items(), reverse=True)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.split("\n")[0])
    parser.add_argument("stem", nargs="*", default=stems())
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=tuple(TARGETS))
    parser.add_argument("--match", default="", help="only specialisations whose label contains this")
    args = parser.parse_args()
    failed = 0
    print(f"{'':66} {'target':7} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>6}  loads / stores (count x bytes)")
    for stem in args.stem:
        for note, launch in specialisations(stem):
            for target in args.target if args.match in note else ():
                c = compile_specialisation(launch, target)
                wrong = complaints(note, c, target)
                failed += bool(wrong)
                print(
                    f"{f'{stem} {note}':66} {target:7} {launch.num_warps:5} {c.registers:4} {c.spills:5} {c.shared:6}  "
                    f"{widths(c.loads)} / {widths(c.stores)}{'  <- ' + ', '.join(wrong) if wrong else ''}",
                    flush=True,
                )
    if failed:
        sys.exit(f"{failed} specialisations are not as they should be")


if __name__ == "__main__":
    main()
