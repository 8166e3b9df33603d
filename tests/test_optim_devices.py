"""The optimizers on tensors that indices of 32 bits do not reach, and on several devices and dtypes at once."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import torch
from torch import Tensor

from fusedtricks import optim
from fusedtricks.ops import _optimizer, _states, _table
from fusedtricks.ops._shard import Shard

ITEMS = 2**31 + 5


class Repeated:
    """A tensor of so many bfloat16 whose memory is 1 MiB, over and over; the last of it, from 2^31 on, is its own."""

    SIZE = 2**20

    def __init__(self, value: float):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.bytes = 2**32 + self.SIZE
        self.base = self._map(None, self.bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1)  # no reserve
        file = os.memfd_create("repeated")
        os.ftruncate(file, self.SIZE)
        fixed, both = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
        for at in range(0, 2**32, self.SIZE):
            self._map(self.base + at, self.SIZE, both, mmap.MAP_SHARED | fixed, file)
        self._map(self.base + 2**32, self.SIZE, both, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1)
        os.close(file)
        whole = torch.frombuffer((ctypes.c_char * self.bytes).from_address(self.base), dtype=torch.bfloat16)
        self.tensor, self.end, self.beyond = whole[:ITEMS], whole[2**31 : ITEMS], whole[ITEMS : ITEMS + 100]
        whole[: self.SIZE // 2] = value
        self.end.fill_(value)

    def _map(self, at: int | None, size: int, protection: int, flags: int, file: int) -> int:
        place = self.libc.mmap(at, size, protection, flags, file, 0)
        if place in (None, ctypes.c_void_p(-1).value):
            pytest.skip(f"mmap: {os.strerror(ctypes.get_errno())}")
        return place

    def close(self) -> None:
        self.libc.munmap(ctypes.c_void_p(self.base), ctypes.c_size_t(self.bytes))


@pytest.mark.skipif(sys.platform != "linux", reason="maps one piece of memory many times")
def test_more_elements_than_int32() -> None:
    """Trap 17. All of the parameter is stepped, elements past 2^31 once, and nothing behind them."""
    weights, grads = Repeated(0.0), Repeated(1.0)
    try:
        small = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))  # its place in the table is past 2^31 too
        p = torch.nn.Parameter(weights.tensor)
        p.data, p.grad, small.grad = weights.tensor, grads.tensor, torch.ones_like(small)
        optim.SGD([p, small], lr=1.0).step()
        assert (weights.end == -1).all()
        assert (weights.beyond == 0).all()
        assert (small == -1).all()
        # Memory that is stepped over and over by several threads goes down, by how much none can say.
        assert (weights.tensor[: Repeated.SIZE // 2] < 0).all()
        del p
    finally:
        weights.close()
        grads.close()


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD"])
def test_a_tensor_lr_of_several_devices_and_dtypes(name: str) -> None:
    """Trap 19: one lr of groups of one device, another, and again the first in another dtype; it stays where it is."""

    def groups(lr: float | Tensor) -> list[dict[str, object]]:
        torch.manual_seed(0)
        kinds = [("cpu", torch.float32), ("meta", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float64)]
        params = [torch.nn.Parameter(torch.randn(5, device=device, dtype=dtype)) for device, dtype in kinds]
        for p in params:
            p.grad = torch.randn_like(p)
        return [{"params": [p], "lr": lr} for p in params]

    lr = torch.tensor(0.5, dtype=torch.float64)
    options = {"foreach": False} | ({"momentum": 0.9} if name == "SGD" else {})
    a, b = (getattr(optim, name)(groups(value), **options) for value in (lr, 0.5))
    for value in (0.5, 0.25):
        lr.fill_(value)
        for group in b.param_groups:
            group["lr"] = value
        a.step()
        b.step()
    for mine, other in zip(a.param_groups, b.param_groups, strict=True):
        assert mine["lr"] is lr
        assert mine["params"][0].device == other["params"][0].device
        if mine["params"][0].device.type == "cpu":
            assert torch.equal(mine["params"][0], other["params"][0])
    assert lr.device.type == "cpu"
    assert lr.item() == 0.25


@pytest.mark.parametrize("native", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "RMSprop"])
def test_numbers_that_are_read_on_the_device(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the CPU in its place: nobody asks for the item of a tensor lr, weight decay or beta."""
    if not native:
        monkeypatch.setattr(_optimizer, "_plan", None)
    elif _optimizer._plan is None:
        pytest.skip("no compiled step plan in this build")
    results = []
    for live in (True, False):
        torch.manual_seed(0)
        number = torch.tensor if live else float
        params = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
        for p in params:
            p.grad = torch.randn_like(p)
        options = {"foreach": False} if live else {}
        o = getattr(optim, name)([{"params": [p]} for p in params], lr=0.5, **options)
        place = (lambda self: self._shards[0].progress) if live else (lambda self: None)
        monkeypatch.setattr(_optimizer.FusedOptimizer, "_on_one_device", place)
        o.param_groups[0]["lr"] = number(0.5)
        if live:
            shared = o.param_groups[0]["lr"]
            monkeypatch.setattr(Tensor, "item", None)
            monkeypatch.setattr(Tensor, "__float__", None)
        for i in range(6):
            if live and i in (1, 4):
                shared.fill_(2.0**-i)
            elif i in (1, 4):
                o.param_groups[0]["lr"] = 2.0**-i
            if i == 2:
                o.param_groups[1]["weight_decay"] = number(0.25)
            if i == 3:  # pushed to graphs at once, and another tensor in the place of one
                o.param_groups[1]["weight_decay"] = number(0.125)
                o.push_hyperparameters()
                assert torch.equal(o._hyper[1, _table.WEIGHT_DECAY], torch.tensor(0.125, dtype=torch.float64))
            if i == 5 and "betas" in o.param_groups[1]:
                o.param_groups[1]["betas"] = (number(0.5), 0.75)
            o.step()
        monkeypatch.undo()
        if not native:
            monkeypatch.setattr(_optimizer, "_plan", None)
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW", "NAdam", "RMSprop", "SGD"])
def test_what_a_capture_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before a step on a GPU, with and without a capture."""
    p = torch.nn.Parameter(torch.ones(2))
    has_flag = name not in ("Adagrad", "SGD")
    o = getattr(optim, name)([p], lr=0.1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    o._check_capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if has_flag:
        with pytest.raises(RuntimeError, match=f"CUDA graph capture .* instance of {name} but .* capturable is False"):
            o._check_capture()
        o.param_groups[0]["capturable"] = True
    o._check_capture()
    o.step()
    with pytest.raises(RuntimeError, match=f"{name}: 1 parameters have no gradient"):
        o._check_capture()


def as_on_a_gpu(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> Shard:
    """With the CPU in its place, nothing captured, one stream, and nothing to wait for."""
    shard.remote, shard._late, shard._staged, shard._staged_hyper, shard._streams = True, 0, [], None, {0}
    shard._on_device, shard._hyper_on_device = torch.zeros_like(shard.table), torch.zeros_like(shard.hyper)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return shard


def test_a_captured_step_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps to the gradients it was captured with, and what a capture copies no eager step has."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    o = optim.SGD([p], lr=0.1)
    o.step()
    shard = as_on_a_gpu(o._shards[0], monkeypatch)
    calls = []

    def run(changes: int, capturing: bool) -> Tensor:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        shard.run(lambda table, *_: calls.append(table), changes, None, None, None, None)
        return calls[-1]

    eager = run(_optimizer.POINTERS | _optimizer.HYPERS, capturing=False)
    assert torch.equal(eager, shard.table)
    assert shard.captured() == []
    before = eager.clone()
    shard.table[0, _table.GRAD] += 64
    shard.hyper[0, _table.LR] = 0.5
    graph = run(_optimizer.POINTERS | _optimizer.HYPERS, capturing=True)
    assert torch.equal(graph, shard.table)
    assert torch.equal(eager, before)
    assert any(t is shard.progress for t in shard.captured())
    shard._hyper_on_device.zero_()  # the graph has not run
    assert run(0, capturing=False) is eager
    assert torch.equal(eager, shard.table)
    assert torch.equal(shard._hyper_on_device, shard.hyper)
    eager.zero_()
    assert run(0, capturing=False) is eager
    assert not eager.any()
    assert run(0, capturing=True) is not eager  # whatever eager steps will have there
    kept = shard.captured()
    o._forget()
    assert [id(t) for t in o._captured] == [id(t) for t in kept]


def test_what_replays_read_changes_when_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    o = optim.SGD([p], lr=0.1)
    o.step()
    shard = as_on_a_gpu(o._shards[0], monkeypatch)
    shard.hyper[0, _table.WEIGHT_DECAY] = torch.nan  # as of a number that is read on the device
    seen: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(shard._staged_hyper.clone()))
    o.push_hyperparameters()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shard.upload_hypers()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    o.push_hyperparameters()
    assert seen == []
    o.param_groups[0]["lr"] = 0.5
    o.push_hyperparameters()
    o.push_hyperparameters()
    assert [t[0, _table.LR].item() for t in seen] == [0.1]
    assert shard._staged_hyper[0, _table.LR] == 0.5


def test_the_allocator_is_told_of_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    o = optim.SGD([p], lr=0.1)
    o.step()
    shard = as_on_a_gpu(o._shards[0], monkeypatch)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: told.append((id(t), stream)))
    for stream, capturing in ((0, False), (1, True), (1, False), (1, False)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        shard.run(lambda *_: None, 0, None, None, None, None)
    made = (shard._on_device, shard._hyper_on_device, shard.progress, shard.outcome)
    assert told == [(id(t), 1) for t in made]


@pytest.mark.filterwarnings("error")
def test_states_of_fake_tensors() -> None:
    """Which have no memory that an address could be asked of."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3, 4).t())
        for state in (_states._like(p, torch.float32), _states._like(p, torch.bfloat16)):
            assert state.stride() == p.stride()
            assert state.shape == p.shape
