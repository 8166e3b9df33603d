// Work shared among torch's own threads, and the dtype switch of the CPU kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "result.h"
#include "torch_api.h"
#include "vec.h"

#define FT_TEXT_(x) #x
#define FT_TEXT(x) FT_TEXT_(x)
// Enter `op` in the kernel list for the instruction set of this file.
#define FT_CPU_KERNEL(op) FT_KERNEL(op, "cpu:" FT_TEXT(FT_ISA), op)

namespace fusedtricks::FT_ISA {

// Work on items, cut into pieces. Threads seldom run equally fast, and memory serves them least equally of all: each
// takes the pieces of its own share in order, and when they are done, what is left of the others' shares.
class Pieces {
 public:
  struct alignas(64) Share {  // a cache line of its own
    std::atomic<int64_t> taken = 0;
    int64_t first, count;
  };

  Pieces(Share* shares, int64_t threads, int64_t own, int64_t size, int64_t items, bool last_first)
      : shares_(shares), threads_(threads), share_(own), size_(size), items_(items), last_first_(last_first) {}

  // f(begin, end) for piece after piece, until none is left.
  template <class F>
  void each(const F& f) {
    for (int64_t visited = 0; visited < threads_; ++visited) {
      auto& share = shares_[share_];
      for (int64_t i; (i = share.taken.fetch_add(1, std::memory_order_relaxed)) < share.count;) {
        const int64_t begin = place(i) * size_;
        f(begin, std::min(begin + size_, items_));
      }
      if (++share_ == threads_) share_ = 0;
    }
  }

  // During a call of f: with which item the next one will probably begin, or with `last_first` end; -1 if not known.
  int64_t next() const {
    const int64_t i = shares_[share_].taken.load(std::memory_order_relaxed);
    if (i >= shares_[share_].count) return -1;
    return last_first_ ? std::min((place(i) + 1) * size_, items_) - 1 : place(i) * size_;
  }

 private:
  int64_t place(int64_t i) const {
    const auto& share = shares_[share_];
    return share.first + (last_first_ ? share.count - 1 - i : i);
  }

  Share* shares_;
  int64_t threads_, share_, size_, items_;
  bool last_first_;
};

// f(pieces) on each of the threads that `count` items of `cost` elements keep busy: for work that prepares something
// once per thread. A thread is woken for no less than 16 Ki elements. With `last_first` shares are taken from their
// end.
template <class F>
void parallel_pieces(int64_t count, int64_t cost, const F& f, bool last_first = false) {
  constexpr int64_t kGrain = 16384, kPiece = 65536;
  auto items = [&](int64_t elements) { return std::max<int64_t>(elements / std::max<int64_t>(cost, 1), 1); };
  const int64_t grain = items(kGrain);
  const int64_t threads =
      count <= grain ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
  int64_t size = std::min(items(kPiece), std::max<int64_t>((count + threads - 1) / threads, 1));
  if (size > 16) size = (size + 15) / 16 * 16;  // so many rows, or fewer, are worked on together
  const int64_t pieces = (count + size - 1) / size;
  Pieces::Share one;  // small calls allocate nothing
  const std::unique_ptr<Pieces::Share[]> several(threads > 1 ? new Pieces::Share[static_cast<size_t>(threads)]
                                                             : nullptr);
  Pieces::Share* shares = threads > 1 ? several.get() : &one;
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].first = pieces * t / threads;
    shares[t].count = pieces * (t + 1) / threads - shares[t].first;
  }
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Pieces mine(shares, threads, t, size, count, last_first);
      f(mine);
    }
  };
  threads == 1 ? run(0, 1) : torch::stable::parallel_for(0, threads, 1, run);
}

// f(begin, end) for each piece.
template <class F>
void parallel(int64_t count, int64_t cost, const F& f, bool last_first = false) {
  parallel_pieces(count, cost, [&](Pieces& pieces) { pieces.each(f); }, last_first);
}

// f.operator()<T>() with the storage type of a floating dtype.
template <class F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
#if defined(__AVX512F__)
      if (rounds_bf16_in_hardware()) return f.template operator()<bf16_rounded_in_hardware>();
#endif
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<fp16>();
    default:
      check_floating(op, "input", dtype);
  }
}

}  // namespace fusedtricks::FT_ISA
