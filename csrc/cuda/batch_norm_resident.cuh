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

// A bundle of the channel: its number, its run, and its number there. Walk divides for each bundle; but here all of the
// arithmetic has the time of one read, so only the first takes a division, and numbers are of 32 bits, enough for what
// fits on chip.
struct Stride {
  int by, runs, bundles;

  __device__ __forceinline__ Stride(int by, int of_run) : by(by), runs(by / of_run), bundles(by % of_run) {}
};
struct Cursor {
  int at, run, bundle;

  __device__ __forceinline__ Cursor(int at, int of_run) : at(at), run(at / of_run), bundle(at % of_run) {}
  __device__ __forceinline__ void step(const Stride& stride, int of_run) {
    at += stride.by, run += stride.runs, bundle += stride.bundles;
    if (bundle >= of_run) bundle -= of_run, ++run;
  }
};

// The bundles of a channel that fall to a thread, in turn.
//
// Where accesses are of one element (Width = 1), neighbouring lanes take neighbouring elements: with a bundle to each
// lane, as in the streaming kernels, every sector would be written in eight pieces. Of the 32 bundles of a warp, lane l
// has element l % 8 of bundles l / 8, 4 + l / 8, ..., as elements 0, 1, ... of what it takes for a bundle. Planes of
// 7 x 7 would hardly gain from wide accesses with a head and a tail: nearly every warp has some of either. All lanes of
// a warp take turns together.
template <int Width>
struct Turns {
  static constexpr bool kDealt = Width == 1;
  static constexpr int kApart = kWarp / kBundle;
  const Lines& lines;
  int64_t channel;
  int lane, slot, of_run;  // `slot`: where in shared memory, and whose byte of the mask
  Cursor first;            // the bundle of element 0
  Stride stride, apart;    // to the next turn; to the bundle of the next element

  __device__ __forceinline__ Turns(const Lines& s, int64_t channel)
      : lines(s),
        channel(channel),
        lane(threadIdx.x % kWarp),
        slot(threadIdx.x),
        of_run(s.bundles),
        first(kDealt ? slot - lane + lane / kBundle : slot, of_run),
        stride(blockDim.x, of_run),
        apart(kApart, of_run) {}

  __device__ __forceinline__ int all() const { return static_cast<int>(lines.runs) * of_run; }
  __device__ __forceinline__ bool left() const { return (kDealt ? slot - lane : slot) < all(); }
  __device__ __forceinline__ void step() {
    slot += stride.by;
    first.step(stride, of_run);
  }

  // f(i, where it is in the tensor) for i = 0, Width, ... that exist.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    if (!left()) return;
    const int length = static_cast<int>(lines.length);
    auto line = [&](const Cursor& c) { return (c.run * lines.C + channel) * length; };
    if constexpr (kDealt) {
      Cursor c = first;
#pragma unroll
      for (int i = 0; i < kBundle; ++i, c.step(apart, of_run)) {
        const int j = c.bundle * kBundle + lane % kBundle;
        if (c.at < all() && j < length) f(i, line(c) + j);
      }
    } else {
      const int j = first.bundle * kBundle;
#pragma unroll
      for (int i = 0; i < kBundle; i += Width) {
        if (Width == kBundle || j + i < length) f(i, line(first) + j + i);
      }
    }
  }
  // Bit i: is there an element i?
  __device__ __forceinline__ unsigned live() const {
    unsigned bits = 0;
    each([&](int i, int64_t) { bits |= ((1u << Width) - 1) << i; });
    return bits;
  }
  template <class T>
  __device__ __forceinline__ void load(const T* from, Bundle<T>& to) const {
    each([&](int i, int64_t at) { cuda::load<Width, Cache::kStream>(from + at, to.at + i); });
  }
  template <class T, class A>
  __device__ __forceinline__ void store(const A (&from)[kBundle], T* to) const {
    Bundle<T> values;
#pragma unroll
    for (int i = 0; i < kBundle; ++i) values.at[i] = narrow<T>(from[i]);
    each([&](int i, int64_t at) { cuda::store<Width, Cache::kStream>(values.at + i, to + at); });
  }

  // Bits of the elements of a thread, from and to the mask.
  __device__ __forceinline__ unsigned char* byte(unsigned char* mask) const {
    const Cursor own = kDealt ? Cursor(slot, of_run) : first;
    return mask + (own.run * lines.C + channel) * of_run + own.bundle;
  }
  __device__ __forceinline__ unsigned load_bits(const unsigned char* mask) const {
    const unsigned own = slot < all() ? *byte(const_cast<unsigned char*>(mask)) : 0;
    if constexpr (!kDealt) return own;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kBundle; ++i) {
      bits |= (__shfl_sync(kAllLanes, own, i * kApart + lane / kBundle) >> lane % kBundle & 1) << i;
    }
    return bits;
  }
  __device__ __forceinline__ void store_bits(unsigned bits, unsigned char* mask) const {
    unsigned own = bits;
    if constexpr (kDealt) {
#pragma unroll
      for (int i = 0; i < kBundle; ++i) {
        const unsigned all = __ballot_sync(kAllLanes, bits >> i & 1);
        if (lane / kApart == i) own = all >> lane % kApart * kBundle;
      }
    }
    if (slot < all()) *byte(mask) = static_cast<unsigned char>(own);
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

// A chunk is all of a channel; whole warps put what they have of it.
inline Lines whole(Lines s) {
  s.per = ceil_div(s.runs * s.bundles, kWarp) * kWarp, s.chunks = 1;
  return s;
}

struct ResidentBlock {
  int threads;
  int64_t shared;
};

// A channel so short should take less time, even if most of the device is idle, than a second launch: an estimate.
inline constexpr int64_t kShortChannel = 32 << 10;

// The block that holds `tensors` of a channel, and the bytes of its signs, where there is to be one. The channel must
// fit, and not leave the device idle: blocks come in rounds of one for each multiprocessor, and an empty place in the
// last round costs as much as a full one. 3/4 of the places must be taken, because streaming moves 3/2 (forward) and
// 5/3 (backward) of the bytes with all of the device.
template <class T>
std::optional<ResidentBlock> resident_block(const Lines& s, int tensors, bool bits, const Device& device) {
  const int64_t bundles = whole(s).per, bytes = bundles * (tensors * kBundle * int64_t{sizeof(T)} + bits);
  const int64_t room = device.shared_per_block() - kStaticShared;
  const int64_t processors = device.processors(), places = ceil_div(s.C, processors) * processors;
  if (bytes > room || (bytes > kShortChannel && 4 * s.C < 3 * places)) return std::nullopt;
  const int64_t most = 2 * bytes > room ? kResidentThreads<T> : kSharingThreads;
  return ResidentBlock{static_cast<int>(std::min({bundles, most, int64_t{device.threads_per_block()}})), bytes};
}

}  // namespace fusedtricks::cuda
