// Channels of planes that a block holds in shared memory, so that x, and in the backward dy, are read once.
//
// A block has one channel, from the first read to the last write; blocks that follow it find the multiprocessor as it
// was, so none goes on to another channel, and the loads of one block overlap with the stores of others beside it. A
// thread takes back what it has put, hence no barriers but those of the sums. Rows stay with the streaming kernels: a
// sector of 32 bytes spans several channels there, and groups of so many that all of a batch fits are too few for a
// device, or too short.
#pragma once

#include <optional>

#include "batch_norm.cuh"

namespace fusedtricks::cuda {

// Threads of a block that has a multiprocessor to itself, and of one that does not. In fp64 registers allow no more.
template <class T>
inline constexpr int kResidentThreads = sizeof(T) == 8 ? 256 : 512;
inline constexpr int kSharingThreads = 256;

// Bundles of one tensor in shared memory, as vectors that neighbouring threads have side by side: no bank conflicts.
template <class T>
struct Held {
  static constexpr int kPieces = kBundle / kLanes<T>;
  Vector<T>* vectors;
  int64_t bundles;

  __device__ __forceinline__ Held(const Lines& s, int number)
      : vectors(dynamic_shared<Vector<T>>() + number * kPieces * s.per), bundles(s.per) {}

  __device__ __forceinline__ void put(int64_t at, const Bundle<T>& from) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) vectors[p * bundles + at] = reinterpret_cast<const Vector<T>*>(from.at)[p];
  }
  __device__ __forceinline__ Bundle<T> get(int64_t at) const {
    Bundle<T> to;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) reinterpret_cast<Vector<T>*>(to.at)[p] = vectors[p * bundles + at];
    return to;
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

struct ResidentBlock {
  int threads;
  int64_t shared;
};

// Where a channel is short, one launch is worth more than a device that is filled.
inline constexpr int64_t kShortChannel = 32 << 10;

// The block that holds `tensors` of a channel, and bytes of a mask, if it is to be: it must fit, and the last round of
// blocks must not leave so much of the device idle that moving 2/3 (forward) or 3/5 (backward) of the bytes takes as
// long as moving all of them with all of it.
template <class T>
std::optional<ResidentBlock> resident_block(const Lines& s, int tensors, bool bits, const Device& device) {
  const int64_t bundles = s.runs * s.bundles, bytes = bundles * (tensors * kBundle * int64_t{sizeof(T)} + bits);
  const int64_t room = device.shared_per_block() - kStaticShared;
  const int64_t processors = device.processors(), places = ceil_div(s.C, processors) * processors;
  if (bytes > room || (bytes > kShortChannel && 4 * s.C < 3 * places)) return std::nullopt;
  const int64_t most = 2 * bytes > room ? kResidentThreads<T> : kSharingThreads;
  return ResidentBlock{
      static_cast<int>(std::min({ceil_div(bundles, kWarp) * kWarp, most, int64_t{device.threads_per_block()}})), bytes};
}

// A chunk is all of a channel.
inline Lines whole(Lines s) {
  s.per = s.runs * s.bundles, s.chunks = 1;
  return s;
}

}  // namespace fusedtricks::cuda
