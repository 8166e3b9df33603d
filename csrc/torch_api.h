// The only header that includes torch, and only its stable ABI: tensors, allocation, checks, dtype switch, rows, and
// the list in which every kernel file enters its operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace fusedtricks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- kernel list ----------------------------------------------------------------------------------------------------

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

struct Kernel {
  const char* op;
  const char* backend;  // "cpu:baseline", "cpu:avx2", "cpu:avx512" or "cuda"
  BoxedKernel call;
};

// Defined in module.cpp. The Python side decides which entry serves which dispatch key.
bool enter_kernel(Kernel kernel);

#define FT_KERNEL(op, backend, function) \
  static const bool entered_##op = ::fusedtricks::enter_kernel({#op, backend, TORCH_BOX(&function)})

// ---- dtypes ---------------------------------------------------------------------------------------------------------

// Arithmetic and statistics are fp32, and fp64 for fp64.
inline ScalarType accumulate_dtype(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline void check_floating(const char* op, const char* name, ScalarType t) {
  STD_TORCH_CHECK(
      t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half, op, ": ",
      name, " must be float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(t));
}

// ---- devices --------------------------------------------------------------------------------------------------------

// Are they on one device? The dispatcher does not ask, and a kernel would read what another GPU has at the address.
inline bool together(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

// ---- allocation -----------------------------------------------------------------------------------------------------

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline Tensor empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype, const Tensor& where) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(where.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                  static_cast<int32_t>(dtype), device_type, where.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

// A plain (row-major) tensor on the device of `where`.
inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& where) {
  std::array<int64_t, 64> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return empty_strided(sizes, strides.data(), dtype, where);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& where) {
  return empty(Sizes(sizes.begin(), sizes.size()), dtype, where);
}

// Strides as torch.empty_like gives them: those of `t` where it is dense.
inline Tensor empty_like(const Tensor& t) {
  return t.is_contiguous() ? empty(t.sizes(), t.scalar_type(), t) : torch::stable::empty_like(t);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  if (t.is_contiguous()) return empty(t.sizes(), dtype, t);
  return empty_strided(t.sizes(), torch::stable::empty_like(t).strides().data(), dtype, t);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Do the trailing `dims` dimensions lie in memory as one run of unit stride?
inline bool unit_columns(const Tensor& t, int64_t dims) {
  auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= t.dim() - dims; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// A copy of `t` with unit-stride columns; what is expanded over the rows stays expanded, so that the gradient of
// `sum()` costs one row and not a tensor.
inline Tensor with_unit_columns(const Tensor& t, int64_t dims) {
  if (unit_columns(t, dims)) return t;
  Tensor one = t;
  for (int64_t d = 0; d < t.dim() - dims; ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) one = torch::stable::narrow(one, d, 0, 1);
  }
  one = torch::stable::contiguous(one);
  std::array<int64_t, 64> strides{};
  for (int64_t d = 0; d < t.dim(); ++d) strides[d] = one.size(d) == t.size(d) ? one.stride(d) : 0;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(one.get(), t.sizes().data(), strides.data(), &handle));
  return Tensor(handle);
}

// The leading dimensions of K tensors of one shape, walked together: nested levels, outermost first, merged where all
// K tensors allow it. The order follows the first tensor's strides, so a permuted but dense batch is one level.
template <int K>
struct Rows {
  static constexpr int kLevels = 8;
  int64_t count = 1;
  int levels = 0;
  int64_t size[kLevels];
  int64_t stride[K][kLevels];

  // Steps through the rows from row r, with the element offset of the current row in each tensor.
  class Walk {
   public:
    int64_t offset[K] = {};

    Walk(const Rows& rows, int64_t r) : rows_(rows) {
      for (int l = rows.levels - 1; l >= 0; --l) {
        index_[l] = l ? r % rows.size[l] : r;
        r = l ? r / rows.size[l] : 0;
        for (int k = 0; k < K; ++k) offset[k] += index_[l] * rows.stride[k][l];
      }
    }

    void next() {
      for (int l = rows_.levels - 1; l >= 0; --l) {
        for (int k = 0; k < K; ++k) offset[k] += rows_.stride[k][l];
        if (++index_[l] < rows_.size[l] || l == 0) return;
        for (int k = 0; k < K; ++k) offset[k] -= rows_.size[l] * rows_.stride[k][l];
        index_[l] = 0;
      }
    }

   private:
    const Rows& rows_;
    int64_t index_[kLevels];
  };
};

// `strides[k]` are the strides of tensor k over the `n` leading dimensions of `sizes`.
template <int K>
Rows<K> collapse_rows(int64_t n, const int64_t* sizes, const std::array<const int64_t*, K>& strides) {
  std::array<int64_t, 64> order;
  int64_t kept = 0;
  Rows<K> rows;
  for (int64_t d = 0; d < n; ++d) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    int64_t i = kept++;
    for (; i > 0 && strides[0][order[i - 1]] < strides[0][d]; --i) order[i] = order[i - 1];
    order[i] = d;
  }
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t d = order[i];
    bool merge = rows.levels > 0;
    for (int k = 0; merge && k < K; ++k) merge = rows.stride[k][rows.levels - 1] == sizes[d] * strides[k][d];
    if (!merge) {
      STD_TORCH_CHECK(rows.levels < Rows<K>::kLevels, "fusedtricks: more than ", Rows<K>::kLevels,
                      " separately strided leading dimensions; call .contiguous() on the input first");
      rows.size[rows.levels++] = 1;
    }
    rows.size[rows.levels - 1] *= sizes[d];
    for (int k = 0; k < K; ++k) rows.stride[k][rows.levels - 1] = strides[k][d];
  }
  return rows;
}

