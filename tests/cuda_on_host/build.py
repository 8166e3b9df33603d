"""Compile csrc/cuda for the CPU: a shared library of all .cu files and the scheduler, kept by content under build/."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare"],
    # Vectors are moved as words, as nvcc allows.
    "-fno-strict-aliasing",
    # Dynamic shared memory is a thread_local of another file, without a constructor.
    "-fno-extern-tls-init",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-isystem{TORCH / 'include'}",
]
ASAN_FLAGS = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g1"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _tree() -> dict[str, str]:
    """What the kernels are compiled from, by path below csrc/."""
    files = [*(CSRC / "cuda").iterdir(), *(CSRC / "math").iterdir(), CSRC / "torch_api.h"]
    return {str(path.relative_to(CSRC)): path.read_text() for path in sorted(files) if path.is_file()}


def _key(*content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: another that wants the same waits for it instead of compiling it as well."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(
    patches: Mapping[str, tuple[str, str]] | None = None, *, stems: tuple[str, ...] = (), asan: bool = False
) -> Path:
    """The library for the sources as they are, or with `patches` {path below csrc: (text, its replacement)} applied.

    `stems` are the .cu files to include; default: all. `asan` adds AddressSanitizer, which the process that loads the
    library must preload.
    """
    with _alone():
        return _build(patches or {}, stems, asan)


def _build(patches: Mapping[str, tuple[str, str]], stems: tuple[str, ...], asan: bool) -> Path:
    sources = _tree()
    for path, (old, new) in patches.items():
        if sources[path].count(old) != 1:
            raise ValueError(f"{path}: expected once, found {sources[path].count(old)} times: {old!r}")
        sources[path] = sources[path].replace(old, new)
    runtime = [path.read_text() for path in (HERE / "runtime.cpp", *sorted(HERE.glob("include/*.h")))]
    # A patched build runs a few small kernels once: compiling it is what takes time.
    flags = [*FLAGS, "-O0" if patches else "-O1", *(ASAN_FLAGS if asan else [])]
    folder = CACHE / _key(sources, runtime, flags, stems)
    library = folder / "cuda_on_host.so"
    if library.exists():
        return library
    tree = folder / "csrc"
    for path, text in sources.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    wanted = [p for p in sorted((tree / "cuda").glob("*.cu")) if not stems or p.stem in stems]

    def compile(source: Path, out: Path) -> str:
        if out.exists():
            return str(out)
        part = out.with_suffix(".part.o")  # what has the final name is whole
        includes = [f"-I{HERE / 'include'}", f"-I{tree}"]
        command = [compiler(), *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        part.rename(out)
        return str(out)

    scheduler = (HERE / "runtime.cpp", CACHE / f"runtime-{_key(sources['torch_api.h'], runtime, flags)}.o")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile(*job), [*((p, folder / f"{p.stem}.o") for p in wanted), scheduler]))
    lib = TORCH / "lib"
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10", "-ldl"]
    part = library.with_suffix(".part")
    subprocess.run([compiler(), *flags, *objects, *link, "-o", str(part)], check=True)
    part.rename(library)
    return library
