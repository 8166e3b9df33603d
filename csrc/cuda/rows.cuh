// Where rows lie in memory, as kernels take it.
#pragma once

#include "launch.cuh"

namespace fusedtricks::cuda {

// Element offsets of the rows of K tensors, which lie on at most two nested levels.
template <int K>
struct RowMap {
  int64_t inner, outer_stride[K], inner_stride[K];

  struct Place {
    int64_t outer, inner;
  };

  __device__ __forceinline__ Place place(int64_t r) const {
    if (r < inner) return {0, r};
    return {r / inner, r % inner};
  }

  __device__ __forceinline__ int64_t offset(int k, Place at) const {
    return at.outer * outer_stride[k] + at.inner * inner_stride[k];
  }
};

// The rows of K tensors on two levels, if two are enough.
template <int K>
std::optional<RowMap<K>> map_rows(const Rows<K>& rows) {
  if (rows.levels > 2) return std::nullopt;
  RowMap<K> map{std::numeric_limits<int64_t>::max(), {}, {}};
  if (rows.levels == 2) map.inner = rows.size[1];
  for (int k = 0; k < K && rows.levels > 0; ++k) {
    map.inner_stride[k] = rows.stride[k][rows.levels - 1];
    map.outer_stride[k] = rows.stride[k][0];
  }
  return map;
}

}  // namespace fusedtricks::cuda