// ---- normalization over rows: what every launcher checks
// ----------------------------------------------------------------

struct RowShape {
  int64_t rows, columns;
};

// x (*, C...) with the trailing `dims` dimensions normalised; parameters of that trailing shape.
inline RowShape check_rows(const char* op, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                           int64_t dims) {
  check_floating(op, "input", x.scalar_type());
  STD_TORCH_CHECK(dims >= 1 && dims <= x.dim(), op, ": cannot normalise ", dims, " dimensions of a ", x.dim(),
                  "-dimensional input");
  RowShape shape{1, 1};
  const int64_t lead = x.dim() - dims;
  for (int64_t d = 0; d < x.dim(); ++d) (d < lead ? shape.rows : shape.columns) *= x.size(d);
  auto check = [&](const MaybeTensor& p, const char* name) {
    if (!p) return;
    check_floating(op, name, p->scalar_type());
    bool same = p->dim() == dims && together(*p, x);
    for (int64_t d = 0; same && d < dims; ++d) same = p->size(d) == x.size(lead + d);
    STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and device of the input's trailing ", dims,
                    " dimensions");
  };
  check(weight, "weight");
  check(bias, "bias");
  return shape;
}

inline void check_gradient(const char* op, const Tensor& dy, const Tensor& x, const Tensor& stats,
                           int64_t stats_numel) {
  bool same = dy.dim() == x.dim() && dy.scalar_type() == x.scalar_type() && together(dy, x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": the gradient must have the shape, dtype and device of the input");
  STD_TORCH_CHECK(stats.numel() == stats_numel && stats.is_contiguous() &&
                      stats.scalar_type() == accumulate_dtype(x.scalar_type()) && together(stats, x),
                  op, ": the statistics must be those that the forward returned");
}

// ---- dropout: what every launcher checks
// -----------------------------------------------------------------------------

inline void check_dropout(const char* op, const Tensor& x, const Tensor& seed, int64_t keep, int64_t group) {
  check_floating(op, "input", x.scalar_type());
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && together(seed, x), op,
                  ": the seed must be one int64 on the device of the input");
  STD_TORCH_CHECK(keep >= 0 && keep <= 65536, op, ": keep must be 0 to 65536, got ", keep);
  int64_t trailing = 1;
  for (int64_t d = x.dim(); trailing != group && d > 0;) trailing *= x.size(--d);
  STD_TORCH_CHECK(trailing == group || x.numel() == 0, op, ": a group must be some trailing dimensions, got ", group);
}

// No seed: everything is kept.
inline void check_dropping(const char* op, const Tensor& x, const MaybeTensor& seed, int64_t keep) {
  if (seed) return check_dropout(op, x, *seed, keep, 1);
  STD_TORCH_CHECK(keep == 65536, op, ": a seed is needed where elements are dropped");
}

inline void check_plain(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(
      t.is_contiguous() && t.scalar_type() == x.scalar_type() && t.sizes().equals(x.sizes()) && together(t, x), op,
      ": ", name, " must be contiguous, of the shape, dtype and device of x");
}

// ---- cross-entropy: what every launcher checks
// -----------------------------------------------------------------------

