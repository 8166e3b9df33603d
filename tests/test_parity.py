"""Every case x dtype x layout x gradient layout x parameters x gradients wanted x back end, forward and backward."""

import pytest
from cases import CASES
from sweep import DTYPES, Config, Target, check, configurations, takes, targets

RUNS = [
    pytest.param(stem, config, target, id=f"{stem}-{target}-{config}")
    for stem, case in CASES.items()
    for config in configurations(case)
    for target in targets(case)
    if takes(target, DTYPES[config.dtype])
]


@pytest.mark.parametrize(("stem", "config", "target"), RUNS)
def test_parity(stem: str, config: Config, target: Target) -> None:
    check(CASES[stem], config, target)
