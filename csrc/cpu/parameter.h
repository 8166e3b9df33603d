// A weight or bias in the type of the arithmetic.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "torch_api.h"
#include "vec.h"

namespace fusedtricks::FT_ISA {

// A parameter as values of the accumulation type: the tensor's own memory where it has that type already.
template <class A>
struct Parameter {
  const A* data = nullptr;

  Parameter(const char* op, const MaybeTensor& parameter, int64_t columns, A otherwise, const Tensor& where) {
    constexpr auto type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    if (parameter) {
      owner_ = parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
      if (owner_.scalar_type() == type) {
        data = static_cast<const A*>(owner_.const_data_ptr());
        return;
      }
    }
    A* to = short_;
    if (columns > kShort) {
      converted_ = empty({columns}, type, where);
      to = static_cast<A*>(converted_.mutable_data_ptr());
    }
    data = to;
    if (!parameter) {
      std::fill_n(to, columns, otherwise);
      return;
    }
    dispatch(op, owner_.scalar_type(), [&]<class P>() {
      const P* from = static_cast<const P*>(owner_.const_data_ptr());
      if constexpr (std::is_same_v<Acc<P>, A>) {
        sweep<A>(0, columns, [&](int64_t j, auto lanes, int) { store(to + j, load(from + j, lanes), lanes); });
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = static_cast<A>(load(from + j, Tail{1})[0]);
      }
    });
  }

 private:
  static constexpr int64_t kShort = 256;
  A short_[kShort];
  Tensor owner_, converted_;
};

}  // namespace fusedtricks::FT_ISA
