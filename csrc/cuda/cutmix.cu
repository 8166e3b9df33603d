// cutmix_fwd and cutmix_bwd on CUDA devices. Each element is needed in one place alone, forward and backward, so
// nothing but the vectors that an edge of a box cuts is read twice. Bytes that must move, for n elements of s bytes:
// 2ns.
#include "mixing.cuh"

namespace fusedtricks::cuda {

struct Cut {
  const int64_t *perm, *box;
  bool one_box;
  int64_t N, D, H, line, pixel;

  // Bit i tells whether element `column` + i of a sample is inside its box.
  template <int Width>
  __device__ __forceinline__ unsigned inside(int64_t sample, int64_t column) const {
    const int64_t* edges = box + (one_box ? 0 : 4 * sample);
    const int64_t top = __ldg(edges), bottom = __ldg(edges + 1);
    const int64_t left = __ldg(edges + 2) * pixel, right = __ldg(edges + 3) * pixel;
    int64_t h = column / line % H, place = column % line;
    unsigned bits = 0;
    for (int first = 0; first < Width;) {  // once for each line that the vector touches
      const int64_t most = line - place < Width - first ? line - place : Width - first;
      const int count = static_cast<int>(most);
      const int from = static_cast<int>(min(max(left - place, int64_t{0}), most));
      const int to = static_cast<int>(min(max(right - place, int64_t{0}), most));
      if (h >= top && h < bottom && from < to) bits |= ((1u << to) - (1u << from)) << first;
      first += count;
      place = 0;
      h = h + 1 == H ? 0 : h + 1;
    }
    return bits;
  }
};

template <int Width>
inline constexpr unsigned kWhole = (1u << Width) - 1;

// T is any type of the element's size: elements are only moved.
template <class T, int Width>
__global__ void __launch_bounds__(kPieceThreads) cut(const T* x, T* y, const Cut a) {
  const Piece<Width> piece(a.N, a.D);
  const int64_t partner = __ldg(a.perm + piece.sample);
  const bool exists = partner >= 0 && partner < a.N;
  const T *own = x + piece.sample * a.D, *other = x + (exists ? partner : piece.sample) * a.D;
  alignas(kVectorBytes) T value[kInFlight][Width];
  piece.each([&](int k, int64_t column) {
    const unsigned inside = a.inside<Width>(piece.sample, column);
    load<Width, Cache::kStream>((inside == kWhole<Width> ? other : own) + column, value[k]);
    if (inside != 0 && inside != kWhole<Width>) {
      alignas(kVectorBytes) T theirs[Width];
      load<Width, Cache::kStream>(other + column, theirs);
#pragma unroll
      for (int i = 0; i < Width; ++i) value[k][i] = inside >> i & 1 ? theirs[i] : value[k][i];
    }
  });
  piece.each([&](int k, int64_t column) {
    if (!exists) memset(value[k], 0xff, sizeof value[k]);  // NaN in every floating dtype
    store<Width, Cache::kStream>(value[k], y + piece.sample * a.D + column);
  });
}

// By the sample whose box was pasted, j: its partner i gets what was left of it, and what of it is in j.
template <class T, int Width, class A = Acc<T>>
__global__ void __launch_bounds__(kPieceThreads) paste(const T* dy, T* dx, const Cut a) {
  const Piece<Width> piece(a.N, a.D);
  const int64_t i = __ldg(a.perm + piece.sample);
  if (i < 0 || i >= a.N) return;
  const T *own = dy + i * a.D, *other = dy + piece.sample * a.D;
  alignas(kVectorBytes) T left[kInFlight][Width] = {}, pasted[kInFlight][Width] = {};
  unsigned cut[kInFlight], kept[kInFlight];
  piece.each([&](int k, int64_t column) {
    cut[k] = a.inside<Width>(i, column);
    kept[k] = a.inside<Width>(piece.sample, column);
    if (cut[k] != kWhole<Width>) load<Width, Cache::kStream>(own + column, left[k]);
    if (kept[k] != 0) load<Width, Cache::kStream>(other + column, pasted[k]);
  });
  piece.each([&](int k, int64_t column) {
    A value[Width];
#pragma unroll
    for (int n = 0; n < Width; ++n) {
      value[n] = (cut[k] >> n & 1 ? A(0) : widen(left[k][n])) + (kept[k] >> n & 1 ? widen(pasted[k][n]) : A(0));
    }
    round_to(value, left[k]);
    store<Width, Cache::kStream>(left[k], dx + i * a.D + column);
  });
}

Cut describe(const Tensor& x, const Tensor& perm, const Tensor& box) {
  const Images images(x);
  return {static_cast<const int64_t*>(perm.const_data_ptr()),
          static_cast<const int64_t*>(box.const_data_ptr()),
          box.size(0) == 1,
          images.N,
          images.sample(),
          images.H,
          images.line(),
          images.pixel};
}

// f.operator()<T>() with a type of the element's size.
template <class F>
void dispatch_size(const char* op, const Tensor& x, const F& f) {
  switch (x.element_size()) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<bf16>();
    case 4:
      return f.template operator()<float>();
    case 8:
      return f.template operator()<double>();
    default:
      STD_TORCH_CHECK(false, op, ": unsupported dtype ", torch::headeronly::toString(x.scalar_type()));
  }
}

Tensor cutmix_fwd(const Tensor& x, const Tensor& perm, const Tensor& box) {
  check_permutation("cutmix_fwd", x, perm);
  check_boxes("cutmix_fwd", x, box);
  return on_images(x, [&](const Tensor& from, const Tensor& to) {
    const Device device(from);
    const Cut a = describe(from, perm, box);
    dispatch_size("cutmix_fwd", from, [&]<class T>() {
      const auto* source = static_cast<const T*>(from.const_data_ptr());
      auto* target = static_cast<T*>(to.mutable_data_ptr());
      with_alignment<kLanes<T>>(a.D, {source, target}, [&]<int Width>() {
        const Pieces pieces(device, a.N, a.D, Width);
        device.launch(cut<T, Width>, pieces.blocks, pieces.threads, 0, source, target, a);
      });
    });
  });
}

Tensor cutmix_bwd(const Tensor& dy, const Tensor& perm, const Tensor& box) {
  check_permutation("cutmix_bwd", dy, perm);
  check_boxes("cutmix_bwd", dy, box);
  check_floating("cutmix_bwd", "dy", dy.scalar_type());
  return on_images(dy, [&](const Tensor& from, const Tensor& to) {
    const Device device(from);
    const Cut a = describe(from, perm, box);
    dispatch("cutmix_bwd", from.scalar_type(), [&]<class T>() {
      const auto* source = static_cast<const T*>(from.const_data_ptr());
      auto* target = static_cast<T*>(to.mutable_data_ptr());
      with_alignment<kLanes<T>>(a.D, {source, target}, [&]<int Width>() {
        const Pieces pieces(device, a.N, a.D, Width);
        device.launch(paste<T, Width>, pieces.blocks, pieces.threads, 0, source, target, a);
      });
    });
  });
}

FT_KERNEL(cutmix_fwd, "cuda", cutmix_fwd);
FT_KERNEL(cutmix_bwd, "cuda", cutmix_bwd);

}  // namespace fusedtricks::cuda