// Labels, and not class probabilities?
inline bool holds_labels(const Tensor& target) {
  const auto type = target.scalar_type();
  return type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte;
}

inline RowShape check_loss(const char* op, const Tensor& logits, const Tensor& target, const MaybeTensor& other,
                           const MaybeTensor& lam, const MaybeTensor& weight) {
  check_floating(op, "logits", logits.scalar_type());
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1, op, ": expected logits (*, C) with C >= 1");
  const auto accumulate = accumulate_dtype(logits.scalar_type());
  const int64_t classes = logits.size(logits.dim() - 1), rows = logits.numel() / classes;
  for (const Tensor* t : {&target, other ? &*other : nullptr, lam ? &*lam : nullptr, weight ? &*weight : nullptr}) {
    STD_TORCH_CHECK(!t || together(*t, logits), op, ": expected all tensors on the device of the logits");
  }
  if (!holds_labels(target)) check_floating(op, "class probabilities", target.scalar_type());
  STD_TORCH_CHECK(target.numel() == (holds_labels(target) ? rows : logits.numel()), op, ": expected ", rows,
                  " labels, or class probabilities of the logits' shape, got ", target.numel(), " elements");
  STD_TORCH_CHECK(other.has_value() == lam.has_value(), op, ": a second label and lam go together");
  if (other) {
    STD_TORCH_CHECK(holds_labels(target) && holds_labels(*other) && other->numel() == rows, op, ": expected ", rows,
                    " second labels");
    STD_TORCH_CHECK((lam->dim() == 0 || lam->numel() == rows) && lam->scalar_type() == accumulate, op,
                    ": lam must be 0-dim or hold a value for each label, in the accumulation dtype");
  }
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == classes && weight->scalar_type() == accumulate, op,
                    ": weight must be (C,) in the accumulation dtype");
  }
  return {rows, classes};
}

// `kept`: how many numbers of each row the forward returned.
inline void check_loss_gradient(const char* op, const Tensor& logits, int64_t rows, const Tensor& dloss,
                                const MaybeTensor& dlse, const Tensor& stats, const Tensor& total, int64_t reduction,
                                int64_t kept = 3) {
  const auto accumulate = accumulate_dtype(logits.scalar_type());
  STD_TORCH_CHECK(
      dloss.scalar_type() == accumulate && dloss.numel() == (reduction == 0 ? rows : 1) && together(dloss, logits), op,
      ": the gradient must have the shape, dtype and device of the loss");
  STD_TORCH_CHECK(!dlse || (dlse->scalar_type() == accumulate && dlse->numel() == rows && together(*dlse, logits)), op,
                  ": the gradient of lse must have its shape, dtype and device");
  STD_TORCH_CHECK(stats.numel() == kept * rows && stats.is_contiguous() && stats.scalar_type() == accumulate &&
                      total.scalar_type() == accumulate && total.numel() == 1 && together(stats, logits) &&
                      together(total, logits),
                  op, ": the statistics must be those that the forward returned");
}

// Class probabilities in a dtype that the kernels take beside the logits'; labels give the logits once more.
inline Tensor probabilities_of(const Tensor& target, const Tensor& logits) {
  if (holds_labels(target)) return logits;
  const auto type = target.scalar_type(), accumulate = accumulate_dtype(logits.scalar_type());
  return type == logits.scalar_type() || type == accumulate ? target : torch::stable::to(target, accumulate);
}

// Two models, and labels or none. The teacher takes the place of class probabilities.
inline RowShape check_distillation(const char* op, const Tensor& student, const Tensor& teacher,
                                   const MaybeTensor& indices, const MaybeTensor& target, const MaybeTensor& other,
                                   const MaybeTensor& lam, const MaybeTensor& weight, double temperature) {
  STD_TORCH_CHECK(!target || holds_labels(*target), op, ": expected labels of int64, int32 or uint8");
  // Without labels the student stands in for probabilities.
  const auto shape = check_loss(op, student, target ? *target : student, other, lam, weight);
  check_floating(op, "teacher", teacher.scalar_type());
  if (indices) {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && teacher.size(0) == shape.rows && teacher.size(1) > 0 &&
                        indices->sizes().equals(teacher.sizes()) && holds_labels(*indices) &&
                        together(teacher, student) && together(*indices, student),
                    op, ": a sparse teacher of (R, C) needs k > 0 values and indices (R, k), on the student's device");
  } else {
    STD_TORCH_CHECK(teacher.sizes().equals(student.sizes()) && together(teacher, student), op,
                    ": expected a teacher of the student's shape, on its device");
  }
  STD_TORCH_CHECK(temperature > 0, op, ": expected a positive temperature, got ", temperature);
  return shape;
}

