"""Modules over DTensors, as sequence parallelism calls them; two processes over gloo."""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest
import torch
from sweep import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter"),
]


def _worker(rank: int, world: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    import fusedtricks

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    make = {
        "LayerNorm": lambda: torch.nn.LayerNorm(16),
        "RMSNorm": lambda: torch.nn.RMSNorm(16),
        "without parameters": lambda: torch.nn.LayerNorm(16, elementwise_affine=False),
        "BatchNorm1d": lambda: torch.nn.BatchNorm1d(6),
        "Dropout": lambda: torch.nn.Dropout(0.5),
        "Dropout1d": lambda: torch.nn.Dropout1d(0.5),
    }
    for name, module in make.items():
        # Sequences of 6 rows over 2 processes, 5 samples of which one has 3; rows that are not whole.
        for placement in (Shard(1), Shard(0), Shard(2), Replicate()):
            for permuted in (False, True):
                torch.manual_seed(0)
                x, dy = torch.randn(5, 6, 16), torch.randn(5, 6, 16)
                x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0) if permuted else x
                found = []
                for ours in (True, False):
                    model = torch.nn.Sequential(module())
                    if ours:
                        fusedtricks.swap(model, verbose=False)
                    parallelize_module(model, mesh, {"0": SequenceParallel()})
                    given = distribute_tensor(x.clone(), mesh, [placement]).requires_grad_()
                    torch.manual_seed(1)
                    y = model(given)
                    y.backward(distribute_tensor(dy, mesh, y.placements))
                    grads = [given.grad, *(p.grad for p in model.parameters())]
                    assert y.shape == x.shape
                    assert grads[0].placements == given.placements
                    found.append([y.placements, *(t.full_tensor() for t in (y.detach(), *grads))])
                (ours_placed, *ours), (theirs_placed, *theirs) = found
                assert ours_placed == theirs_placed, (name, placement)
                torch.testing.assert_close(ours, theirs, msg=lambda m: f"{name}, {placement}, {permuted}: {m}")  # noqa: B023
    rows_together(mesh)
    dist.destroy_process_group()


def rows_together(mesh: torch.distributed.DeviceMesh) -> None:
    """Without a plan around them: rows stay where they are, and a parameter that is no DTensor is torch's error."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fusedtricks.functional as F

    x, weight = torch.linspace(-1, 2, 4 * 8).sin().reshape(4, 8), torch.linspace(1, 2, 8)
    everywhere = distribute_tensor(weight, mesh, [Replicate()])
    for placement, kept in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        y = F.layer_norm(distribute_tensor(x, mesh, [placement]), (8,), everywhere)
        assert y.placements == (kept,)
        torch.testing.assert_close(y.full_tensor(), torch.nn.functional.layer_norm(x, (8,), weight))
    with pytest.raises(RuntimeError, match="DTensor"):
        F.layer_norm(distribute_tensor(x, mesh, [Shard(0)]), (8,), weight)


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (2, os.path.join(folder, "store")), nprocs=2)
