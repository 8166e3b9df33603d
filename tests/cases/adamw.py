"""An optimizer, no function of tensors: it has tests of its own."""

TESTS = ("test_optim.py", "test_optim_torch.py", "test_optim_gpu_kernels.py", "test_triton_optim.py")
