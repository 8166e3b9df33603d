"""The states of an optimizer: what its steps keep of every parameter, and where the kernels find it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from fusedtricks import _op
from fusedtricks.ops import _table
from fusedtricks.ops._shard import dense, local, same_layout
from fusedtricks.ops._table import Row, Rule

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class States(torch.optim.Optimizer):
    """Makes the states of a parameter that lack, and moves those that do not lie as the kernels need them."""

    rule: ClassVar[Rule]
    initial_state: ClassVar[str | None] = None  # the default whose value moments start from
    master_weights: str | None
    stochastic_rounding: bool
    state_dtype: torch.dtype | None
    ema_decay: float | None
    _versions: dict[Tensor, int]  # of parameters with masters, after the last step

    def _row(self, group: dict[str, Any], p: Tensor, stream: int, fresh: dict[Tensor, Any]) -> Row:
        flags, grad = 0, in_memory(local(p.grad))
        uses = self.rule.uses(group)
        half = p.dtype in SIXTEEN_BITS
        has_master = half and self.master_weights is not None
        if half and p.dtype != torch.bfloat16 and (self.master_weights == "remainder" or self.stochastic_rounding):
            what = "stochastic_rounding" if self.stochastic_rounding else 'master_weights="remainder"'
            raise ValueError(f"{type(self).__name__}: {what} is for bfloat16 parameters, got {p.dtype}")
        if not (any(uses) or self.rule.counts or has_master or self.ema_decay is not None or self._rounding(p)):
            return Row(local(p), grad, [None] * len(uses), flags=self._rounding(p), stream=stream)
        state = self.state[p]
        self._scalars(group, p, state)
        # Read before they are made: what torch's first step sees is a missing buffer.
        new = self.rule.stem == "sgd" and uses[0] and (state.get(self.rule.states[0]) is None or p in fresh)
        if new and group["dampening"] != 0:
            flags |= _table.FIRST_MOMENTUM
            fresh[p] = None  # also for a second mention of this parameter
        states: list[Tensor | None] = []
        for name, used in zip(self.rule.states, uses, strict=True):
            if used:
                state[name] = self._moment(p, state.get(name), has_master, name)
            states.append(local(state[name]) if used else None)
        if has_master:
            self._master(p, state)
        if self.ema_decay is not None:
            average = state.get("ema")
            if average is None:
                average = state["master"] if self.master_weights == "fp32" and has_master else p.detach()
                average = _like(p, torch.float32 if half else p.dtype).copy_(average)
            state["ema"] = self._fitted(p, average, torch.float32 if half else p.dtype, "ema")
        flags |= self._rounding(p)
        if has_master and self.master_weights == "remainder":
            flags |= _table.REMAINDER
        step = state.get("step") if self.rule.counts or self._rounding(p) else None
        factor = state.get(self.rule.factor) if self.rule.factor else None
        if step is not None and step.dtype == torch.float64:
            flags |= _table.STEP_FLOAT64
        extra = [
            local(state[k]) if k in state and on else None
            for k, on in (("master", has_master), ("ema", self.ema_decay is not None))
        ]
        return Row(local(p), grad, states, *extra, step, factor, flags, stream)

    def _rounding(self, p: Tensor) -> int:
        return _table.STOCHASTIC if self.stochastic_rounding and p.dtype == torch.bfloat16 else 0

    def _scalars(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """torch's 0-dim states, where the kernels can write them: on a GPU the step counts itself."""
        # Stochastic rounding draws new bits every step, so it counts them for SGD too.
        wanted = ["step"] if self.rule.counts or self._rounding(p) else []
        wanted += [self.rule.factor] if self.rule.factor else []
        beside = p.is_cuda or group.get("capturable") or group.get("fused")
        device = p.device if beside else torch.device("cpu")
        dtypes = (torch.float32, torch.float64)
        for name in wanted:
            value = state.get(name)
            if value is None:
                start = 0.0 if name == "step" else 1.0
                dtype = _get_scalar_dtype(is_fused=group.get("fused"))
                state[name] = torch.full((), start, dtype=dtype, device=device)
            elif not isinstance(value, Tensor) or (p.is_cuda and value.device != p.device) or value.dtype not in dtypes:
                value = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
                state[name] = value.to(device, torch.float32)
        if len(wanted) == 2 and state[wanted[0]].dtype != state[wanted[1]].dtype:
            state[wanted[1]] = state[wanted[1]].to(state[wanted[0]].dtype)

    def _moment(self, p: Tensor, value: Tensor | None, has_master: bool, name: str) -> Tensor:
        half = p.dtype in SIXTEEN_BITS
        dtype = (self.state_dtype or (torch.float32 if has_master else p.dtype)) if half else p.dtype
        if value is None:
            start = self.defaults.get(self.initial_state, 0) if self.initial_state else 0
            moment = _like(p, dtype)
            return moment.fill_(complex(start, start) if p.is_complex() else start)
        if not (self.initial_state and value.dtype != dtype and self.state[p]["step"] == 0):
            dtype = value.dtype  # else torch's constructor made it, in the parameter's dtype
        return self._fitted(p, value, dtype, name)

    def _fitted(self, p: Tensor, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """A state as kernels take it: itself, or where a checkpoint or `module.to` left another, a copy that is."""
        if value.layout != torch.strided:
            value = value.to_dense()
        if value.shape != p.shape:
            raise RuntimeError(
                f"{type(self).__name__}: expected state '{name}' of the parameter's shape {list(p.shape)}, got "
                f"{list(value.shape)}"
            )
        fits = value.dtype == dtype and value.device == p.device and (not dense(p) or same_layout(value, p))
        return value if fits else _like(p, dtype).copy_(value)

    def _master(self, p: Tensor, state: dict[str, Any]) -> None:
        remainder = self.master_weights == "remainder"
        dtype = torch.int16 if remainder else torch.float32
        master = state.get("master")
        if master is None:
            state["master"] = _like(p, dtype).copy_(torch.zeros_like(p) if remainder else p)
            return
        master = self._fitted(p, master, master.dtype, "master")
        if master.dtype != dtype:
            if not remainder:
                # torch's load_state_dict gave it the parameter's dtype: it holds no more, or no weights but remainders.
                master = p.detach() if master.dtype == p.dtype else master
                master = _table.join(p, master) if master.dtype == torch.int16 else master
            elif master.dtype == torch.float32:
                master = _table.split(master)[1]
            else:  # torch's load_state_dict gave a remainder the parameter's dtype
                master = master.double().clamp(-(2**15), 2**15 - 1).to(torch.int16)
            master = _like(p, dtype).copy_(master)
        elif self._versions.get(p, version(p)) != version(p):
            # Somebody else wrote to the parameter: there the master follows it.
            shown = p if remainder else _table.visible(local(master), p.dtype)
            kept = torch.zeros_like(master) if remainder else torch.where(shown == local(p), local(master), local(p))
            master.copy_(kept)
        state["master"] = master


def version(p: Tensor) -> int:
    """Grows with every write to the parameter that autograd sees; of inference tensors it keeps none."""
    return 0 if p.is_inference() else p._version


def _like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros, laid out as the parameter is; on a CPU on large pages, as every step passes over them."""
    like = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    part = local(like)
    if _op._C is not None and part.device.type == "cpu" and type(part) is Tensor:  # a fake one has no memory
        _op._C.advise_large_pages(part.data_ptr(), part.untyped_storage().nbytes())
    return like.zero_()


def follow(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient with the strides of its parameter: itself where it has them."""
    return grad if same_layout(grad, param) else torch.empty_like(param).copy_(grad)


def in_memory(grad: Tensor) -> Tensor:
    """The gradient itself, unless it is one of autograd's zeros, which have no memory."""
    return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device) if grad._is_zerotensor() else grad


