"""What all optimizers share: torch's interface around one operator call per device and step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.optim import optimizer

from fusedtricks._op import for_this_torch
from fusedtricks.ops import _table
from fusedtricks.ops._shard import Shard, local
from fusedtricks.ops._states import States, follow, in_memory, kind_of, version
from fusedtricks.ops._table import Row

# Without it every step is planned anew.
_plan = for_this_torch("fusedtricks._plan")
STRUCTURE, POINTERS, HYPERS = (1, 2, 4) if _plan is None else (_plan.STRUCTURE, _plan.POINTERS, _plan.HYPERS)
# Besides a rule's own, the keys of a group whose change asks for a new table.
SHAPING = frozenset({"params", "fused", "foreach", "differentiable", "capturable"})


class FusedOptimizer(States):
    """One launch per step and device, whatever the number of parameters and groups.

    Everything torch's class of the same name has works as there: arguments, defaults, groups, hooks, closures,
    schedulers, GradScaler, state_dict in both directions. `fused=False` and `differentiable=True` run torch's own code;
    otherwise our kernels run, whatever `fused` and `foreach` say. Sparse gradients are refused, or served by torch's
    code, as torch does. Arithmetic is float32 for 16-bit parameters, float64 for float64; scalars such as bias
    corrections are computed in float64.

    Keyword-only additions:
        master_weights: "fp32" keeps a float32 copy of every 16-bit parameter as `state["master"]`; "remainder" keeps
            only the 16 bits that a bfloat16 parameter lacks of it, with the same result to the bit. Moments are then
            float32 unless `state_dtype` says otherwise.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that small updates count on average.
            The random bits depend on `group["rounding_seed"]`, drawn from torch's default generator, the step and the
            element alone.
        state_dtype: of the moments of 16-bit parameters: None (the parameter's, as torch), or torch.float32.
        max_grad_norm: clip the gradients' norm over all parameters, as torch.nn.utils.clip_grad_norm_ does, without
            writing them. The norm is left as `.grad_norm`.
        ema_decay: keep `state["ema"]`, an exponential average of the weights, in the same pass: ema = ema_decay ema +
            (1 - ema_decay) weight, starting from the weight before its first step. See :meth:`averaged_parameters`.

    After a step, `.grad_norm` (0-dim float32; zero without `max_grad_norm`) and `.step_skipped` (0-dim bool: GradScaler
    found infinities) are tensors on the device of the first parameter; reading them is what synchronises.

    Raises:
        ValueError: options that do not fit together or with torch's code.
        RuntimeError: sparse gradients where torch refuses them, capture of a graph with parameters without gradients.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    extra_defaults: ClassVar[dict[str, Any]] = {}
    sparse_refusal: ClassVar[str] = "{name} does not support sparse gradients"
    _averaged = False  # do the parameters hold their averages?

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.torch_class = next(c for c in cls.__mro__ if c.__module__.startswith("torch.optim."))
        theirs = inspect.signature(cls.torch_class.__init__).parameters
        own = [p for p in inspect.signature(FusedOptimizer.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY]
        extra = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in cls.extra_defaults.items()]
        added = [p for p in (*own, *extra) if p.name not in theirs]
        cls.__signature__ = inspect.Signature([*list(theirs.values())[1:], *added])

    def __init__(
        self,
        params: Any,
        *args: Any,
        fused: bool | None = None,
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        **kwargs: Any,
    ):
        if master_weights not in (None, "fp32", "remainder"):
            raise ValueError(f'Invalid master_weights: {master_weights!r}; expected None, "fp32" or "remainder"')
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"Invalid state_dtype: {state_dtype}; expected None or torch.float32")
        if max_grad_norm is not None and not max_grad_norm >= 0.0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        self._forget()
        self.ema_decay = ema_decay
        if master_weights and stochastic_rounding:
            raise ValueError("master_weights are rounded to nearest; stochastic_rounding is for weights without them")
        self.master_weights, self.stochastic_rounding, self.state_dtype = (
            master_weights,
            stochastic_rounding,
            state_dtype,
        )
        self.max_grad_norm = max_grad_norm
        self._versions: dict[Tensor, int] = {}
        extra = {key: kwargs.pop(key, default) for key, default in self.extra_defaults.items()}
        if "fused" in inspect.signature(self.torch_class.__init__).parameters:
            kwargs["fused"] = fused
        else:
            extra["fused"] = fused
            if fused and kwargs.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if fused and kwargs.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(params, *args, **kwargs)
        self.defaults.update(extra)
        if stochastic_rounding:
            # Below 2^53, so that float64 holds it with the step added.
            self.defaults["rounding_seed"] = int(torch.randint(2**52, (), device="cpu"))
        self._complete_groups()
        if self._by_torch() and (self._extras() or any(extra.get(k) for k in self.extra_defaults)):
            raise ValueError(
                f"fused=False and differentiable=True run torch's {type(self).__name__}, without additions"
            )

    # ---- torch's protocol --------------------------------------------------------------------------------------------

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps around `step`: hooks and a record for profilers, where there are any; else they would take
        as long as the step of a small model."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            everywhere = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
            if hooks or everywhere or torch.autograd._profiler_enabled() or torch.compiler.is_compiling():
                return hooked(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return wrapper

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; `closure` re-evaluates the model and returns the loss, which is then returned."""
        if torch.compiler.is_compiling():
            return self._step_eagerly(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run()
        return loss

    @torch._dynamo.disable
    def _step_eagerly(self, closure: Callable[[], float] | None) -> Any:
        return FusedOptimizer.step(self, closure)

    def __getstate__(self) -> dict[str, Any]:
        own = ("master_weights", "stochastic_rounding", "state_dtype", "max_grad_norm", "ema_decay")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in own},
            "_unset_buffers": self._unset(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self._versions = {}
        super().__setstate__(state)
        if "ema_decay" in self.__dict__:
            self._ema_decay = self.__dict__.pop("ema_decay")
        self._fresh = dict.fromkeys(self.__dict__.pop("_unset_buffers", ()))
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        unset = self._unset()
        if unset:  # a buffer whose first step was skipped is still to be set, not to be averaged with
            ids = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
            for p in (p for p in unset if id(p) in ids):
                kept = {k: v for k, v in packed["state"][ids[id(p)]].items() if k != self.rule.states[0]}
                packed["state"][ids[id(p)]] = kept
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the dtype they were saved in, and groups their `fused`, which is no state."""
        fused: list[bool | None] = []
        loaded: dict[str, Any] = {}

        def before(_: Any, given: dict[str, Any]) -> None:
            loaded.update(given)
            fused.extend(group["fused"] for group in self.param_groups)

        def after(_: Any) -> None:
            for group, flag in zip(self.param_groups, fused, strict=True):
                group["fused"] = flag
            ids = (i for g in loaded["param_groups"] for i in g["params"])
            for i, p in zip(ids, (p for g in self.param_groups for p in g["params"]), strict=True):
                for key, value in loaded["state"].get(i, {}).items():
                    mine = self.state[p].get(key)
                    if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.dtype != value.dtype:
                        self.state[p][key] = value.to(p.device if key != "step" else mine.device)

        # Next to the loading itself: hooks of others change what loads before, and what was loaded after.
        handles = [self.register_load_state_dict_pre_hook(before)]
        handles += [self.register_load_state_dict_post_hook(after, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not self._by_torch()

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it; ours follows from the groups."""

    def _complete_groups(self) -> None:
        """Groups that came without our keys, such as those of a torch checkpoint, get this optimizer's defaults."""
        for group in self.param_groups:
            for key in ("fused", "rounding_seed", *self.extra_defaults):
                if key in self.defaults:
                    group.setdefault(key, self.defaults[key])

    # ---- what a step leaves ------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor:
        if self._outcome is None:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return self._outcome[0].detach().clone()

    @property
    def step_skipped(self) -> Tensor:
        if self._outcome is None:
            return torch.zeros((), dtype=torch.bool, device="cpu")
        return self._outcome[1].detach() != 0

    @property
    def ema_decay(self) -> float | None:
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, value: float | None) -> None:
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"Invalid ema_decay: {value}")
        before, self._ema_decay = getattr(self, "_ema_decay", None), value
        if (before is None) != (value is None):  # other states
            self._plan = None
        elif self._shards or self._aside:
            self._hyper[:, _table.EMA_DECAY] = value or 0.0
            if self._plan is not None:
                self._plan.expect(HYPERS)

    @contextlib.contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Inside the block the parameters hold their averages (`ema_decay`); afterwards their own values again.

        Raises:
            RuntimeError: an optimizer without `ema_decay`; a step inside the block, which would train the averages.
        """
        if self.ema_decay is None:
            raise RuntimeError("averaged_parameters: this optimizer was made without ema_decay")
        self._harvest_versions()
        self._plan = None
        averaged = [p for g in self.param_groups for p in g["params"] if "ema" in self.state.get(p, {})]
        # Masters of the others, which somebody else wrote to, are still to follow them.
        known = [p for p in averaged if self._versions.get(p) == version(p)]
        own: list[tuple[Tensor, Tensor]] = []
        outer, self._averaged = self._averaged, True
        try:
            with torch.no_grad():
                for p in averaged:
                    own.append((p, p.detach().clone()))
                    p.copy_(self.state[p]["ema"])
            yield
        finally:
            self._averaged = outer
            with torch.no_grad():
                for p, value in own:
                    p.copy_(value)
            self._versions.update({p: version(p) for p in known})

    def push_hyperparameters(self) -> None:
        """Bring changes of lr, weight_decay, ... to captured CUDA graphs: call before replaying one.

        Values that are tensors on the GPU need no call: graphs read them at every replay.
        """
        stale = self._plan is None or self._plan.check(self.param_groups, self.state) & STRUCTURE
        if stale and self._shards:
            self._read_hypers()
        self._find_live()
        for shard in self._shards:
            shard.upload_hypers()

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        plan = self._plan
        changes = STRUCTURE if plan is None else plan.check(self.param_groups, self.state)
        if changes & STRUCTURE:
            if self._by_torch():
                self._drop(self._unset())
                self._forget()
                step = self.torch_class.step
                while getattr(step, "hooked", False):  # our own step has run the hooks
                    step = step.__wrapped__
                step(self)
                return
            self._refuse()
            self._build()
            plan, changes = self._plan, POINTERS | HYPERS
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._capture_checked:
            self._check_capture()
        if changes & HYPERS:
            self._find_live()
        norm = self._norm(grad_scale) if self._norm_apart else None
        for shard in self._shards:
            shard.run(self.rule.op, changes, grad_scale, found_inf, norm, self.max_grad_norm)
        if self._aside or self._sparse:
            self._run_aside(grad_scale, found_inf, norm)
            for _, row in self._aside:  # made anew at the next step; until then gradients would outlive zero_grad
                del row.grad
        for p in self._fakes:
            if "step" in self.state.get(p, ()):
                self.state[p]["step"] += 1
        if plan is not None:
            plan.bump_versions(grad_scale is not None)
        else:
            rows = [*self._fakes, *(p for shard in self._shards for p in shard.params)]
            rows = [p for p in rows if not p.is_inference()]
            if rows:
                torch.autograd.graph.increment_version(rows)
            if self.master_weights:
                self._versions.update({p: p._version for p in rows})

    def _forget(self) -> None:
        self._plan = self._outcome = None
        # Tensors that graphs captured before still use: a replay would write to what then has their memory.
        kept = [t for shard in getattr(self, "_shards", ()) for t in shard.captured()]
        self._captured: list[Tensor] = [*getattr(self, "_captured", ()), *kept]
        self._shards: list[Shard] = []
        self._aside: list[tuple[int, Row]] = []
        self._sparse: list[tuple[dict[str, Any], Tensor]] = []
        # Without values or addresses: states of the right shapes, and their count, are all that a step can leave.
        self._fakes: list[Tensor] = []
        self._absent: list[Tensor] = []
        # Parameters whose momentum buffer was made and is still to be set, and where it is told whether it has been.
        self._fresh: dict[Tensor, tuple[Shard, int] | Row | None] = {}
        self._norm_apart = self._capture_checked = False
        self._remote: Tensor | None = None

    def _by_torch(self) -> bool:
        return any(g.get("fused") is False or g.get("differentiable", False) for g in self.param_groups)

    def _extras(self) -> bool:
        options = (self.master_weights, self.max_grad_norm, self.ema_decay, self.state_dtype)
        return self.stochastic_rounding or any(o is not None for o in options)

    def _refuse(self) -> None:
        """Raise where this step must not be, before anything has changed."""
        if self._averaged:
            raise RuntimeError(f"{type(self).__name__}: a step inside averaged_parameters() would train the averages")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    self._refuse_sparse(group, p)
                if p.is_inference() and not torch.is_inference_mode_enabled():
                    raise RuntimeError(
                        f"{type(self).__name__}: parameters made in inference mode are updated in inference mode only"
                    )

    # Whatever mode this step is in, the next may be in another.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self) -> None:
        """The table of all parameters that have a gradient, and what makes it out of date."""
        self._harvest_versions()
        fresh = dict.fromkeys(self._unset())
        self._forget()
        try:
            self._plan_step(fresh)
        except BaseException:
            self._forget()
            self._fresh = dict.fromkeys(fresh)
            raise

    def _plan_step(self, fresh: dict[Tensor, Any]) -> None:
        """`fresh`: parameters whose momentum buffer was made and is still to be set."""
        hyper = torch.zeros(len(self.param_groups), _table.HYPERS, dtype=torch.float64, device="cpu")
        hyper[:, _table.EMA_DECAY] = self.ema_decay or 0.0
        self._hyper = hyper
        found: list[tuple[int | None, int, Row, Tensor]] = []
        seen: set[Tensor] = set()
        aside: dict[Tensor, Row] = {}
        wrapped, stream = False, 0
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                stream += 1
                if p.grad is None:
                    self._absent.append(p)
                    continue
                if p.grad.layout != torch.strided:
                    self._sparse.append((group, p))
                    self._drop([p] if p in fresh else ())
                    continue
                row = self._row(group, p, stream, fresh)
                if is_fake(p):
                    self._fakes.append(p)
                    continue
                kind = None if p in seen else kind_of(row)
                seen.add(p)
                wrapped |= type(p) not in (Tensor, torch.nn.Parameter)
                found.append((kind, g, row, p))
        shared = _overlapping([p for kind, _, _, p in found if kind is not None])
        rows: dict[torch.device, list[tuple[int, int, Row, Tensor, Tensor | None]]] = {}
        for kind, g, row, p in found:
            if kind is None or p in shared:
                self._aside.append((g, row))
                aside[p] = row
                continue
            source, row.grad = row.grad, follow(row.grad, row.param)
            rows.setdefault(p.device, []).append((kind, g, row, p, None if source is row.grad else source))
        for device, list_ in rows.items():
            self._shards.append(Shard(device, sorted(list_, key=lambda r: r[:2]), hyper))
        self._capture_checked = any(s.device.type != "cpu" for s in self._shards)
        self._norm_apart = self.max_grad_norm is not None and bool(
            len(self._shards) > 1 or self._aside or self._sparse or wrapped
        )
        if self._shards:
            self._outcome = self._shards[0].outcome
        else:
            like = local(self._fakes[0]) if self._fakes else hyper
            self._outcome = like.new_zeros(2, dtype=torch.float32)
        self._remote = self._on_one_device()
        self._fresh = {p: None for p in self._absent if p in fresh}
        flagged = lambda row: row.flags & _table.FIRST_MOMENTUM  # noqa: E731
        for shard in self._shards:
            numbered = enumerate(zip(shard.params, shard.rows, strict=True))
            self._fresh.update({p: (shard, i) for i, (p, row) in numbered if flagged(row)})
        self._fresh.update({p: row for p, row in aside.items() if flagged(row)})
        self._plan = None
        apart = wrapped or self._sparse or self._aside or self._fakes or len(self._shards) > 1
        apart = apart or any(p.is_inference() for shard in self._shards for p in shard.params)
        if _plan is None or apart or is_fake(hyper):
            if self._shards or self._aside:
                self._read_hypers()
            return
        columns = {key: list(places) for key, places in self._columns()}
        plan = _plan.Plan(self.param_groups, self.state, columns, set(SHAPING | self.rule.shape), hyper, self._remote)
        table, params, watched = torch.zeros(0, _table.COLUMNS, dtype=torch.int64, device="cpu"), [], []
        for shard in self._shards:
            table, params, watched = shard.table, shard.params, shard.watched()
        states = [self.state[p] for p in params if p in self.state]
        plan.watch(params, states, watched, self._absent, table, bool(self.master_weights))
        self._plan = plan

    def _columns(self) -> Iterator[tuple[str, Sequence[tuple[int, int]]]]:
        yield from (*self.rule.columns.items(), ("rounding_seed", ((-1, _table.SEED),)))

    def _values(self) -> Iterator[tuple[int, int, Any]]:
        """(group, column, value) of every hyper-parameter."""
        for g, group in enumerate(self.param_groups):
            for key, places in self._columns():
                for index, column in places if key in group else ():
                    yield g, column, group[key] if index < 0 else group[key][index]

    def _read_hypers(self) -> None:
        for g, column, value in self._values():
            self._hyper[g, column] = math.nan if self._stays(value) else float(value)

    def _on_one_device(self) -> Tensor | None:
        """A tensor on the GPU where all is that is stepped; None if some is elsewhere."""
        alone = len(self._shards) == 1 and self._shards[0].remote and not (self._aside or self._sparse)
        return self._shards[0].progress if alone else None

    def _stays(self, value: Any) -> bool:
        """Is it read on the device, where it is, so that the host need not wait and captured graphs obey it?"""
        return self._remote is not None and isinstance(value, Tensor) and value.device == self._remote.device

    def _find_live(self) -> None:
        if self._remote is not None:
            self._shards[0].live = [entry for entry in self._values() if self._stays(entry[2])]

    # ---- what outlives a table ---------------------------------------------------------------------------------------

    def _harvest_versions(self) -> None:
        if self._plan is not None and self.master_weights:
            params = [p for shard in self._shards for p in shard.params]
            self._versions.update(zip(params, self._plan.versions(), strict=True))

    def _unset(self) -> list[Tensor]:
        """Parameters whose momentum buffer no step has set yet, where it matters (SGD with dampening)."""
        return [p for p, place in self._fresh.items() if _taken(place) == 0]

    def _drop(self, unset: Iterable[Tensor]) -> None:
        """What torch's code takes for a parameter at its first step: one without a buffer."""
        for p in unset:
            self.state[p].pop(self.rule.states[0], None)

    # ---- besides the kernels -----------------------------------------------------------------------------------------

    def _refuse_sparse(self, group: dict[str, Any], p: Tensor) -> None:
        if self._extras() or group.get("fused") or not hasattr(self, "_sparse_step"):
            raise RuntimeError(self.sparse_refusal.format(name=type(self).__name__))

    @torch.no_grad()
    def _norm(self, grad_scale: Tensor | None) -> Tensor:
        """Norm of all unscaled gradients, where they are not all in one table."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if any(hasattr(g, "full_tensor") for g in grads):
            norm = torch.nn.utils.get_total_norm(grads)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        else:
            grads = [in_memory(g) for g in grads]
            real = [torch.view_as_real(g.resolve_conj().resolve_neg()) if g.is_complex() else g for g in grads]
            norms = [torch.linalg.vector_norm(g, dtype=_table.accumulate_dtype(g.dtype)) for g in real]
            norms = [n.to(self._outcome.device) for n in norms]
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else self._outcome.new_zeros(())
        if grad_scale is not None:
            norm = norm / grad_scale.to(norm.device)
        self._outcome[0] = norm.to(self._outcome.device)
        return norm

    @torch.no_grad()
    def _run_aside(self, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None) -> None:
        """Parameters that no kernel takes: strided views, other devices, sparse gradients."""
        if not self._shards:
            self._outcome[1] = float(found_inf is not None and found_inf.item() != 0)
        if found_inf is not None and found_inf.item() != 0:
            return
        unscale = 1.0 if grad_scale is None else 1 / grad_scale.double().item()
        factor = unscale * _table.clip_coefficient(0.0 if norm is None else norm.item(), self.max_grad_norm)
        hypers = self._hyper.tolist()
        for g, row in self._aside:
            _table.update_row(self.rule, row, hypers[g], unscale, factor, grad_scale is not None)
        for group, p in self._sparse:
            if grad_scale is not None:
                p.grad._values().mul_(unscale)
            self._sparse_step(group, p)

    def _check_capture(self) -> None:
        if not torch.cuda.is_current_stream_capturing():
            return
        name = type(self).__name__
        if not all(group.get("capturable", True) for group in self.param_groups):  # as torch, where it has the flag
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {name} but param_groups' capturable is "
                "False."
            )
        if self._absent:
            raise RuntimeError(
                f"{name}: {len(self._absent)} parameters have no gradient; a graph captured now would never update "
                "them. Run a backward pass that reaches them, or leave them out of the optimizer."
            )


def _overlapping(params: list[Tensor]) -> set[Tensor]:
    """Dense parameters that share memory with another one: two threads must not update it at once."""
    shared: set[Tensor] = set()
    spans = [(t.data_ptr(), t.numel() * t.element_size(), p) for p, t in ((p, local(p)) for p in params) if t.numel()]
    last, end = None, 0
    for begin, size, p in sorted(spans, key=lambda span: span[0]):
        if begin < end:
            shared |= {p, last}
        if begin + size > end:
            last, end = p, begin + size
    return shared


def _taken(place: tuple[Shard, int] | Row | None) -> int:
    """Steps taken since the row was made; None: it never had one."""
    if place is None or isinstance(place, Row):
        return 0 if place is None else place.taken
    shard, i = place
    return int(shard.progress[i])
