"""Random bits: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", 3.3).

The bits of an element depend on the seed, the element's index and a stream number alone. The key is the seed (64 bits);
the counter is (block, low word first; stream; 0). The 128 bits of block b belong to elements 8 b to 8 b + 7, 16 bits
each, or to 4 b to 4 b + 3, 32 bits each, least significant bits of the first word first. Every back end draws the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits, as the words of counter and key in int64 tensors of values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around at 64 bits, which leaves all of their bits right.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _words(seed: Tensor, first: int, blocks: int, stream: int) -> Tensor:
    """(blocks, 4) words of the blocks from number `first` on."""
    seed = seed.reshape(())
    block = torch.arange(first, first + blocks, device=seed.device)
    zero = torch.zeros_like(block)
    counter = (block & _WORD, block >> 32 & _WORD, zero + stream, zero)
    return torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1)


def _slice(values: Tensor, first: int, count: int) -> Tensor:
    """Of at least two blocks, and by index: where torch.export leaves `count` open, numbers of blocks that may be one
    and slices would hold for some sizes only."""
    return values.flatten()[torch.arange(first, first + count, device=values.device)]


def random16(seed: Tensor, count: int, first: int = 0, stream: int = 0) -> Tensor:
    """(count,) int64 values below 2^16 of the elements from `first` on; `seed` a one-element int64 tensor."""
    words = _words(seed, first // 8, count // 8 + 2, stream)
    return _slice(torch.stack((words & 0xFFFF, words >> 16), -1), first % 8, count)


def random32(seed: Tensor, count: int, first: int = 0, stream: int = 0) -> Tensor:
    """(count,) int64 values below 2^32 of the elements from `first` on; `seed` a one-element int64 tensor."""
    return _slice(_words(seed, first // 4, count // 4 + 2, stream), first % 4, count)


# In the place of a seed: one is to be drawn from torch's default generator.
DRAW: Literal[True] = True
Seed = Tensor | Literal[True]


def drawn(seed: Seed | None, device: torch.device) -> Tensor | None:
    return new_seed(device) if seed is DRAW else seed


def new_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A one-element int64 seed drawn on `device` from its default generator or `generator`: no host sync."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