// Strides of the leading dimensions of a plain tensor of one element per row.
inline std::array<int64_t, 64> row_major(const Tensor& x, int64_t dims) {
  std::array<int64_t, 64> strides;
  int64_t stride = 1;
  for (int64_t d = x.dim() - dims - 1; d >= 0; stride *= x.size(d--)) strides[d] = stride;
  return strides;
}

// ---- mixing: what every launcher checks -----------------------------------------------------------------------------

// Whether the values are a permutation, CPU kernels check; on other devices it would take a host sync.
inline void check_permutation(const char* op, const Tensor& x, const Tensor& perm) {
  STD_TORCH_CHECK(x.dim() > 0 && perm.dim() == 1 && perm.size(0) == x.size(0) &&
                      perm.scalar_type() == ScalarType::Long && perm.is_contiguous() && together(perm, x),
                  op, ": perm must be int64, contiguous, one for each sample, on the device of x");
}

inline void check_weights(const char* op, const Tensor& x, const Tensor& weights) {
  STD_TORCH_CHECK(
      x.dim() > 0 && weights.is_contiguous() && weights.scalar_type() == accumulate_dtype(x.scalar_type()) &&
          (weights.numel() == 1 || weights.numel() == x.size(0)) && together(weights, x),
      op,
      ": the weights must be contiguous, fp32 (fp64 for fp64), one for the batch or for each sample, on the "
      "device of x");
}

// uint8 images (N, C, *) become y = scale x + shift by channel.
inline void check_images(const char* op, const Tensor& x, const MaybeTensor& scale, const MaybeTensor& shift) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": images must be (N, C, *)");
  for (const auto* map : {&scale, &shift}) {
    STD_TORCH_CHECK(*map && (*map)->scalar_type() == ScalarType::Float && (*map)->is_contiguous() &&
                        (*map)->numel() == x.size(1) && together(**map, x),
                    op, ": images need a scale and a shift for each channel, contiguous and fp32");
  }
}

inline void check_boxes(const char* op, const Tensor& x, const Tensor& box) {
  STD_TORCH_CHECK(x.dim() >= 3, op, ": expected images (N, *, H, W)");
  STD_TORCH_CHECK(box.dim() == 2 && box.size(1) == 4 && (box.size(0) == 1 || box.size(0) == x.size(0)) &&
                      box.scalar_type() == ScalarType::Long && box.is_contiguous() && together(box, x),
                  op, ": box must be int64, contiguous, (1, 4) or (N, 4), on the device of x");
}

// Images as (N, planes, H, line): a line is a row of pixels, `pixel` elements each. Channels that lie innermost are
// part of the pixel.
struct Images {
  int64_t N, planes = 1, H, W, pixel = 1;

  explicit Images(const Tensor& x) : N(x.size(0)), H(x.size(x.dim() - 2)), W(x.size(x.dim() - 1)) {
    const int64_t rest = x.numel() / std::max<int64_t>(N * H * W, 1);
    (x.is_contiguous() ? planes : pixel) = rest;
  }

  int64_t line() const { return W * pixel; }
  int64_t plane() const { return H * line(); }
  int64_t sample() const { return planes * plane(); }

  // Dense with one channel dimension innermost, as channels_last.
  static bool interleaved(const Tensor& x) {
    if (x.dim() != 4) return false;
    const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
    auto is = [&](int64_t d, int64_t stride) { return x.size(d) == 1 || x.stride(d) == stride; };
    return is(1, 1) && is(3, C) && is(2, C * W) && is(0, C * W * H);
  }
};

// run(x, y) on x and y themselves where they are plain or interleaved, else on plain copies.
template <class F>
Tensor on_images(const Tensor& x, const F& run) {
  auto y = fusedtricks::empty_like(x);
  if (x.numel() == 0) return y;
  if (x.is_contiguous() || Images::interleaved(x)) {
    run(x, y);
    return y;
  }
  const Tensor plain = torch::stable::contiguous(x), mixed = empty(x.sizes(), x.scalar_type(), x);
  run(plain, mixed);
  torch::stable::copy_(y, mixed);
  return y;
}

}  // namespace fusedtricks
