// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3) and the
// stream of random bits that every back end draws from it: fusedtricks/ops/_philox.py says which element gets which.
#pragma once

#include <cstdint>

#include "hd.h"

namespace fusedtricks {

// Ten rounds in place. W holds one or several counters a word; multiply(a, m) gives the .hi and .lo words of a * m.
template <class W, class Multiply>
FT_HD void philox(W (&counter)[4], uint32_t key0, uint32_t key1, const Multiply& multiply) {
  for (int round = 0; round < 10; ++round) {
    const auto a = multiply(counter[0], 0xD2511F53u), b = multiply(counter[2], 0xCD9E8D57u);
    counter[0] = b.hi ^ counter[1] ^ key0;
    counter[1] = b.lo;
    counter[2] = a.hi ^ counter[3] ^ key1;
    counter[3] = a.lo;
    key0 += 0x9E3779B9u;  // golden ratio
    key1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
}

struct MultiplyWords {
  struct Product {
    uint32_t hi, lo;
  };
  FT_HD Product operator()(uint32_t a, uint32_t b) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }
};

// 128 random bits: eight elements of 16 bits or four of 32, least significant bits of word 0 first.
struct RandomBlock {
  uint32_t word[4];

  FT_HD RandomBlock(uint64_t seed, uint64_t block, uint32_t stream = 0)
      : word{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0} {
    philox(word, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), MultiplyWords{});
  }

  // Chosen, not indexed: an index that is not known would put the words into local memory on a GPU.
  FT_HD uint32_t at(int i) const {
    const uint32_t low = i & 1 ? word[1] : word[0], high = i & 1 ? word[3] : word[2];
    return i & 2 ? high : low;
  }
  FT_HD uint32_t half(int i) const { return (at(i / 2) >> (16 * (i % 2))) & 0xffffu; }
};

// The random bits of one element. Neighbours share a block: loops over many elements draw it once.
FT_HD uint32_t random16(uint64_t seed, uint64_t index, uint32_t stream = 0) {
  return RandomBlock(seed, index / 8, stream).half(static_cast<int>(index % 8));
}
FT_HD uint32_t random32(uint64_t seed, uint64_t index, uint32_t stream = 0) {
  return RandomBlock(seed, index / 4, stream).at(static_cast<int>(index % 4));
}

}  // namespace fusedtricks
