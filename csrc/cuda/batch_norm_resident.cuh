// Channels of planes that a block holds in shared memory, so that x, and in the backward dy, are read once.
//
// A block has one channel, from the first load to the last store. None goes on to another: nothing could be carried
// over, and the loads of one block overlap with the stores of others that share the multiprocessor. A thread takes back
// what it has put there itself, hence no barriers but those of the sums. Rows stay with the streaming kernels: a sector
// of 32 bytes spans 8 channels and more, so that only batches of a few thousand rows fit, and those L2 mostly holds.
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
  int bundles;

  __device__ __forceinline__ Held(const Lines& s, int number)
      : vectors(dynamic_shared<Vector<T>>() + number * kPieces * s.per), bundles(s.per) {}

  __device__ __forceinline__ void put(int at, const Bundle<T>& from) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) vectors[p * bundles + at] = reinterpret_cast<const Vector<T>*>(from.at)[p];
  }
  __device__ __forceinline__ Bundle<T> get(int at) const {
    Bundle<T> to;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) reinterpret_cast<Vector<T>*>(to.at)[p] = vectors[p * bundles + at];
    return to;
  }
};

// The bundles of a channel that fall to a thread, in turn. Walk divides for each of them; but here all of the
// arithmetic has the time of one read, so only the first takes a division, and numbers are of 32 bits, enough for what
// fits on chip.
template <int Width>
struct Turns {
  const Lines& lines;
  int64_t channel;
  int at, end, run, bundle;             // of the channel, the first behind it, the run, of the run
  int length, bundles, further, ahead;  // of a run; what a step adds to `run` and `bundle`

  __device__ __forceinline__ Turns(const Lines& s, int64_t channel)
      : lines(s), channel(channel), at(threadIdx.x), end(s.per), length(s.length), bundles(s.bundles) {
    const int threads = blockDim.x;
    run = at / bundles, bundle = at - run * bundles;
    further = threads / bundles, ahead = threads - further * bundles;
  }
  __device__ __forceinline__ bool left() const { return at < end; }
  __device__ __forceinline__ void step() {
    at += blockDim.x, run += further, bundle += ahead;
    if (bundle >= bundles) bundle -= bundles, ++run;
  }
  // Accesses as wide as a bundle leave no part of one.
  __device__ __forceinline__ int count() const {
    return !left() ? 0 : Width == kBundle ? kBundle : min(kBundle, length - bundle * kBundle);
  }
  __device__ __forceinline__ Place place() const {
    const int64_t line = run * lines.C + channel;
    return {line * lines.length + bundle * kBundle, line * lines.bundles + bundle, count()};
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

struct ResidentBlock {
  int threads;
  int64_t shared;
};

// A channel so short takes less time, even if most of the device is idle, than a second launch.
inline constexpr int64_t kShortChannel = 32 << 10;

// The block that holds `tensors` of a channel, and the bytes of its signs, where there is to be one. The channel must
// fit, and not leave the device idle: blocks come in rounds of one for each multiprocessor, and an empty place in the
// last round costs as much as a full one. 3/4 of the places must be taken, because streaming moves 3/2 (forward) and
// 5/3 (backward) of the bytes with all of the device.
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
