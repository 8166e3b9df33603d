"""The parameters of one device: their table, and the operator call."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedtricks._op import Op
from fusedtricks.ops import _table
from fusedtricks.ops._table import Row

# CUDA and Triton kernels take tiles of so many elements; a row begins with a tile of its own.
TILE = 8192


class Shard:
    """`entries`: (kind, group, row, parameter, gradient before it was copied to the parameter's layout or None).

    `rows` and `copied` are there until the first step, which has the gradients of now: held longer they would outlive
    `zero_grad`. What later steps point to somebody else holds.

    `tiled`: count whole tiles in START, for kernels of a GPU.
    """

    def __init__(
        self,
        device: torch.device,
        entries: list[tuple[int, int, Row, Tensor, Tensor | None]],
        hyper: Tensor,
        tiled: bool = False,
    ):
        tiled = tiled or device.type != "cpu"
        self.device = device
        self.rows = [row for _, _, row, _, _ in entries]
        self.params = [p for _, _, _, p, _ in entries]
        self.copied = [(source, row.grad) for _, _, row, _, source in entries if source is not None]
        cells, segments, start = [], [], 0
        for i, (kind, group, row, _, _) in enumerate(entries):
            n = row.param.numel()
            if not segments or segments[-1][0] != kind:
                segments.append([kind, i, 0, 0])
                start = 0 if tiled else start
            taken = -(-n // TILE) * TILE if tiled else n
            segments[-1][2] += 1
            segments[-1][3] += taken
            cells.append(_cells(row, kind, group, start))
            start += taken
        self.table = torch.tensor(cells, dtype=torch.int64, device="cpu").reshape(-1, _table.COLUMNS)
        self.segments = torch.tensor(segments, dtype=torch.int64, device="cpu").reshape(-1, 4)
        self.progress = torch.zeros(len(entries) + 1, dtype=torch.int64, device=device)
        self.outcome = torch.zeros(2, dtype=torch.float32, device=device)
        self.hyper = hyper
        # (group, column, number on this device): read at every step, and by captured graphs at every replay.
        self.live: list[tuple[int, int, Tensor]] = []
        self.remote = device.type != "cpu"
        if self.remote:
            self._on_device = torch.empty_like(self.table, device=device)
            self._hyper_on_device = torch.empty_like(hyper, device=device)
            self._late = 0  # changes that only captured graphs have brought there
            # Captured graphs read these again at every replay.
            self._staged: list[Tensor] = []
            self._staged_hyper: Tensor | None = None
            self._streams = {torch.cuda.current_stream(device)}  # those that the allocator knows of

    def watched(self) -> list[list[Tensor]]:
        """What else rows point to, and would not notice being moved."""
        return [[t for t in (*r.states, r.master, r.ema, r.step, r.factor) if t is not None] for r in self.rows]

    def captured(self) -> list[Tensor]:
        """What graphs that captured a step read and write at every replay, and must find where it was."""
        if not self.remote or not self._staged:
            return []
        hyper = [] if self._staged_hyper is None else [self._staged_hyper]
        return [self.progress, self.outcome, self._hyper_on_device, *self._staged, *hyper]

    def run(
        self,
        op: Op,
        changes: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: Tensor | None,
        max_norm: float | None,
    ) -> None:
        table, hyper = self.table, self.hyper
        if self.remote:
            table, hyper = self._upload(changes), self._hyper_on_device
            self._tell_allocator()
        self._read_live()
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(self.device, non_blocking=True)
        if norm is not None:
            norm = norm.to(self.device, non_blocking=True)
        op(table, self.segments, self.progress, hyper, self.outcome, grad_scale, found_inf, norm, max_norm)
        if grad_scale is not None and self.copied:
            with torch.no_grad():
                for source, copy in self.copied:
                    source.copy_(copy)
        if self.rows:
            self.rows, self.copied = [], []

    def _tell_allocator(self) -> None:
        """Memory made on one stream and used on another must not be given away before the other is done with it."""
        stream = torch.cuda.current_stream(self.device)
        if stream in self._streams or torch.cuda.is_current_stream_capturing():
            return
        for t in (self._on_device, self._hyper_on_device, self.progress, self.outcome):
            t.record_stream(stream)
        self._streams.add(stream)

    def _upload(self, changes: int) -> Tensor:
        """The table on the device."""
        capturing = torch.cuda.is_current_stream_capturing()
        changes |= self._late
        self._late = changes if capturing else 0
        if changes & 4:
            self.upload_hypers()
        if not (changes & 3 or capturing):
            return self._on_device
        # A fresh buffer each time: the copy before may not have been made yet.
        staged = self.table.pin_memory()
        if capturing:
            # A table of the graph's own: it keeps to the gradients of now, and eager steps to theirs.
            self._staged.append(staged)
            return torch.empty_like(self._on_device).copy_(staged, non_blocking=True)
        return self._on_device.copy_(staged, non_blocking=True)

    def upload_hypers(self) -> None:
        if self.remote:
            capturing = torch.cuda.is_current_stream_capturing()
            if self._staged_hyper is not None:  # a graph holds a copy from here, which must bring what holds now
                bits = [t.view(torch.int64) for t in (self._staged_hyper, self.hyper)]  # what is not read here is NaN
                if not capturing and not torch.equal(*bits):
                    # Replays before this one may still be queued, and read here only when they run.
                    torch.cuda.synchronize(self.device)
                self._staged_hyper.copy_(self.hyper)
            if capturing and self._staged_hyper is None:
                self._staged_hyper = self.hyper.pin_memory()
            # Otherwise a fresh buffer, as above: a host that is ahead must not change steps that are still to come.
            source = self._staged_hyper if capturing else self.hyper.pin_memory()
            self._hyper_on_device.copy_(source, non_blocking=True)
        self._read_live()

    def _read_live(self) -> None:
        hyper = self._hyper_on_device if self.remote else self.hyper
        for group, column, value in self.live:
            hyper[group, column].copy_(value.detach())


def _cells(row: Row, kind: int, group: int, start: int) -> list[int]:
    address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
    states = [address(t) for t in row.states]
    cells = [row.param.numel(), kind, group, row.flags, address(row.param), address(row.grad)]
    cells += [*states, *[0] * (3 - len(states)), *map(address, (row.master, row.ema, row.step, row.factor))]
    cells += [row.stream, start]
    return cells + [0] * (_table.COLUMNS - len(cells))


def local(t: Tensor | None) -> Tensor | None:
    """The shard of a DTensor that this process holds; anything else as it is."""
    if t is None or type(t) in (Tensor, torch.nn.Parameter) or not hasattr(t, "_local_tensor"):
        return t
    part = t._local_tensor
    return part if type(part) is Tensor else t.to_local()


def dense(t: Tensor) -> bool:
    """No gaps and no overlaps in memory."""
    if type(t) not in (Tensor, torch.nn.Parameter):
        return True
    return t.is_contiguous() or t.stride() == torch.empty_like(t, device="meta").stride()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Do equal indices lie at equal offsets?"""
    if a.stride() == b.stride() or a.numel() <= 1:
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
