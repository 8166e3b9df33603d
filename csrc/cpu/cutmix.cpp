// cutmix on the CPU. Bytes that must move, for n elements of s bytes: 2ns each way.
#include <cstring>

#include "mixing.h"

namespace fusedtricks::FT_ISA {

struct Box {
  int64_t top, bottom, left, right;

  Box(const int64_t* edges, const Images& images)
      : top(std::clamp<int64_t>(edges[0], 0, images.H)),
        bottom(std::clamp<int64_t>(edges[1], top, images.H)),
        left(std::clamp<int64_t>(edges[2], 0, images.W)),
        right(std::clamp<int64_t>(edges[3], left, images.W)) {}
};

// f.operator()<T>() with an unsigned integer of the element's size: elements are only moved.
template <class F>
void dispatch_size(const char* op, const Tensor& x, const F& f) {
  switch (x.element_size()) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    case 8:
      return f.template operator()<uint64_t>();
    default:
      STD_TORCH_CHECK(false, op, ": unsupported dtype ", torch::headeronly::toString(x.scalar_type()));
  }
}

template <class T>
inline void copy(const T* from, int64_t count, T* to) {
  if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

Tensor cutmix_fwd(const Tensor& x, const Tensor& perm, const Tensor& box) {
  const auto* partner = permutation_of("cutmix_fwd", x, perm);
  check_boxes("cutmix_fwd", x, box);
  return on_images(x, [&](const Tensor& from, const Tensor& to) {
    const Images images(from);
    const auto* edges = static_cast<const int64_t*>(box.const_data_ptr());
    dispatch_size("cutmix_fwd", x, [&]<class T>() {
      const T* source = static_cast<const T*>(from.const_data_ptr());
      T* target = static_cast<T*>(to.mutable_data_ptr());
      const bool stream = worth_streaming(2 * x.numel() * int64_t{sizeof(T)});
      parallel(images.N * images.planes, images.plane(), [&](int64_t begin, int64_t end) {
        LineWriter y(target + begin * images.plane(), stream);
        auto put = [&](const T* p, int64_t count) { y.append(p, count * int64_t{sizeof(T)}); };
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / images.planes, offset = item % images.planes * images.plane();
          const Box b(edges + (box.size(0) == 1 ? 0 : 4 * i), images);
          const T* own = source + i * images.sample() + offset;
          const T* other = source + partner[i] * images.sample() + offset;
          const int64_t line = images.line(), left = b.left * images.pixel, right = b.right * images.pixel;
          put(own, b.top * line);
          for (int64_t h = b.top; h < b.bottom; ++h) {
            put(own + h * line, left);
            put(other + h * line + left, right - left);
            put(own + h * line + right, line - right);
          }
          put(own + b.bottom * line, (images.H - b.bottom) * line);
        }
        y.finish();
      });
    });
  });
}

inline constexpr int64_t kLongest = 4096;  // elements of a line of an image that is put together before it is stored

Tensor cutmix_bwd(const Tensor& dy, const Tensor& perm, const Tensor& box) {
  const auto back = inverse_of(permutation_of("cutmix_bwd", dy, perm), dy.size(0));
  check_boxes("cutmix_bwd", dy, box);
  check_floating("cutmix_bwd", "dy", dy.scalar_type());
  return on_images(dy, [&](const Tensor& from, const Tensor& to) {
    const Images images(from);
    const auto* edges = static_cast<const int64_t*>(box.const_data_ptr());
    dispatch("cutmix_bwd", dy.scalar_type(), [&]<class T>() {
      using A = Acc<T>;
      const T* source = static_cast<const T*>(from.const_data_ptr());
      T* target = static_cast<T*>(to.mutable_data_ptr());
      const int64_t line = images.line();
      const bool stream =
          line * int64_t{sizeof(T)} >= 128 && line <= kLongest && worth_streaming(2 * dy.numel() * int64_t{sizeof(T)});
      parallel(images.N * images.planes, images.plane(), [&](int64_t begin, int64_t end) {
        T row[kLongest];  // of dx, where it is streamed
        LineWriter out(target + begin * images.plane(), stream);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / images.planes, offset = item % images.planes * images.plane();
          const int64_t j = back[static_cast<size_t>(i)];
          const Box mine(edges + (box.size(0) == 1 ? 0 : 4 * i), images);
          const Box theirs(edges + (box.size(0) == 1 ? 0 : 4 * j), images);
          for (int64_t h = 0; h < images.H; ++h) {
            const T* own = source + i * images.sample() + offset + h * line;
            const T* other = source + j * images.sample() + offset + h * line;
            T* dx = stream ? row : target + i * images.sample() + offset + h * line;
            const bool cut = h >= mine.top && h < mine.bottom, pasted = h >= theirs.top && h < theirs.bottom;
            const int64_t left = cut ? mine.left * images.pixel : line, right = cut ? mine.right * images.pixel : line;
            copy(own, left, dx);
            std::fill(dx + left, dx + right, T{});
            copy(own + right, line - right, dx + right);
            const int64_t first = theirs.left * images.pixel, count = pasted ? theirs.right * images.pixel - first : 0;
            sweep<A>(0, count, [&](int64_t k, auto lanes, int) {
              store(dx + first + k, load(dx + first + k, lanes) + load(other + first + k, lanes), lanes);
            });
            if (stream) out.append(row, line * int64_t{sizeof(T)});
          }
        }
        out.finish();
      });
    });
  });
}

FT_CPU_KERNEL(cutmix_fwd);
FT_CPU_KERNEL(cutmix_bwd);

}  // namespace fusedtricks::FT_ISA
