// What mixup and cutmix share on the CPU: the cycles of a permutation, and batches as samples in memory order.
#pragma once

#include <bit>
#include <mutex>
#include <vector>

#include "parallel.h"

namespace fusedtricks::FT_ISA {

// run.operator()<Stream>() for one run of elements at `y`. Short runs are streamed only as whole cache lines.
template <class T, class F>
inline void with_stream(bool stream, const T* y, int64_t count, const F& run) {
  const bool lines = (reinterpret_cast<uintptr_t>(y) | static_cast<uintptr_t>(count) * sizeof(T)) % 64 == 0;
  stream && (lines || count >= kFewestStreamed) ? run.template operator()<true>() : run.template operator()<false>();
}

// Memory that is written from the first byte to the last: whole cache lines past the caches, if they are worth it.
class LineWriter {
 public:
  LineWriter(void* to, bool past_caches) : to_(static_cast<uint8_t*>(to)), past_caches_(past_caches) {}

  void append(const void* source, int64_t bytes) {
    if (bytes <= 0) return;
    const auto* from = static_cast<const uint8_t*>(source);
    if (!past_caches_) {
      std::memcpy(to_, from, static_cast<size_t>(bytes));
      to_ += bytes;
      return;
    }
    auto end = [&](int64_t some) {
      if (some > 0) ends_.store(to_, from, some);
      from += some, to_ += some, bytes -= some;
    };
    end(std::min(static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to_) % 64), bytes));
    for (; bytes >= 64; from += 64, to_ += 64, bytes -= 64) stream_line(to_, from);
    end(bytes);
  }
  // To be called after the last.
  void finish() {
    ends_.flush();
    if (past_caches_) streamed();
  }

 private:
  uint8_t* to_;
  bool past_caches_;
  LineEnds ends_;
};

// perm, one number for each sample of x; raises where it is no permutation. Every thread marks what it meets in bits of
// its own, so few that they stay in its caches, and no cache line is written by two.
inline const int64_t* permutation_of(const char* op, const Tensor& x, const Tensor& perm) {
  check_permutation(op, x, perm);
  const int64_t N = perm.size(0);
  const auto* p = static_cast<const int64_t*>(perm.const_data_ptr());
  std::vector<uint64_t> seen;
  std::mutex merging;
  bool inside = true;
  parallel_pieces(N, 1, [&](Pieces& pieces) {
    std::vector<uint64_t> mine(static_cast<size_t>(N + 63) / 64);
    bool fine = true;
    pieces.each([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto j = static_cast<uint64_t>(p[i]);
        fine = fine && j < static_cast<uint64_t>(N);
        if (fine) mine[j / 64] |= uint64_t{1} << j % 64;
      }
    });
    const std::lock_guard lock(merging);
    inside = inside && fine;
    if (seen.empty()) return seen.swap(mine);
    for (size_t word = 0; word < seen.size(); ++word) seen[word] |= mine[word];
  });
  int64_t distinct = 0;
  for (const uint64_t word : seen) distinct += std::popcount(word);
  STD_TORCH_CHECK(inside && distinct == N, op, ": perm is not a permutation of 0 to ", N - 1);
  return p;
}

inline std::vector<int64_t> inverse_of(const int64_t* permutation, int64_t N) {
  std::vector<int64_t> inverse(static_cast<size_t>(N));
  for (int64_t i = 0; i < N; ++i) inverse[static_cast<size_t>(permutation[i])] = i;
  return inverse;
}

// The samples in the order in which the cycles of a permutation pass them, so that the partner of one is the next, and
// of the last of a cycle the first. A sample is then in the cache when it is needed again, and mixing in place needs a
// copy of the first of a cycle alone.
struct Cycles {
  std::vector<int64_t> order;
  std::vector<int64_t> start;  // in `order`; one more than there are cycles

  Cycles(const int64_t* permutation, int64_t N) {
    std::vector<bool> passed(static_cast<size_t>(N), false);
    order.reserve(static_cast<size_t>(N));
    for (int64_t first = 0; first < N; ++first) {
      if (passed[static_cast<size_t>(first)]) continue;
      start.push_back(static_cast<int64_t>(order.size()));
      for (int64_t i = first; !passed[static_cast<size_t>(i)]; i = permutation[i]) {
        passed[static_cast<size_t>(i)] = true;
        order.push_back(i);
      }
    }
    start.push_back(N);
  }
};

// Two batches of one shape: runs of unit stride inside a sample, at the same places of every sample.
struct Samples {
  Rows<2> rows;  // the runs of a sample, in y and x
  int64_t count, run = 1, y_stride, x_stride;
  bool unit = true;

  Samples(const Tensor& y, const Tensor& x) : count(x.size(0)), y_stride(y.stride(0)), x_stride(x.stride(0)) {
    rows = collapse_rows<2>(x.dim() - 1, x.sizes().data() + 1, {y.strides().data() + 1, x.strides().data() + 1});
    if (rows.levels == 0) return;
    const int last = --rows.levels;
    run = rows.size[last];
    rows.count /= run;
    unit = rows.stride[0][last] == 1 && rows.stride[1][last] == 1;
  }
};

}  // namespace fusedtricks::FT_ISA
