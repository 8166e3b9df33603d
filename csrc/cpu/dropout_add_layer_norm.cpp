// dropout_add_layer_norm on the CPU: the rows of row_norm.h, made from dropout(x) + residual just before they are
// measured; and their gradients, dropped as soon as they are stored. Bytes that must move, for n elements of s bytes:
// forward 4ns, backward 5ns.
#include "dropout.h"
#include "row_norm.h"

namespace fusedtricks::FT_ISA {

// The bits of the rows: none where everything is kept.
struct Dropping {
  uint64_t seed = 0;
  int64_t keep;

  Dropping(const char* op, const Tensor& x, const MaybeTensor& given, int64_t keep) : keep(keep) {
    check_dropping(op, x, given, keep);
    if (given) seed = static_cast<uint64_t>(*static_cast<const int64_t*>(given->const_data_ptr()));
  }
};

// z = dropout(x) + residual, a row at a time.
struct Sum {
  const Tensor &x, &residual, &z;
  int64_t columns;
  Dropping drop;

  template <class T>
  auto make() const {
    return [this, a = static_cast<const T*>(x.const_data_ptr()), b = static_cast<const T*>(residual.const_data_ptr()),
            to = static_cast<T*>(z.mutable_data_ptr()), scale = dropout_scale<Acc<T>>(drop.keep)](int64_t r) {
      using A = Acc<T>;
      alignas(64) uint16_t room[random_room<uint16_t>(kDropped)];
      for (int64_t first = r * columns, end = first + columns; first < end; first += kDropped) {
        const int64_t count = std::min(end - first, kDropped);
        const uint16_t* bits = drop.keep < 65536 ? random_elements(drop.seed, first, count, room) : nullptr;
        sweep<A>(0, count, [&](int64_t j, auto lanes, int) __attribute__((always_inline)) {
          auto v = load(a + first + j, lanes);
          if (bits) v = dropped_lanes<A>(v, bits + j, static_cast<uint32_t>(drop.keep), scale);
          store(to + first + j, v + load(b + first + j, lanes), lanes);
        });
      }
    };
  }
};

// Of the gradient of z through the normalization: the gradient that came to z itself is added; the sum is that of the
// residual and, dropped, that of x.
struct Split {
  const MaybeTensor& dz;
  const Tensor& dx;
  int64_t columns;
  bool need_dx;
  Dropping drop;

  template <class T>
  struct Of {
    static constexpr bool kReadsStored = true;
    const T* dz;
    T* dx;
    int64_t columns;
    Dropping drop;
    int64_t row[kMostRows];

    void begin(int i, int64_t r) { row[i] = r * columns; }
    inline __attribute__((always_inline)) auto change(int i, int64_t j, auto v, auto lanes) const {
      return dz ? v + load(dz + row[i] + j, lanes) : v;
    }
    void done(int i, const T* gradient) const {
      for (int64_t first = 0; dx && first < columns; first += kDropped) {
        drop_elements(gradient + first, dx + row[i] + first, std::min(columns - first, kDropped), row[i] + first,
                      drop.seed, static_cast<uint32_t>(drop.keep), dropout_scale<Acc<T>>(drop.keep));
      }
    }
  };

  template <class T>
  Of<T> make() const {
    return {dz ? static_cast<const T*>(dz->const_data_ptr()) : nullptr,
            need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr,
            columns,
            drop,
            {}};
  }
};

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              const MaybeTensor& seed, int64_t keep, double eps,
                                                              int64_t dims, bool center) {
  const char* op = "dropout_add_layer_norm_fwd";
  const auto shape = check_rows(op, x, weight, bias, dims);
  check_plain(op, "x", x, x);
  check_plain(op, "residual", residual, x);
  const Tensor z = result_like(x);
  const Sum sum{x, residual, z, shape.columns, Dropping(op, x, seed, keep)};
  auto [y, stats] = center ? forward<true>(op, z, weight, bias, eps, dims, sum)
                           : forward<false>(op, z, weight, std::nullopt, eps, dims, sum);
  return {y, z, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(const Tensor& dy, const MaybeTensor& dz,
                                                                      const Tensor& z, const MaybeTensor& weight,
                                                                      const Tensor& stats, const MaybeTensor& seed,
                                                                      int64_t keep, int64_t dims, bool center,
                                                                      bool need_dx, bool need_dresidual,
                                                                      bool need_dweight, bool need_dbias) {
  const char* op = "dropout_add_layer_norm_bwd";
  const auto shape = check_rows(op, z, weight, std::nullopt, dims);
  check_plain(op, "z", z, z);
  if (dz) check_plain(op, "dz", *dz, z);
  const Tensor dx = need_dx ? result_like(z) : empty({0}, z.scalar_type(), z);
  const Split split{dz, dx, shape.columns, need_dx, Dropping(op, z, seed, keep)};
  const bool need_dz = need_dx || need_dresidual;
  auto [dresidual, dweight, dbias] =
      center ? backward<true>(op, dy, z, weight, stats, dims, need_dz, need_dweight, need_dbias, split)
             : backward<false>(op, dy, z, weight, stats, dims, need_dz, need_dweight, need_dbias, split);
  return {dx, need_dresidual ? dresidual : empty({0}, z.scalar_type(), z), dweight, dbias};
}

FT_CPU_KERNEL(dropout_add_layer_norm_fwd);
FT_CPU_KERNEL(dropout_add_layer_norm_bwd);

}  // namespace fusedtricks::FT_ISA
