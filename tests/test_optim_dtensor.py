"""DTensor parameters step on their local shards; two processes over gloo."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def _worker(rank: int, world: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

    from fusedtricks import optim

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = DeviceMesh("cpu", list(range(world)))
    share = lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)])  # noqa: E731
    for name, options in (("AdamW", {"amsgrad": True}), ("NAdam", {}), ("SGD", {"momentum": 0.9})):
        torch.manual_seed(0)
        full = torch.randn(5, 4)  # three rows for one process, two for the other
        p, q = torch.nn.Parameter(share(full)), torch.nn.Parameter(full.clone())
        ours = getattr(optim, name)([p], lr=0.1, max_grad_norm=0.5, ema_decay=0.9, **options)
        theirs = getattr(torch.optim, name)([q], lr=0.1, **options)
        for _ in range(3):
            g = torch.randn(5, 4)
            p.grad, q.grad = share(g), g.clone()
            norm = torch.nn.utils.clip_grad_norm_([q], 0.5)
            ours.step()
            theirs.step()
            torch.testing.assert_close(ours.grad_norm, norm)
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
        assert isinstance(ours.state[p]["ema"], DTensor)
        moments = [v for k, v in ours.state[p].items() if k != "step" and v.dim()]
        assert all(isinstance(m, DTensor) and m.to_local().shape == p.to_local().shape for m in moments)
    empty_on_one_process(rank, share)
    dist.destroy_process_group()


def empty_on_one_process(rank: int, share: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Steps are counted alike where a process has no element of a parameter, or no parameter of a group (trap 9)."""
    from fusedtricks import optim

    def parameters() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        row = torch.nn.Parameter(share(torch.ones(1, 3)))  # its one row is the first process's
        return [row], [] if rank else [torch.nn.Parameter(torch.ones(4))]

    def steps(o: torch.optim.Optimizer, groups: Sequence[Sequence[torch.Tensor]], count: int) -> None:
        for _ in range(count):
            for p in (p for group in groups for p in group):
                p.grad = torch.ones_like(p)
            o.step()

    groups = parameters()
    o = optim.NAdam([{"params": g} for g in groups], lr=0.1)
    steps(o, groups, 3)
    again = parameters()
    with torch.no_grad():
        for p, q in zip((p for g in again for p in g), (p for g in groups for p in g), strict=True):
            p.copy_(q)
    other = optim.NAdam([{"params": g} for g in again], lr=0.1)
    other.load_state_dict(copy.deepcopy(o.state_dict()))
    steps(o, groups, 2)
    steps(other, again, 2)
    for optimizer in (o, other):
        assert {s["step"].item() for s in optimizer.state.values()} == {5}
        assert len({s["mu_product"].item() for s in optimizer.state.values()}) == 1
    assert torch.equal(groups[0][0].full_tensor(), again[0][0].full_tensor())
    assert (groups[0][0].full_tensor() < 1).all()


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (2, os.path.join(folder, "store")), nprocs=2)
