"""What the compiled GPU code shows without a GPU: `python -m bench.static`, `--markdown` for the table of docs/.

Registers, spills, shared memory, the warps that registers leave room for, and how wide accesses to global memory are.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
ARCHS = (80, 90, 100)
# Every one of these architectures has 64 warps and 65536 registers a multiprocessor, in four parts, given out to a warp
# in units of 256.
WARPS, REGISTERS, PARTS, UNIT = 64, 65536, 4, 256
BYTES = {"128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Row:
    kernel: str
    arch: str
    registers: int  # a thread
    spills: int  # bytes of stack and local memory a thread
    shared: int  # bytes a block, declared statically
    loads: dict[int, int]  # bytes a thread -> instructions
    stores: dict[int, int]

    @property
    def warps(self) -> int:
        """Warps a multiprocessor has registers for, of the 64 it can hold."""
        of_warp = -(-self.registers * 32 // UNIT) * UNIT
        return min(WARPS, REGISTERS // PARTS // of_warp * PARTS)


def nvcc() -> str | None:
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    return triton.knobs.nvidia.cuobjdump.path


@functools.cache
def objects() -> dict[str, Path]:
    """{stem: object} of every CUDA source: that of the extension's build if it is up to date and for all ARCHS, else
    compiled here."""
    headers = [*(CSRC / "cuda").glob("*.cuh"), *(CSRC / "math").iterdir(), CSRC / "torch_api.h"]
    newest = max(path.stat().st_mtime for path in headers)

    def find(source: Path) -> Path:
        for built in ROOT.glob(f"build/native-*/{source.stem}.cuda.o"):
            flags = (built.parent / "build.ninja").read_text()
            complete = all(re.search(rf"code=sm_{arch}\b", flags) for arch in ARCHS)
            if complete and built.stat().st_mtime > max(newest, source.stat().st_mtime):
                return built
        key = hashlib.sha256(b"".join(p.read_bytes() for p in (source, *sorted(headers)))).hexdigest()[:16]
        out = ROOT / "build" / "static" / f"{source.stem}-{key}.o"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_suffix(f".{os.getpid()}.o")
            torchs = Path(torch.__file__).parent / "include"
            flags = [
                "-O3",
                "-std=c++20",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                f"-I{CSRC}",
                f"-isystem={torchs}",
            ]
            flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
            done = subprocess.run([nvcc(), *flags, "-c", source, "-o", part], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc {source}:\n{done.stderr[:4000]}")
            part.rename(out)
        return out

    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((s.stem for s in sources), pool.map(find, sources), strict=True))


def short(names: list[str]) -> dict[str, str]:
    """{mangled: readable} of kernel names: `backward_rows<true, bf16, 8, 2, false>`."""
    tool = shutil.which("c++filt")
    plain = subprocess.check_output([tool, *names], text=True).splitlines() if tool else names
    short = []
    for name in plain:
        name = re.sub(r"^void |\(.*$|fusedtricks::cuda::", "", name)
        types = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64", "unsigned char": "u8"}
        for long, brief in types.items():
            name = name.replace(long, brief)
        short.append(name)
    return dict(zip(names, short, strict=True))


def sections(option: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled kernel name, line) of a listing by cuobjdump."""
    arch = name = ""
    with subprocess.Popen([cuobjdump(), option, path], stdout=subprocess.PIPE, text=True) as tool:
        for line in tool.stdout:
            if line.startswith("arch = "):
                arch, name = line.split()[2], ""
            elif found := re.match(r"\s+Function ?:? (\w+)", line):
                name = found[1]
            elif name:
                yield arch, name, line


def width(instruction: str) -> int:
    return next((BYTES[part] for part in instruction.split(".") if part in BYTES), 4)


def cuda() -> list[Row]:
    """A row for every kernel and architecture, by kernel name."""
    usage, accesses = {}, collections.defaultdict(collections.Counter)
    for path in objects().values():
        for arch, name, line in sections("--dump-resource-usage", path):
            if "REG:" in line:
                usage[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for arch, name, line in sections("--dump-sass", path):
            if found := re.search(r"\b(LDG|STG)\.\S+", line):
                accesses[arch, name, found[1]][width(found[0])] += 1
    names = short(sorted({name for _, name in usage}))
    return sorted(
        (
            Row(
                names[name], arch, u["REG"], u["STACK"] + u["LOCAL"], u["SHARED"],
                dict(accesses[arch, name, "LDG"]), dict(accesses[arch, name, "STG"]),
            )
            for (arch, name), u in usage.items()
        ),
        key=lambda row: (row.kernel, int(row.arch.removeprefix("sm_"))),
    )  # fmt: skip


def triton() -> list[Row]:
    """The same for the specialisations of the Triton kernels, compiled ahead of time by bench.aot."""
    from bench import aot

    rows = []
    for stem in aot.stems():
        for note, launch in aot.specialisations(stem):
            for target in (f"sm_{arch}" for arch in ARCHS):
                c = aot.compile_specialisation(launch, target)
                rows.append(Row(f"{stem} {note}", target, c.registers, c.spills, c.shared, c.loads, c.stores))
    return rows


def widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{count}x{size}" for size, count in sorted(accesses.items(), reverse=True)) or "-"


def show(title: str, rows: list[Row]) -> None:
    longest = max(len(row.kernel) for row in rows)
    head = f"{'arch':7} {'regs':>4} {'spill':>5} {'shared':>6} {'warps':>5}"
    print(f"{title:{longest}} {head}  loads / stores (count x bytes)")
    for row in rows:
        print(
            f"{row.kernel:{longest}} {row.arch:7} {row.registers:4} {row.spills:5} {row.shared:6} {row.warps:5}  "
            f"{widths(row.loads)} / {widths(row.stores)}"
        )


def markdown(rows: list[Row]) -> str:
    """The kernels for aligned rows by family and dtype: the most registers and spills, the widest accesses."""
    groups: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        family, dtype, lanes = re.match(r"(\w+)<.*?\b(fp32|bf16|fp16|fp64|u8), (\d+)\b", row.kernel).groups()
        if int(lanes) * {"fp32": 4, "fp64": 8, "u8": 1}.get(dtype, 2) == 16:
            groups[family, dtype].append(row)
    archs = [f"sm_{arch}" for arch in ARCHS]
    lines = [
        f"| kernel | dtype | instances | registers {' / '.join(archs)} | spills | widest load, store |",
        "|---|---|---|---|---|---|",
    ]
    for (family, dtype), group in sorted(groups.items()):
        registers = " / ".join(str(max(r.registers for r in group if r.arch == arch)) for arch in archs)
        widest = ", ".join(str(max((max(a, default=0) for a in each), default=0)) for each in (
            [r.loads for r in group], [r.stores for r in group],
        ))  # fmt: skip
        spills = max(r.spills for r in group)
        lines.append(f"| `{family}` | {dtype} | {len(group)} | {registers} | {spills} | {widest} bytes |")
    return "\n".join(lines)


def report() -> list[Row]:
    """Print the CUDA kernels' table and return its rows; none where nvcc is missing."""
    if not (nvcc() and cuobjdump()):
        print("CUDA: nvcc or cuobjdump was not found; nothing compiled to look at")
        return []
    rows = cuda()
    show("CUDA", rows)
    return rows


if __name__ == "__main__":
    if "--markdown" in sys.argv:
        print(markdown(cuda()))
    else:
        report()
        show("Triton", triton())
