"""Bugs of the optimizers: of a rule, of what the step keeps, of what it notices.

Not one operator's results but a whole test tells, so each names the test that must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedtricks.ops import _optimizer, _shard, _states, _table
from fusedtricks.ops._optimizer import FusedOptimizer
from fusedtricks.ops._table import LR, Rule
from fusedtricks.ops.adagrad import ADAGRAD_RULE
from fusedtricks.ops.adamw import ADAMW_RULE, BETA1, BETA2
from fusedtricks.ops.nadam import NADAM_RULE
from fusedtricks.ops.rmsprop import RMSPROP_RULE
from fusedtricks.ops.sgd import SGD_RULE


class OptimizerBug(NamedTuple):
    """`owner.name` becomes `wrong(right)`; then `test` ("file::function") called with `args` must fail."""

    owner: Any
    name: str
    wrong: Callable[[Any], Any]
    test: str
    args: tuple[Any, ...] = ()


def in_prepare(change: Callable[..., tuple[Any, ...]]) -> Callable[[Any], Any]:
    """The scalars of other arguments: `change(h, t, first, factor)`."""
    return lambda right: lambda *args: right(*change(*args))


def in_scalars(**change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Other scalars of the right arguments."""

    def wrong(right: Any) -> Any:
        def prepare(*args: Any) -> Any:
            scalars, after = right(*args)
            return scalars._replace(**{k: f(getattr(scalars, k)) for k, f in change.items()}), after

        return prepare

    return wrong


def rounded(h: Any, *columns: int) -> list[float]:
    """Hyper-parameters that went through fp32, as arguments of a kernel do."""
    return [float(torch.tensor(v, dtype=torch.float32)) if i in columns else v for i, v in enumerate(h)]


def forgetting_maximum(right: Any) -> Any:
    def update(p: Tensor, g: Tensor, s: list[Tensor | None], c: Any) -> Tensor:
        if c.amsgrad:
            s[2] = torch.zeros_like(s[2])
        return right(p, g, s, c)

    return update


class Blind:
    """A step plan that does not notice, or does not tell."""

    def __init__(self, plan: Any, **methods: Any):
        self.plan, self.methods = plan, methods

    def __getattr__(self, name: str) -> Any:
        return self.methods.get(name) or getattr(self.plan, name)


def blind(**methods: Any) -> Callable[[Any], Any]:
    def wrong(build: Any) -> Any:
        def blinded(self: FusedOptimizer) -> None:
            build(self)
            self._plan = self._plan and Blind(self._plan, **methods)

        return blinded

    return wrong


def from_defaults(right: Any) -> Any:
    def read(self: FusedOptimizer) -> None:
        groups, self.param_groups = self.param_groups, [self.defaults for _ in self.param_groups]
        right(self)
        self.param_groups = groups

    return read


def found_only_if_one(run: Any) -> Any:
    def wrong(self: Any, op: Any, changes: int, scale: Any, found: Any, *rest: Any) -> None:
        run(self, op, changes, scale, None if found is None else (found == 1).float(), *rest)

    return wrong


def one_table_for_all(upload: Any) -> Any:
    return lambda self, changes: self._on_device.copy_(upload(self, changes))


def captured_is_copied(upload: Any) -> Any:
    def wrong(self: Any, changes: int) -> Tensor:
        table = upload(self, changes)
        self._late = 0
        return table

    return wrong


def moments_in_float32(right: Any) -> Any:
    """As torch: what is loaded gets the parameter's dtype."""
    return lambda self, saved: torch.optim.Optimizer.load_state_dict(self, saved)


def row(change: Callable[[_table.Row], None]) -> Callable[[Any], Any]:
    def wrong(right: Any) -> Any:
        def update_row(rule: Rule, row: _table.Row, *rest: Any) -> None:
            change(row)
            right(rule, row, *rest)

        return update_row

    return wrong


def counted_in_float32(row: _table.Row) -> None:
    if row.step is not None:
        row.taken = int(row.step.item())


def average_from_zero(row: _table.Row) -> None:
    if row.ema is not None and row.taken == 0:
        row.ema.zero_()


def half_to_even(right: Any) -> Any:
    """bfloat16 rounded as usual, though the remainder's sign is to tell which way it went."""
    return lambda weight: (weight.bfloat16(), right(weight)[1])


