"""An optimizer, no function of tensors: it has tests of its own."""

TESTS = ("test_optim.py", "test_optim_torch.py")
