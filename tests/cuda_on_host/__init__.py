"""CUDA kernels on the CPU: csrc/cuda compiled by g++ against headers that act out CUDA's execution model.

A test tool, never a back end: every CUDA thread is a fiber, so races, missing and divergent barriers, misaligned and
out-of-bounds accesses show on a machine without a GPU. What it cannot show: memory ordering between blocks, which run
one after the other, and speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import library

from fusedtricks import _op
from fusedtricks._op import Op

from . import build as _build

_serial = itertools.count()


class Kernels:
    """The kernels of one build: `ops` maps operator names to callables on CPU tensors."""

    def __init__(self, path: Path | None = None):
        self._lib = ctypes.CDLL(str(path or _build.build()))
        self._lib.ft_kernel_name.restype = self._lib.ft_launched.restype = ctypes.c_char_p
        self._lib.ft_loaded.restype = self._lib.ft_stored.restype = ctypes.c_int64
        namespace = f"fusedtricks_cuda_on_host_{next(_serial)}"
        self._definitions = library.Library(namespace, "FRAGMENT")
        names = [self._lib.ft_kernel_name(i).decode() for i in range(self._lib.ft_kernel_count())]
        for name in names:
            self._definitions.define(Op.registry[name].schema)
        self._lib.ft_register(namespace.encode())
        self.ops = {name: self._checked(getattr(getattr(torch.ops, namespace), name).default) for name in names}

    def _checked(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return op(*args)
            finally:
                self._lib.ft_release()

        return call

    def launched(self) -> list[str]:
        """Names, with template arguments, of the kernels that have been launched."""
        return self._lib.ft_launched().decode().splitlines()

    def launches(self) -> int:
        """How many kernels have been launched."""
        return self._lib.ft_launches()

    def moved(self) -> tuple[int, int]:
        """Bytes of global memory that have been loaded and stored, but for single numbers here and there."""
        return self._lib.ft_loaded(), self._lib.ft_stored()

    @contextlib.contextmanager
    def device(
        self, *, processors: int = 2, threads: int = 1024, shared: int = 227 << 10, order: int = 0
    ) -> Iterator[None]:
        """A device with so many multiprocessors, threads and bytes of shared memory a block.

        Small ones reach the regimes of long rows with short ones. `order` is that of blocks, warps and lanes: 0
        ascending, 1 descending, else the seed of a random one.
        """
        self._lib.ft_configure(processors, threads, shared, order)
        try:
            yield
        finally:
            self._lib.ft_configure(2, 1024, 227 << 10, 0)

    @contextlib.contextmanager
    def as_backend(self) -> Iterator[None]:
        """The kernels also as a back end "cuda_on_host" of their operators."""
        before = _op.BACKENDS, {name: dict(Op.registry[name]._implementations) for name in self.ops}
        _op.BACKENDS = (*_op.BACKENDS, "cuda_on_host")
        for name, op in self.ops.items():
            Op.registry[name]._implementations["cuda_on_host"] = op
        try:
            yield
        finally:
            _op.BACKENDS = before[0]
            for name, implementations in before[1].items():
                Op.registry[name]._implementations = implementations


_default: Kernels | None = None


def load() -> Kernels:
    """The kernels of csrc/cuda as they are, compiled at the first call."""
    global _default
    _default = _default or Kernels()
    return _default


def install() -> dict[str, Callable[..., Any]]:
    """{operator name: the CUDA kernels' launcher on CPU tensors}, compiled if need be."""
    return load().ops


def available() -> bool:
    return _build.compiler() is not None
