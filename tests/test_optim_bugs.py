"""Every seeded bug of the optimizers is caught by the test that it names."""

from __future__ import annotations

import importlib
import inspect

import pytest
from seeded_bugs.optimizers import OPTIMIZER_BUGS
from sweep import INTERPRETED

import fusedtricks
from fusedtricks.ops import _optimizer
from fusedtricks.ops._table import Rule

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the bugs are in the reference and around it")


@pytest.mark.parametrize("name", OPTIMIZER_BUGS)
def test_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = OPTIMIZER_BUGS[name]
    if _optimizer._plan is None and bug.name == "_build":
        pytest.skip("no compiled step plan in this build")
    file, _, function = bug.test.partition("::")
    test = getattr(importlib.import_module(file), function)
    given = bug.args
    if "monkeypatch" in inspect.signature(test).parameters:
        given = (*given, monkeypatch)
    with fusedtricks.backend("reference"):
        test(*given)
        wrong = bug.wrong(getattr(bug.owner, bug.name))
        if isinstance(bug.owner, Rule):  # frozen
            monkeypatch.setitem(bug.owner.__dict__, bug.name, wrong)
        else:
            monkeypatch.setattr(bug.owner, bug.name, wrong)
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
            test(*given)
