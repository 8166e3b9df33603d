"""Hand-written fused training kernels as drop-ins for torch.nn and torch.optim."""

from fusedtricks import functional, nn
from fusedtricks._op import backend, backends

__version__ = "0.1.0"
__all__ = ["backend", "backends", "functional", "nn"]
