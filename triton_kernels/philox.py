"""Random bits on the device, the same as every back end draws: fusedtricks/ops/_philox.py says which."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, block, stream=0):
    """The four words of random bits of each block. `seed` is an int64 scalar, `block` a tensor of block numbers."""
    block = block.to(tl.uint64)
    zero = (block * 0).to(tl.uint32)
    return tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), zero + tl.cast(stream, tl.uint32), zero, n_rounds=10
    )


@triton.jit
def random32x4(seed, block, stream=0):
    """32 bits for each of the 4 elements of a block: (..., 4) for blocks (...)."""
    w0, w1, w2, w3 = words(seed, block, stream)
    # join puts its second operand at the odd places of a last dimension.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), block.shape + [4])  # noqa: RUF005 (no star in kernels)


@triton.jit
def random16x8(seed, block, stream=0):
    """16 bits for each of the 8 elements of a block: (..., 8) for blocks (...), as uint32."""
    w = random32x4(seed, block, stream)
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), block.shape + [8])  # noqa: RUF005 (no star in kernels)


@triton.jit
def random16(seed, index, stream=0):
    """16 bits of elements in any order, as uint32; a block is drawn for each of them, where random16x8 draws one."""
    w0, w1, w2, w3 = words(seed, index.to(tl.uint64) // 8, stream)
    word = (index % 8) // 2
    w = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return (w >> ((index % 2) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def random32(seed, index, stream=0):
    """32 bits of elements in any order; a block is drawn for each of them, where random32x4 draws one."""
    w0, w1, w2, w3 = words(seed, index.to(tl.uint64) // 4, stream)
    word = index % 4
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
