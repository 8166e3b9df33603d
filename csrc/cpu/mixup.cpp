// mixup on the CPU: each sample is read once and written once. Bytes that must move, for n elements of s bytes: 2ns.
#include "math/mixup.h"

#include "mixing.h"

namespace fusedtricks::FT_ISA {

// Elements of a sample dealt with at once: of three samples they fit the first-level cache.
inline constexpr int64_t kMostColumns = 1024;
// Samples up to here are mixed in the order of memory; in place if they are very short and this many, from a copy.
inline constexpr int64_t kShortBytes = 512, kCopiedBytes = 256, kFewestCopied = 1 << 16;
// Samples at most between the one that is mixed and the one that is fetched.
inline constexpr int64_t kFetched = 16;

template <class T>
struct Of {
  using A = Acc<T>;
  inline static __attribute__((always_inline)) auto read(const T* p, auto lanes) { return load(p, lanes); }
};

// Sixteen (or fewer) pixels as floats.
inline __attribute__((always_inline)) Vec<float> load_pixels(const uint8_t* p, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<float>)));
  Bytes bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(count));
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, Vec<int32_t>), Vec<float>);
#endif
}
template <>
struct Of<uint8_t> {
  using A = float;
  inline static __attribute__((always_inline)) Vec<float> read(const uint8_t* p, Full) {
    return load_pixels(p, kLanes<float>);
  }
  inline static __attribute__((always_inline)) Vec<float> read(const uint8_t* p, Tail t) { return load_pixels(p, t.n); }
};

// y = affine(of_own x + of_partner partner) of `count` elements. y may be x.
// `next` is read next: it travels meanwhile.
template <bool Affine, bool Stream, class T, class U, class A = typename Of<T>::A>
inline void mix_elements(const T* own, const T* partner, U* y, int64_t count, A of_own, A of_partner, const A* scale,
                         const A* shift, const T* next) {
  sweep_stored<Stream, 4>(y, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
    Vec<A> v = mixed(Vec<A>(Of<T>::read(own + j, lanes)), Vec<A>(Of<T>::read(partner + j, lanes)), of_own, of_partner);
    if constexpr (Affine) v = v * load(scale + j, lanes) + load(shift + j, lanes);
    __builtin_prefetch(next + j);
    store_or_stream<Stream>(y + j, v, lanes);
  });
}

template <bool Affine, class T, class U, class A = typename Of<T>::A>
inline void mix(const T* own, const T* partner, U* y, int64_t count, A of_own, A of_partner, const A* scale,
                const A* shift, const T* next, bool stream) {
  with_stream(stream, y, count, [&]<bool Stream>() {
    mix_elements<Affine, Stream>(own, partner, y, count, of_own, of_partner, scale, shift, next);
  });
}

// The affine map of each column of a sample in memory order: column j is of channel (j / inner) % channels.
struct Channels {
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t count = 1, inner = 1;

  void spread(int64_t first, int64_t columns, float* scales, float* shifts) const {
    int64_t c = first / inner % count, left = inner - first % inner;
    for (int64_t j = 0; j < columns; ++j) {
      scales[j] = scale[c], shifts[j] = shift[c];
      if (--left == 0) c = c + 1 == count ? 0 : c + 1, left = inner;
    }
  }
};

template <class T>
bool shorter(const Samples& s, int64_t bytes) {
  return s.unit && s.rows.count == 1 && s.run * int64_t{sizeof(T)} <= bytes;
}

