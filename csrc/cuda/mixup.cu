// mixup_fwd, mixup_fwd_ and mixup_bwd on CUDA devices. Bytes that must move, for n elements of s bytes: 2ns, whatever
// the permutation.
//
// A block has a strip of columns of the whole batch in shared memory: 32 to 512 bytes of each sample. Each sample is
// read once and written once, and all of a strip is read before any of it is written, so y may be x. Batches too large
// for that, of more than 3072 samples, are mixed sample by sample; a partner is then read again, from L2 where that
// holds the same columns of all samples.
#include "mixing.cuh"

namespace fusedtricks::cuda {

inline constexpr int kStripThreads = 512;

__device__ __forceinline__ float widen(uint8_t v) { return v; }

// With T of uint8 images, what is mixed is mapped by channel: column j is of channel (j / inner) % channels.
template <class T, class U>
struct Mixing {
  using A = Acc<U>;
  const T* x;
  U* y;
  const A* lam;
  const int64_t* perm;
  bool one_lam, transposed;
  int64_t N, D;
  const float *scale, *shift;
  int64_t channels, inner;

  // Sample `to` becomes of_own x[own] + of_other x[other].
  struct Pair {
    int64_t to, own, other;
    A of_own, of_other;
  };

  // The j-th of N: that of sample j with its partner i; or, transposed, that of i. A partner outside the batch makes
  // its sample NaN, and has no gradient.
  __device__ __forceinline__ Pair pair(int64_t j) const {
    const int64_t partner = __ldg(perm + j);
    const bool exists = partner >= 0 && partner < N;
    const int64_t i = exists ? partner : j;
    const A rest = A(1) - weight(j);
    if (transposed) return {exists ? i : -1, i, j, weight(i), rest};
    return {j, j, i, exists ? weight(j) : static_cast<A>(nanf("")), rest};
  }

  __device__ __forceinline__ A weight(int64_t i) const { return __ldg(lam + (one_lam ? 0 : i)); }

