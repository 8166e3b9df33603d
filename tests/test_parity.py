"""Every case x dtype x layout x gradient layout x parameters x gradients wanted x back end, forward and backward.

Instruction sets compile the same source. The one that serves here runs everything, each of the others every shape and
hard value, and a fifth of the rest.
"""

import zlib

import pytest
from cases import CASES
from sweep import DTYPES, Config, Target, check, configurations, takes, targets


def chosen(stem: str, config: Config, target: Target) -> bool:
    default = CASES[stem].operators[0].cpu
    if not target.backend.startswith("cpu:") or target.backend == default:
        return True
    plain = config in (Config(config.shape, config.dtype), Config("", config.dtype, adversary=config.adversary))
    return plain or zlib.crc32(f"{stem} {config} {target}".encode()) % 5 == 0


RUNS = [
    pytest.param(stem, config, target, id=f"{stem}-{target}-{config}")
    for stem, case in CASES.items()
    for config in configurations(case)
    for target in targets(case)
    if takes(target, DTYPES[config.dtype]) and chosen(stem, config, target)
]


@pytest.mark.parametrize(("stem", "config", "target"), RUNS)
def test_parity(stem: str, config: Config, target: Target) -> None:
    check(CASES[stem], config, target)