// Of position k in the order of cycles: y[i] = lam[i] x[i] + (1 - lam[i]) x[j] with i the sample there and j the next;
// or, Transposed, y[j] = lam[j] x[j] + (1 - lam[i]) x[i].
template <bool Transposed, bool Affine, class T, class U, class A = typename Of<T>::A>
void mix_samples(const Samples& s, const Cycles& cycles, const T* x, U* y, const A* lam, bool one_lam, bool in_place,
                 const Channels& channels) {
  const int64_t columns = std::min(s.run, kMostColumns), chunks = (s.run + columns - 1) / columns;
  const int64_t of_sample = s.rows.count * chunks;
  const bool stream = !in_place && worth_streaming(s.count * s.rows.count * s.run * int64_t{sizeof(T) + sizeof(U)});
  auto weight = [&](int64_t i) { return lam[one_lam ? 0 : i]; };

  // Positions [begin, end) of cycle c, of columns that start at `from` and `to` in a sample.
  auto walk = [&](size_t c, int64_t begin, int64_t end, const T* from, U* to, int64_t count, const A* scale,
                  const A* shift) {
    T saved[kMostColumns];
    const int64_t first = cycles.order[static_cast<size_t>(cycles.start[c])];
    const int64_t ahead = std::clamp<int64_t>(kFetched * 16 / count, 2, kFetched);
    if (in_place) std::memcpy(saved, from + first * s.x_stride, static_cast<size_t>(count) * sizeof(T));
    for (int64_t k = begin; k < end; ++k) {
      const bool last = k + 1 == cycles.start[c + 1];
      const int64_t i = cycles.order[static_cast<size_t>(k)],
                    j = last ? first : cycles.order[static_cast<size_t>(k) + 1];
      const T* at_i = from + i * s.x_stride;
      const T* at_j = in_place && last ? saved : from + j * s.x_stride;
      const int64_t after = k + ahead < end ? cycles.order[static_cast<size_t>(k + ahead)] : j;
      const T* next = from + after * s.x_stride;
      const A rest = A(1) - weight(i);
      if constexpr (Transposed) {
        mix<Affine>(at_j, at_i, to + j * s.y_stride, count, weight(j), rest, scale, shift, next, stream);
      } else {
        mix<Affine>(at_i, at_j, to + i * s.y_stride, count, weight(i), rest, scale, shift, next, stream);
      }
    }
  };
  // In place a cycle is walked by one thread, so threads share the columns; else they share samples as well.
  const int64_t parts = in_place ? 1 : s.count;
  parallel(of_sample * parts, columns * (s.count / parts), [&](int64_t begin, int64_t end) {
    A scale[Affine ? kMostColumns : 1] = {}, shift[Affine ? kMostColumns : 1] = {};
    for (int64_t item = begin; item < end;) {
      const int64_t strip = item / parts, chunk = strip % chunks, first = chunk * columns;
      const int64_t count = std::min(s.run - first, columns);
      const Rows<2>::Walk at(s.rows, strip / chunks);
      if constexpr (Affine) channels.spread(first, count, scale, shift);
      const int64_t k0 = in_place ? 0 : item % parts, k1 = in_place ? s.count : std::min(parts, k0 + end - item);
      size_t c =
          static_cast<size_t>(std::upper_bound(cycles.start.begin(), cycles.start.end(), k0) - cycles.start.begin()) -
          1;
      for (int64_t k = k0; k < k1; ++c) {
        const int64_t stop = std::min(k1, cycles.start[c + 1]);
        walk(c, k, stop, x + at.offset[1] + first, y + at.offset[0] + first, count, scale, shift);
        k = stop;
      }
      item += in_place ? 1 : k1 - k0;
    }
    if (stream) streamed();
  });
}

// The same out of place, sample after sample in the order of memory: for samples so short that to pass them in the
// order of the cycles would mean to wait for each. What is read out of order is then the partner alone.
template <bool Transposed, class T, class A = Acc<T>>
void mix_short_samples(const Samples& s, const int64_t* partner, const T* x, T* y, const A* lam, bool one_lam) {
  constexpr int64_t kLine = 64 / int64_t{sizeof(T)};
  auto weight = [&](int64_t i) { return lam[one_lam ? 0 : i]; };
  parallel(s.count, s.run, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = partner[i];
      const T* next = x + partner[std::min(i + kFetched, end - 1)] * s.x_stride;
      for (int64_t at = 0; at < s.run; at += kLine) __builtin_prefetch(next + at);
      __builtin_prefetch(next + s.run - 1);  // a sample begins anywhere in a cache line
      mix_elements<false, false>(x + i * s.x_stride, x + j * s.x_stride, y + i * s.y_stride, s.run, weight(i),
                                 A(1) - weight(Transposed ? j : i), static_cast<const A*>(nullptr),
                                 static_cast<const A*>(nullptr), next);
    }
  });
}

// lam as values of the arithmetic; raises where one is outside [0, 1].
template <class A>
const A* weights_of(const char* op, const Tensor& x, const Tensor& lam) {
  check_weights(op, x, lam);
  const auto* values = static_cast<const A*>(lam.const_data_ptr());
  const auto fine = [](A value) { return (value >= 0) & (value <= 1); };
  const int64_t count = lam.numel();
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong += !fine(values[i]);
  for (int64_t i = 0; wrong > 0 && i < count; ++i) {
    STD_TORCH_CHECK(fine(values[i]), op, ": expected lam in [0, 1], but got ", values[i]);
  }
  return values;
}

