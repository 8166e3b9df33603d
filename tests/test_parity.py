"""Every case x dtype x layout x gradient layout x parameters x gradients wanted x back end, forward and backward.

Instruction sets compile the same source. The one that serves here runs everything; each of the others, and the
reference, whose layouts are PyTorch's business, every shape and hard value, and a sixth of the rest. Shapes that are
large to reach a way of storing, or the limits of a GPU's grid, are nothing to the reference, and to lesser instruction
sets in two dtypes.
"""

import math
import zlib

import pytest
from cases import CASES
from sweep import DTYPES, Config, Target, check, configurations, shape_of, takes, targets

LARGE = 1_000_000  # elements


def chosen(stem: str, config: Config, target: Target) -> bool:
    serving = CASES[stem].operators[0].cpu or "reference"
    if target.device != "cpu" or target.backend in (serving, "triton"):
        return True
    large = math.prod(shape_of(CASES[stem], config)[0]) > LARGE
    if large and (target.backend == "reference" or config.dtype not in ("fp32", "bf16")):
        return False
    plain = config in (Config(config.shape, config.dtype), Config("", config.dtype, adversary=config.adversary))
    return plain or zlib.crc32(f"{stem} {config} {target}".encode()) % 6 == 0


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
