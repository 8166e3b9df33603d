"""Philox against the published known answers, and its bits in every language against the reference."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sweep import INTERPRETED
from torch import Tensor

from fusedtricks.ops._philox import philox, random16, random32

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# counter, key, result: the file kat_vectors of Random123, "philox4x32 10".
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
# Seed, first element, stream: beyond 32 bits in each, and ranges that begin inside a block.
STREAMS = ((0, 0, 0), (-3, 5, 1), (2**62 + 7, 8 * (2**32 - 1) + 3, 2**32 - 1))
COUNT = 200


def numbers(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert philox(numbers(counter), numbers(key)) == numbers(result)


def test_elements_do_not_depend_on_the_range() -> None:
    seed = torch.tensor([1234567890123])
    for draw in (random16, random32):
        whole = draw(seed, 100)
        for first in (1, 3, 4, 8, 17):
            assert torch.equal(draw(seed, 50, first), whole[first : first + 50])
    assert random16(seed, 1 << 16).unique().numel() > 40_000
    assert not torch.equal(random32(seed, 64), random32(seed, 64, stream=1))
    assert not torch.equal(random32(seed, 64), random32(seed + 2**32, 64))


def test_bits_are_fair() -> None:
    draws = random16(torch.tensor([7]), 1 << 20)
    ones = torch.stack([draws >> bit & 1 for bit in range(16)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 1024


PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "cpu/philox.h"
using namespace fusedtricks;
// known: counter and key words; stream: seed, first, stream, count.
int main(int argc, char** argv) {
  auto number = [&](int i) { return std::strtoull(argv[i], nullptr, 0); };
  if (argv[1][0] == 'k') {
    uint32_t word[4];
    for (int i = 0; i < 4; ++i) word[i] = static_cast<uint32_t>(number(2 + i));
    philox(word, static_cast<uint32_t>(number(6)), static_cast<uint32_t>(number(7)), MultiplyWords{});
    for (uint32_t w : word) std::printf("%u\n", w);
    return 0;
  }
  const uint64_t seed = number(2), first = number(3);
  const auto stream = static_cast<uint32_t>(number(4));
  const auto count = static_cast<int64_t>(number(5));
  std::vector<uint16_t> room16(FT_ISA::random_room<uint16_t>(count));
  std::vector<uint32_t> room32(FT_ISA::random_room<uint32_t>(count));
  const auto* halves = FT_ISA::random_elements(seed, static_cast<int64_t>(first), count, room16.data(), stream);
  const auto* words = FT_ISA::random_elements(seed, static_cast<int64_t>(first), count, room32.data(), stream);
  for (int64_t i = 0; i < count; ++i) {
    if (halves[i] != random16(seed, first + i, stream) || words[i] != random32(seed, first + i, stream)) return 1;
    std::printf("%u %u\n", halves[i], words[i]);
  }
}
"""
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mfma"],
}


def runs_here(isa: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return isa == "baseline" or isa.upper() in capability or (isa == "avx2" and capability == "AVX512")


@pytest.mark.skipif(INTERPRETED or not shutil.which("g++"), reason="C++ is tested once, and needs g++")
@pytest.mark.parametrize("isa", [isa for isa in INSTRUCTION_SETS if runs_here(isa)])
def test_cpp(isa: str, tmp_path: Path) -> None:
    """The formula of csrc/math for one counter and, in registers of this instruction set, for many."""
    program, source = tmp_path / "philox", tmp_path / "philox.cpp"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", f"-I{CSRC}", f"-DFT_ISA={isa}", *INSTRUCTION_SETS[isa]]
    subprocess.run(["g++", *flags, source, "-o", program], check=True, timeout=120)

    def run(*arguments: object) -> list[list[int]]:
        text = subprocess.check_output([program, *map(str, arguments)], text=True, timeout=60)
        return [[int(n) for n in line.split()] for line in text.splitlines()]

    for counter, key, result in KNOWN:
        words = [f"0x{word}" for word in (*counter.split(), *key.split())]
        assert run("known", *words) == [[int(word, 16)] for word in result.split()]
    for seed, first, stream in STREAMS:
        found = torch.tensor(run("stream", seed % 2**64, first, stream, COUNT))
        assert torch.equal(found[:, 0], random16(torch.tensor([seed]), COUNT, first, stream))
        assert torch.equal(found[:, 1], random32(torch.tensor([seed]), COUNT, first, stream))


if INTERPRETED:
    import triton
    import triton.language as tl

    from fusedtricks.triton_kernels import philox as device

    @triton.jit
    def draw(seed, out, first, stream, BLOCKS: tl.constexpr):
        s = tl.load(seed)
        first = tl.cast(first, tl.int64)
        blocks, elements = tl.arange(0, BLOCKS), tl.arange(0, 8 * BLOCKS)
        eights, fours = tl.arange(0, 8)[None, :], tl.arange(0, 4)[None, :]
        tl.store(out + blocks[:, None] * 8 + eights, device.random16x8(s, first // 8 + blocks, stream).to(tl.int64))
        out += 8 * BLOCKS
        tl.store(out + elements, device.random16(s, first + elements, stream).to(tl.int64))
        out += 8 * BLOCKS
        tl.store(out + elements, device.random32(s, first + elements, stream).to(tl.int64))
        out += 8 * BLOCKS
        tl.store(out + blocks[:, None] * 4 + fours, device.random32x4(s, first // 4 + blocks, stream).to(tl.int64))

    @triton.jit
    def known(words, out):
        at = words + tl.arange(0, 1)
        c0, c1 = tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32)
        c2, c3 = tl.load(at + 2).to(tl.uint32), tl.load(at + 3).to(tl.uint32)
        seed = tl.load(words + 4).to(tl.uint64) | (tl.load(words + 5).to(tl.uint64) << 32)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, n_rounds=10)
        tl.store(out + tl.arange(0, 1), w0.to(tl.int64))
        tl.store(out + 1 + tl.arange(0, 1), w1.to(tl.int64))
        tl.store(out + 2 + tl.arange(0, 1), w2.to(tl.int64))
        tl.store(out + 3 + tl.arange(0, 1), w3.to(tl.int64))


@pytest.mark.skipif(not INTERPRETED, reason="interpreted kernels need TRITON_INTERPRET=1")
def test_triton() -> None:
    for counter, key, result in KNOWN:
        out = torch.empty(4, dtype=torch.int64)
        known[(1,)](torch.cat(numbers(f"{counter} {key}")), out)
        assert torch.equal(out, torch.cat(numbers(result)))
    blocks = 16
    for seed, first, stream in STREAMS:
        first -= first % 8
        out = torch.empty(28 * blocks, dtype=torch.int64)
        draw[(1,)](torch.tensor([seed]), out, first, stream, BLOCKS=blocks)
        halves, alone16, alone32, words = out.split([8 * blocks, 8 * blocks, 8 * blocks, 4 * blocks])
        want16 = random16(torch.tensor([seed]), 8 * blocks, first, stream)
        want32 = random32(torch.tensor([seed]), 8 * blocks, first, stream)
        assert torch.equal(halves, want16)
        assert torch.equal(alone16, want16)
        assert torch.equal(alone32, want32)
        assert torch.equal(words, want32[: 4 * blocks])