// y = mixup(x) of one dtype; they may be the same tensor.
template <bool Transposed>
void mix_batch(const char* op, const Tensor& x, const Tensor& y, const Tensor& lam, const Tensor& perm) {
  check_floating(op, "x", x.scalar_type());
  const auto* partner = permutation_of(op, x, perm);
  dispatch(op, x.scalar_type(), [&]<class T>() {
    const auto* weights = weights_of<Acc<T>>(op, x, lam);
    if (x.numel() == 0) return;
    auto run = [&](const Tensor& from, const Tensor& to) {
      const Samples samples(to, from);
      const bool in_place = from.const_data_ptr() == to.const_data_ptr();
      if (!in_place && shorter<T>(samples, kShortBytes)) {
        std::vector<int64_t> inverse;
        if constexpr (Transposed) inverse = inverse_of(partner, samples.count);
        mix_short_samples<Transposed>(samples, Transposed ? inverse.data() : partner,
                                      static_cast<const T*>(from.const_data_ptr()),
                                      static_cast<T*>(to.mutable_data_ptr()), weights, lam.numel() == 1);
        return true;
      }
      if (!samples.unit) return false;
      const Cycles cycles(partner, samples.count);
      mix_samples<Transposed, false>(samples, cycles, static_cast<const T*>(from.const_data_ptr()),
                                     static_cast<T*>(to.mutable_data_ptr()), weights, lam.numel() == 1, in_place,
                                     Channels{});
      return true;
    };
    const bool copied = x.const_data_ptr() == y.const_data_ptr() && x.size(0) >= kFewestCopied &&
                        shorter<T>(Samples(x, x), kCopiedBytes);
    if (run(copied ? torch::stable::clone(x) : x, y)) return;
    const Tensor plain = torch::stable::contiguous(x), mixed = empty(x.sizes(), x.scalar_type(), x);
    run(plain, mixed);
    Tensor result = y;
    torch::stable::copy_(result, mixed);
  });
}

// Images of dense samples: pixels become floats, are mixed and mapped.
void mix_images(const char* op, const Tensor& x, const Tensor& y, const Tensor& lam, const Tensor& perm,
                const MaybeTensor& scale, const MaybeTensor& shift) {
  check_images(op, x, scale, shift);
  const Cycles cycles(permutation_of(op, x, perm), x.size(0));
  const auto* weights = weights_of<float>(op, x, lam);
  if (x.numel() == 0) return;
  const auto run = [&](const Tensor& from, const Tensor& to) {
    const Samples samples(to, from);
    if (!samples.unit || samples.rows.count != 1) return false;
    const Channels channels{static_cast<const float*>(scale->const_data_ptr()),
                            static_cast<const float*>(shift->const_data_ptr()), x.size(1),
                            std::max<int64_t>(x.size(1) == 1 ? 1 : from.stride(1), 1)};
    auto into = [&]<class U>() {
      mix_samples<false, true>(samples, cycles, static_cast<const uint8_t*>(from.const_data_ptr()),
                               static_cast<U*>(to.mutable_data_ptr()), weights, lam.numel() == 1, false, channels);
    };
    dispatch(op, to.scalar_type(), [&]<class U>() {
      if constexpr (std::is_same_v<Acc<U>, float>) into.template operator()<U>();
    });
    return true;
  };
  if (y.scalar_type() != ScalarType::Double && run(x, y)) return;
  const Tensor plain = torch::stable::contiguous(x);
  const Tensor mixed = empty(x.sizes(), y.scalar_type() == ScalarType::Double ? ScalarType::Float : y.scalar_type(), x);
  run(plain, mixed);
  Tensor result = y;
  torch::stable::copy_(result, mixed);
}

Tensor mixup_fwd(const Tensor& x, const Tensor& lam, const Tensor& perm, const MaybeTensor& scale,
                 const MaybeTensor& shift, ScalarType dtype) {
  if (x.scalar_type() == ScalarType::Byte) {
    check_floating("mixup_fwd", "dtype", dtype);
    auto y = result_like(x, dtype);
    mix_images("mixup_fwd", x, y, lam, perm, scale, shift);
    return y;
  }
  STD_TORCH_CHECK(!scale && !shift && dtype == x.scalar_type(), "mixup_fwd: scale, shift and dtype are for uint8 x");
  auto y = result_like(x);
  mix_batch<false>("mixup_fwd", x, y, lam, perm);
  return y;
}

void mixup_fwd_(Tensor x, const Tensor& lam, const Tensor& perm) { mix_batch<false>("mixup_fwd_", x, x, lam, perm); }

Tensor mixup_bwd(const Tensor& dy, const Tensor& lam, const Tensor& perm) {
  auto dx = result_like(dy);
  mix_batch<true>("mixup_bwd", dy, dx, lam, perm);
  return dx;
}

FT_CPU_KERNEL(mixup_fwd);
FT_CPU_KERNEL(mixup_fwd_);
FT_CPU_KERNEL(mixup_bwd);

}  // namespace fusedtricks::FT_ISA