  template <int Count>
  __device__ __forceinline__ void mix(const T (&own)[Count], const T (&other)[Count], const Pair& pair, int64_t column,
                                      U (&to)[Count]) const {
    A value[Count];
    [[maybe_unused]] int64_t channel = 0, left = 0;
    if constexpr (!std::is_same_v<T, U>) {
      channel = column / inner % channels;
      left = inner - column % inner;
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      value[i] = mixed(static_cast<A>(widen(own[i])), static_cast<A>(widen(other[i])), pair.of_own, pair.of_other);
      if constexpr (!std::is_same_v<T, U>) {
        value[i] = value[i] * __ldg(scale + channel) + __ldg(shift + channel);
        if (--left == 0) channel = channel + 1 == channels ? 0 : channel + 1, left = inner;
      }
    }
    round_to(value, to);
  }
};

// Elements of x that a thread reads at once where it writes `Width` of y.
template <class T, int Width>
inline constexpr int kRead = Width == 1 ? 1 : kLanes<T>;

// Strips of 2^log2 columns.
template <class T, class U, int Width>
__global__ void __launch_bounds__(kStripThreads) mix_columns(const Mixing<T, U> a, int log2) {
  constexpr int R = kRead<T, Width>;
  T* strip = dynamic_shared<T>();
  const int columns = 1 << log2;
  const int64_t first = static_cast<int64_t>(blockIdx.x) << log2, left = a.D - first;
  const int count = left < columns ? static_cast<int>(left) : columns, total = static_cast<int>(a.N) << log2;
  for (int begin = threadIdx.x * R; begin < total; begin += blockDim.x * R * kInFlight) {
    alignas(kVectorBytes) T batch[kInFlight][R];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = begin + k * blockDim.x * R, column = at & (columns - 1);
      if (at < total && column < count) load<R, Cache::kStream>(a.x + (at >> log2) * a.D + first + column, batch[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = begin + k * blockDim.x * R;
      if (at < total)
        reinterpret_cast<typename WordOf<R * sizeof(T)>::type*>(strip)[at / R] =
            *reinterpret_cast<const typename WordOf<R * sizeof(T)>::type*>(batch[k]);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x * Width; at < total; at += blockDim.x * Width) {
    const int column = at & (columns - 1);
    const auto pair = a.pair(at >> log2);
    if (column >= count || pair.to < 0) continue;
    alignas(kVectorBytes) U value[Width];
    const auto& own = reinterpret_cast<const T(&)[Width]>(strip[(pair.own << log2) + column]);
    const auto& other = reinterpret_cast<const T(&)[Width]>(strip[(pair.other << log2) + column]);
    a.mix(own, other, pair, first + column, value);
    store<Width, Cache::kStream>(value, a.y + pair.to * a.D + first + column);
  }
}

template <class T, class U, int Width>
__global__ void __launch_bounds__(kPieceThreads) mix_samples(const Mixing<T, U> a) {
  constexpr int R = kRead<T, Width>;
  const Piece<R> piece(a.N, a.D);
  const auto pair = a.pair(piece.sample);
  if (pair.to < 0) return;
  alignas(kVectorBytes) T own[kInFlight][R], other[kInFlight][R];
  piece.each([&](int k, int64_t column) {
    load<R, Cache::kKeep>(a.x + pair.own * a.D + column, own[k]);
    load<R, Cache::kKeep>(a.x + pair.other * a.D + column, other[k]);
  });
  piece.each([&](int k, int64_t column) {
    alignas(kVectorBytes) U value[R];
    a.mix(own[k], other[k], pair, column, value);
    store<R, Cache::kStream>(value, a.y + pair.to * a.D + column);
  });
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// log2 of the columns of a strip of N samples, if they fit. More than 48 KB would leave too few blocks resident to read
// while others write, so that is taken for sectors of 32 bytes alone.
template <class T>
std::optional<int> strip_columns(const Device& device, int64_t N, int64_t D) {
  constexpr int64_t kSector = 32, kLongest = 512, kShared = 48 << 10, kMostShared = 96 << 10;
  int64_t bytes = kLongest;
  const auto narrower = [&] {
    return bytes * N > kShared || ceil_div(D * int64_t{sizeof(T)}, bytes) < device.processors();
  };
  while (bytes > kSector && narrower()) bytes /= 2;
  if (bytes * N > std::min<int64_t>(kMostShared, device.shared_per_block())) return std::nullopt;
  int log2 = 0;
  while ((int64_t{sizeof(T)} << (log2 + 1)) <= bytes) ++log2;
  return log2;
}

// True if done; in place, batches whose strips do not fit are not.
template <class T, class U>
bool launch(const Device& device, const Mixing<T, U>& a) {
  const auto log2 = strip_columns<T>(device, a.N, a.D);
  if (!log2 && static_cast<const void*>(a.x) == a.y) return false;
  const int64_t D = a.D % kLanes<T> == 0 ? a.D : 1;  // the wider vectors of the two
  with_alignment<kLanes<U>>(D, {a.x, a.y}, [&]<int Width>() {
    if (log2) {
      const int64_t needed = ceil_div(a.N << *log2, kRead<T, Width> * kInFlight * 32) * 32;
      const int threads = static_cast<int>(std::min<int64_t>({needed, device.threads_per_block(), kStripThreads}));
      device.launch(mix_columns<T, U, Width>, ceil_div(a.D, int64_t{1} << *log2), threads,
                    (a.N << *log2) * int64_t{sizeof(T)}, a, *log2);
    } else {
      const Pieces pieces(device, a.N, a.D, kRead<T, Width>);
      device.launch(mix_samples<T, U, Width>, pieces.blocks, pieces.threads, 0, a);
    }
  });
  return true;
}

template <class T, class U>
Mixing<T, U> describe(const Tensor& x, const Tensor& y, const Tensor& lam, const Tensor& perm, bool transposed) {
  Mixing<T, U> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.y = static_cast<U*>(y.mutable_data_ptr());
  a.lam = static_cast<const Acc<U>*>(lam.const_data_ptr());
  a.perm = static_cast<const int64_t*>(perm.const_data_ptr());
  a.one_lam = lam.numel() == 1;
  a.transposed = transposed;
  a.N = x.size(0);
  a.D = x.numel() / a.N;
  return a;
}

// y = mixup(x) of one dtype; they may be the same tensor.
void mix_batch(const char* op, const Tensor& x, const Tensor& y, const Tensor& lam, const Tensor& perm,
               bool transposed) {
  check_floating(op, "x", x.scalar_type());
  check_permutation(op, x, perm);
  check_weights(op, x, lam);
  if (x.numel() == 0) return;
  const Device device(x);
  dispatch(op, x.scalar_type(), [&]<class T>() {
    if (dense_samples(x, y) && launch(device, describe<T, T>(x, y, lam, perm, transposed))) return;
    const Tensor plain = torch::stable::contiguous(x), mixed = empty(x.sizes(), x.scalar_type(), x);
    launch(device, describe<T, T>(plain, mixed, lam, perm, transposed));
    Tensor result = y;
    torch::stable::copy_(result, mixed);
  });
}

void mix_images(const char* op, const Tensor& x, const Tensor& y, const Tensor& lam, const Tensor& perm,
                const MaybeTensor& scale, const MaybeTensor& shift) {
  check_images(op, x, scale, shift);
  check_permutation(op, x, perm);
  check_weights(op, x, lam);
  if (x.numel() == 0) return;
  const Device device(x);
  const bool direct = dense_samples(x, y) && y.scalar_type() != ScalarType::Double;
  const Tensor from = direct ? x : torch::stable::contiguous(x);
  const Tensor to =
      direct ? y : empty(x.sizes(), y.scalar_type() == ScalarType::Double ? ScalarType::Float : y.scalar_type(), x);
  dispatch(op, to.scalar_type(), [&]<class U>() {
    if constexpr (!std::is_same_v<U, double>) {
      auto a = describe<uint8_t, U>(from, to, lam, perm, false);
      a.scale = static_cast<const float*>(scale->const_data_ptr());
      a.shift = static_cast<const float*>(shift->const_data_ptr());
      a.channels = from.size(1);
      a.inner = from.size(1) == 1 ? 1 : from.stride(1);
      launch(device, a);
    }
  });
  Tensor result = y;
  if (!direct) torch::stable::copy_(result, to);
}

Tensor mixup_fwd(const Tensor& x, const Tensor& lam, const Tensor& perm, const MaybeTensor& scale,
                 const MaybeTensor& shift, ScalarType dtype) {
  if (x.scalar_type() == ScalarType::Byte) {
    check_floating("mixup_fwd", "dtype", dtype);
    auto y = fusedtricks::empty_like(x, dtype);
    mix_images("mixup_fwd", x, y, lam, perm, scale, shift);
    return y;
  }
  STD_TORCH_CHECK(!scale && !shift && dtype == x.scalar_type(), "mixup_fwd: scale, shift and dtype are for uint8 x");
  auto y = fusedtricks::empty_like(x);
  mix_batch("mixup_fwd", x, y, lam, perm, false);
  return y;
}

void mixup_fwd_(Tensor x, const Tensor& lam, const Tensor& perm) { mix_batch("mixup_fwd_", x, x, lam, perm, false); }

Tensor mixup_bwd(const Tensor& dy, const Tensor& lam, const Tensor& perm) {
  auto dx = fusedtricks::empty_like(dy);
  mix_batch("mixup_bwd", dy, dx, lam, perm, true);
  return dx;
}

FT_KERNEL(mixup_fwd, "cuda", mixup_fwd);
FT_KERNEL(mixup_fwd_, "cuda", mixup_fwd_);
FT_KERNEL(mixup_bwd, "cuda", mixup_bwd);

}  // namespace fusedtricks::cuda
