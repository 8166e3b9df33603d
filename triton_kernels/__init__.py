"""Triton kernels of fusedtricks, installed as `fusedtricks.triton_kernels`."""

if __name__ == "triton_kernels":
    # Triton ships a top-level package of this name; answering for it would break its users.
    raise ImportError("this folder is installed as fusedtricks.triton_kernels; it is not the package triton_kernels")
