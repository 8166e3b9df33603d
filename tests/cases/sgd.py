"""An optimizer, no function of tensors: it has tests of its own."""

TESTS = (
    *("test_optim.py", "test_optim_torch.py", "test_optim_dtensor.py", "test_cuda_optim.py", "test_triton_optim.py"),
    *("test_optim_gpu.py", "test_gpu_optim.py", "test_optim_devices.py", "test_optim_bugs.py"),
)
