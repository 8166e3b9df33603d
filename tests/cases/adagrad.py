"""An optimizer, no function of tensors: it has tests of its own."""

from optim_cases import TESTS

__all__ = ["TESTS"]
