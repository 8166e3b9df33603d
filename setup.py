"""Build of fusedtricks: the extension `fusedtricks._C` from the sources under csrc/, and two more beside it.

CUDA sources are built when nvcc is found; FUSEDTRICKS_CUDA=0 or 1 overrides (1 fails without nvcc). The targets are
those of TORCH_CUDA_ARCH_LIST. FUSEDTRICKS_CPU="baseline avx2" leaves the other instruction sets out; the default is all
that this machine's kind has. Without a C++ compiler the package installs without the extension and says so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# csrc/<name>.cpp is fusedtricks._<name>: what needs torch's own headers, and the package can do without.
HEADERS = ("plan", "node")
# LibTorch's stable ABI: a binary built for this version serves every later one.
TORCH_TARGET = "0x020b000000000000"
CUDA_ARCHS = "8.0;9.0;10.0+PTX"

# Worst first. The order is also the link order, which keeps one instruction set's code out of another's: of an inline
# function that several objects define, the linker keeps the first, and whoever calls it defines it as well, so what is
# kept never needs more than its callers do.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    INSTRUCTION_SETS["avx512"] = [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mbmi2"],
        "-mprefer-vector-width=512",
    ]


def instruction_sets() -> dict[str, list[str]]:
    """{name: compiler flags} of those to build."""
    wanted = (os.environ.get("FUSEDTRICKS_CPU") or " ".join(INSTRUCTION_SETS)).replace(",", " ").split()
    if unknown := set(wanted) - set(INSTRUCTION_SETS):
        raise SystemExit(f"fusedtricks: FUSEDTRICKS_CPU names {sorted(unknown)}; there are {list(INSTRUCTION_SETS)}")
    return {name: flags for name, flags in INSTRUCTION_SETS.items() if name in wanted}


def compiler() -> str | None:
    named = os.environ.get("CXX")
    if named and not shutil.which(shlex.split(named)[0]):
        raise SystemExit(f"fusedtricks: CXX={named!r} was not found")
    return named or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    wanted = os.environ.get("FUSEDTRICKS_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"fusedtricks: FUSEDTRICKS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    found = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parent.parent, "/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    if wanted == "1":
        raise SystemExit("fusedtricks: FUSEDTRICKS_CUDA=1, but no nvcc was found (set CUDA_HOME or PATH)")
    return None


def nvcc_targets() -> tuple[str, list[str]]:
    archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS).replace(" ", ";")
    flags = []
    for arch in filter(None, archs.split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return archs, flags


def ninja_file(cxx: str, output: Path, build: Path) -> str:
    """The whole build of _C: each CPU kernel for every instruction set, CUDA objects, one link; and of HEADERS."""
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    cuda = cuda_home()
    archs, targets = nvcc_targets() if cuda else ("", [])
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    includes = [f"-I{CSRC}", f"-isystem {torch_dir / 'include'}"]
    python = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
    # Before torch's include: some torchs have a pybind11 of their own there that refuses code for the stable ABI.
    stable_python = [f"-I{pybind11.get_include()}", *python[1:]]
    # Neither flag changes a result: errno and floating-point traps are never looked at.
    common = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-fno-math-errno", "-fno-trapping-math"]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    mac = sys.platform == "darwin"
    # libtorch.so is what brings in libtorch_cuda.so, where the weak symbols of csrc/cuda/launch.cuh are: nothing else
    # refers to it, and it must stay.
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared", "-Wl,--no-as-needed"]
    link = [*shared, f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if cuda:
        defines.append("-DUSE_CUDA")
        # Static: the CUDA runtime's version is then ours, whatever torch was built with.
        link += [f"-L{cuda}/lib64", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    info = f"""'-DFT_CUDA_ARCHS="{archs}"'"""
    nvccflags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *defines, *includes, *targets]
    deps = "-MF $out.d"
    lines = [
        "ninja_required_version = 1.3",
        f"cxxflags = {' '.join([*common, *includes, *extra])}",
        f"defines = {' '.join(defines)}",
        f"nvccflags = {' '.join(nvccflags)}",
        f"rule cxx\n  command = {cxx} -MMD {deps} $cxxflags $defines $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {cuda}/bin/nvcc -MD {deps} $nvccflags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} $in -o $out {' '.join(link)} $libs",
    ]
    # ninja reads '$' and ':' and ' ' specially in paths.
    escape = lambda path: str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")  # noqa: E731
    objects = []

    def compile(rule: str, source: Path, name: str, flags: str = "") -> None:
        objects.append(escape(build / f"{name}.o"))
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}\n  flags = {flags}")

    compile("cxx", CSRC / "module.cpp", "module", f"{' '.join(stable_python)} {info}")
    for isa, flags in instruction_sets().items():
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            compile("cxx", source, f"{source.stem}.{isa}", " ".join([*flags, f"-DFT_ISA={isa}"]))
    if cuda:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            compile("nvcc", source, f"{source.stem}.cuda")
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    flags = " ".join([*python, f"-isystem {torch_dir / 'include/torch/csrc/api/include'}"])
    for name in HEADERS:
        library, object = beside(output, name), escape(build / f"{name}.o")
        lines.append(f"build {object}: cxx {escape(CSRC / f'{name}.cpp')}\n  flags = {flags}")
        lines.append("  defines =")
        lines.append(f"build {escape(library)}: link {object}\n  libs = -ltorch_python")
        lines.append(f"build {name}: phony {escape(library)}")
    lines.append(f"build C: phony {escape(output)}")
    lines.append(f"default {escape(output)}\n")
    return "\n".join(lines)


def beside(output: Path, name: str) -> Path:
    """The file of one of HEADERS, by that of _C."""
    return output.with_name(output.name.replace("_C", f"_{name}", 1))


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fusedtricks._C":  # made with it
            return
        # A fixed place, unlike self.build_temp: a rebuild compiles only what changed.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        text, path = ninja_file(compiler(), output, build), build / "build.ninja"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        ninja = [sys.executable, "-m", "ninja", "-C", str(build), *jobs]
        # All at once, as far as they go; then each by itself says what it lacks.
        if subprocess.run([*ninja, "-k", "0", "C", *HEADERS]).returncode == 0:
            return
        subprocess.run([*ninja, "C"], check=True)
        for name in HEADERS:
            if subprocess.run([*ninja, name]).returncode:
                beside(output, name).unlink(missing_ok=True)
                print(f"fusedtricks: csrc/{name}.cpp does not build with this torch; installing without _{name}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        names = {e.name: self.get_ext_filename(e.name) for e in self.extensions}
        missing = [name for name, file in names.items() if not Path(self.build_lib, file).exists()]
        for name in missing:  # nor may one of an earlier build stay
            (ROOT / names[name]).unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if e.name not in missing]
        super().copy_extensions_to_source()


# One build makes all: see ninja_file.
extensions = [Extension(f"fusedtricks.{name}", sources=[]) for name in ("_C", *(f"_{name}" for name in HEADERS))]
if compiler() is None:
    extensions = []
    print("fusedtricks: no C++ compiler found; installing without compiled kernels (Triton on GPUs, PyTorch on CPUs)")

setup(
    # By hand: a search would also install triton_kernels under the name of Triton's own package.
    packages=["fusedtricks", "fusedtricks.ops", "fusedtricks.triton_kernels"],
    package_dir={"fusedtricks.triton_kernels": "triton_kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
