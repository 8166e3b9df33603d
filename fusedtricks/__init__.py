"""Hand-written fused training kernels as drop-ins for torch.nn and torch.optim."""

from fusedtricks import functional, nn, optim, recipes
from fusedtricks._op import backend, backends
from fusedtricks.ops._target import MixedTarget
from fusedtricks.swap import swap, unswap

__version__ = "0.1.0"
__all__ = ["MixedTarget", "backend", "backends", "functional", "nn", "optim", "recipes", "swap", "unswap"]