CAPTURED_TABLE = "test_optim_devices::test_a_captured_step_has_a_table_of_its_own"
FOLLOWS_TORCH = "test_optim_torch::test_50_steps_in_float64"
EXACT = "test_optim_precision::test_update_against_float64"
OPTIMIZER_BUGS = {
    "bias correction of the next step": OptimizerBug(
        ADAMW_RULE, "prepare", in_prepare(lambda h, t, *rest: (h, t + 1, *rest)), FOLLOWS_TORCH, ("AdamW", "for-loop")
    ),
    "betas in fp32": OptimizerBug(
        ADAMW_RULE,
        "prepare",
        in_prepare(lambda h, *rest: (rounded(h, BETA1, BETA2), *rest)),
        EXACT,
        ("AdamW", 10, 0.99999),
    ),
    "eps inside the bias correction": OptimizerBug(
        ADAMW_RULE, "prepare", in_scalars(eps=lambda eps: 1e-8), EXACT, ("AdamW", 10, 0.999)
    ),
    "decoupled decay through the gradient": OptimizerBug(
        _table,
        "decays",
        lambda right: lambda h: (right(h)[1] / (h[LR] or 1), 0.0),
        FOLLOWS_TORCH,
        ("AdamW", "for-loop"),
    ),
    "maximum of squares forgotten": OptimizerBug(
        ADAMW_RULE, "update", forgetting_maximum, "test_optim::test_layouts", ("Adam", "plain", "plain")
    ),
    "product of momenta not advanced": OptimizerBug(
        NADAM_RULE,
        "prepare",
        lambda right: lambda h, t, first, factor: (right(h, t, first, factor)[0], factor),
        FOLLOWS_TORCH,
        ("NAdam", "for-loop"),
    ),
    "momentum of this step for the next": OptimizerBug(
        NADAM_RULE, "prepare", in_scalars(of_average=lambda v: v * 1.001), FOLLOWS_TORCH, ("NAdam", "for-loop")
    ),
    "dampening at the first step": OptimizerBug(
        SGD_RULE,
        "prepare",
        in_prepare(lambda h, t, first, factor: (h, t, False, factor)),
        "test_optim::test_layouts",
        ("SGD", "plain", "plain"),
    ),
    "not centered": OptimizerBug(
        RMSPROP_RULE,
        "prepare",
        in_scalars(centered=lambda _: False),
        "test_optim::test_layouts",
        ("RMSprop", "plain", "plain"),
    ),
    "learning rate decayed a step early": OptimizerBug(
        ADAGRAD_RULE,
        "prepare",
        in_prepare(lambda h, t, *rest: (h, t + 1, *rest)),
        "test_optim::test_layouts",
        ("Adagrad", "plain", "plain"),
    ),
    "strides of the gradient ignored": OptimizerBug(
        _optimizer,
        "follow",
        lambda _: lambda grad, param: grad,
        "test_optim::test_layouts",
        ("AdamW", "plain", "transposed"),
    ),
    "gaps of a parameter overwritten": OptimizerBug(
        _optimizer,
        "kind_of",
        lambda _: lambda row: _table.KINDS[row.param.dtype, row.param.dtype],
        "test_optim::test_layouts",
        ("SGD", "every second", "every second"),
    ),
    "moments of another memory format": OptimizerBug(
        _states,
        "same_layout",
        lambda _: lambda a, b: True,
        "test_optim::test_checkpoint_of_another_memory_format",
        ("AdamW",),
    ),
    "states loaded in the parameter's dtype": OptimizerBug(
        FusedOptimizer,
        "load_state_dict",
        moments_in_float32,
        "test_optim_precision::test_resuming_is_exact",
        ("AdamW", {}),
    ),
    "versions not bumped": OptimizerBug(
        FusedOptimizer,
        "_build",
        blind(bump_versions=lambda *_: None),
        "test_optim::test_versions_are_bumped",
        ("AdamW",),
    ),
    "hyper-parameters of the constructor": OptimizerBug(
        FusedOptimizer,
        "_read_hypers",
        from_defaults,
        "test_optim::test_everything_that_can_change_between_steps",
        ("AdamW", False),
    ),
    "graphs and eager steps share a table": OptimizerBug(_shard.Shard, "_upload", one_table_for_all, CAPTURED_TABLE),
    "what a capture copies counts as copied": OptimizerBug(_shard.Shard, "_upload", captured_is_copied, CAPTURED_TABLE),
    "found_inf is a count": OptimizerBug(
        _shard.Shard, "run", found_only_if_one, "test_optim_precision::test_found_inf_skips_everything", ("AdamW", 2.0)
    ),
    "a skipped first step forgotten": OptimizerBug(
        _optimizer,
        "_taken",
        lambda _: lambda place: 1,
        "test_optim_precision::test_a_skipped_first_step_leaves_no_momentum",
        ("no gradient", "plain", True),
    ),
    "count in float32": OptimizerBug(
        _table, "update_row", row(counted_in_float32), "test_optim_precision::test_steps_beyond_float32"
    ),
    "average starts from zero": OptimizerBug(
        _table, "update_row", row(average_from_zero), "test_optim_precision::test_ema", ("SGD",)
    ),
    "remainder of another rounding": OptimizerBug(
        _table, "split", half_to_even, "test_optim_precision::test_remainder_equals_fp32_masters", ("SGD",)
    ),
    "the same random bits every step": OptimizerBug(
        _table,
        "round_stochastically",
        lambda right: lambda weight, seed, stream: right(weight, 1, stream),
        "test_optim_precision::test_stochastic_rounding_is_unbiased_and_repeats",
        (20_000,),
    ),
    "small gradients scaled up to the norm": OptimizerBug(
        _table,
        "clip_coefficient",
        lambda _: lambda norm, most: 1.0 if most is None else most / (norm + 1e-6),
        "test_optim_precision::test_max_grad_norm",
        ("SGD",),
    ),
    "unscaled gradients not written back": OptimizerBug(
        _table,
        "update_row",
        lambda right: lambda *args: right(*args[:-1], False),
        "test_optim_precision::test_grad_scaler",
        ("SGD", False),
    ),
}