def kind_of(row: Row) -> int | None:
    """The table's code for the dtypes of a row, or None where no kernel takes it."""
    p, moments = row.param, [s for s in row.states if s is not None]
    if p.device.type not in ("cpu", "cuda") or type(p) not in (Tensor, torch.nn.Parameter) or not dense(p):
        return None
    others = [t for t in (row.grad, *moments, row.master, row.ema) if t is not None]
    if any(t.device != p.device or t.shape != p.shape for t in others) or row.grad.dtype != p.dtype:
        return None
    if any(not same_layout(t, p) for t in others[1:]):
        return None
    if p.is_complex() or any(t.is_neg() or t._is_zerotensor() for t in (p, *others)):
        return None
    scalars = [t for t in (row.step, row.factor) if t is not None]
    if any(t.device != p.device or t.numel() != 1 for t in scalars):
        return None
    if any(type(t) is not Tensor for t in (*others, *scalars)):
        return None
    weights = torch.int16 if row.flags & _table.REMAINDER else torch.float32
    counts = torch.float64 if row.flags & _table.STEP_FLOAT64 else torch.float32
    alike = [(moments, moments[0].dtype if moments else None), (scalars, counts)]
    alike += [([row.master], weights), ([row.ema], _table.accumulate_dtype(p.dtype))]
    if any(t is not None and t.dtype != dtype for tensors, dtype in alike for t in tensors):
        return None
    return _table.KINDS.get((p.dtype, moments[0].dtype if moments else p.dtype))
