// The Python module fusedtricks._plan: has anything an optimizer step depends on changed since the step before? A
// thousand parameters are asked in tens of microseconds, where Python would take milliseconds.
//
// The one file that uses torch's own headers and not its stable ABI: gradients are reached through the Python objects
// of parameters. It is a library of its own, so that another torch than the one it was built for loses this and
// nothing else: fusedtricks/ops/_optimizer.py then plans every step anew.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "math/optimizer.h"

namespace fusedtricks {
namespace {

namespace py = pybind11;

// What `Plan.check` found, a bit each.
enum Change : int { kNothing = 0, kStructure = 1, kPointers = 2, kHypers = 4 };

// The entries of a dict at one time. Holding them keeps their addresses from being used again, so that comparing
// addresses is enough.
class Snapshot {
 public:
  explicit Snapshot(py::dict dict) : dict_(std::move(dict)) { take(); }

  PyObject* dict() const { return dict_.ptr(); }

  void take() {
    entries_.clear();
    for (auto [key, value] : dict_) {
      entries_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    }
    version_ = version();
  }

  // f(key, value) for every entry whose value is another object now; false if the keys are not the same.
  template <class F>
  bool compare(const F& f) const {
    if (static_cast<size_t>(PyDict_Size(dict_.ptr())) != entries_.size()) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(dict_.ptr(), &position, &key, &value); ++i) {
      if (key != entries_[i].first.ptr()) return false;
      if (value != entries_[i].second.ptr()) f(key, value);
    }
    return true;
  }

  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(dict_.ptr());
    for (const auto& [key, value] : entries_) {
      Py_VISIT(key.ptr());
      Py_VISIT(value.ptr());
    }
    return 0;
  }

  bool untouched() const { return version_ != 0 && version_ == version(); }

  bool unchanged() const {
    bool same = true;
    return untouched() || (compare([&](PyObject*, PyObject*) { same = false; }) && same);
  }

 private:
  // Differs after every change of any dict; 0 where Python does not tell.
  uint64_t version() const {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dict_.ptr())->ma_version_tag;
#else
    return 0;
#endif
  }

  py::dict dict_;
  uint64_t version_ = 0;
  std::vector<std::pair<py::object, py::object>> entries_;
};

// A thousand parameters do not fit the caches together with a training step: what is looked at soon is fetched early.
constexpr size_t kAhead = 8;
template <class List>
void fetch_ahead(const List& list, size_t i) {
  if (i + kAhead >= list.size()) return;
  __builtin_prefetch(list[i + kAhead].object.ptr());
  const auto* impl = reinterpret_cast<const char*>(list[i + kAhead].impl);
  __builtin_prefetch(impl);
  __builtin_prefetch(impl + 64);
  __builtin_prefetch(impl + 128);
}

const at::Tensor& unpack(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("fusedtricks: expected a tensor");
  return THPVariable_Unpack(object.ptr());
}

// A tensor and the place it had. It is held as a Python object, for who exchanges the insides of two tensors
// (torch.utils.swap_tensors) wants no other owners.
struct Placed {
  py::object object;
  const c10::TensorImpl* impl;
  const void* data;

  explicit Placed(py::handle t)
      : object(py::reinterpret_borrow<py::object>(t)),
        impl(unpack(t).unsafeGetTensorImpl()),
        data(unpack(t).const_data_ptr()) {}

  const at::Tensor& tensor() const { return THPVariable_Unpack(object.ptr()); }
  bool unchanged() const {
    const at::Tensor& t = tensor();
    return t.unsafeGetTensorImpl() == impl && t.const_data_ptr() == data;
  }
};

// And its shape, in a list of all shapes and strides one after the other.
struct Parameter : Placed {
  at::ScalarType dtype;
  size_t dims, shape;

  Parameter(py::handle object, std::vector<int64_t>& shapes) : Placed(object), shape(shapes.size()) {
    const at::Tensor& t = tensor();
    dtype = t.scalar_type();
    dims = t.dim();
    shapes.insert(shapes.end(), t.sizes().begin(), t.sizes().end());
    shapes.insert(shapes.end(), t.strides().begin(), t.strides().end());
  }

  bool unchanged(const std::vector<int64_t>& shapes) const {
    if (!Placed::unchanged()) return false;
    const at::Tensor& t = tensor();
    const auto sizes = t.sizes(), strides = t.strides();
    if (t.scalar_type() != dtype || sizes.size() != dims) return false;
    const int64_t* was = shapes.data() + shape;
    return std::equal(sizes.begin(), sizes.end(), was) && std::equal(strides.begin(), strides.end(), was + dims);
  }
};

// Can kernels read this gradient with the strides of its parameter?
bool follows(const at::Tensor& grad, const at::Tensor& param) {
  const auto* impl = grad.unsafeGetTensorImpl();
  if (grad.layout() != at::kStrided || impl->is_python_dispatch()) return false;
  if (grad.is_conj() || grad.is_neg() || grad._is_zerotensor()) return false;
  if (grad.scalar_type() != param.scalar_type() || grad.device() != param.device()) return false;
  if (grad.sizes() != param.sizes()) return false;
  if (grad.strides() == param.strides() || grad.numel() <= 1) return true;
  for (int64_t d = 0; d < grad.dim(); ++d) {
    if (grad.size(d) != 1 && grad.stride(d) != param.stride(d)) return false;
  }
  return true;
}

class Plan {
 public:
  // `live`: {key of a group: [(index into its value, or -1), column of `hyper`]}; `structural`: keys whose change asks
  // for a new table. `hyper`: (groups, kHyper), float64, on the CPU. `remote`: a tensor, or None; values that are
  // tensors on its device are not read, which would wait for the device, but left as NaN.
  Plan(py::list groups, py::dict state, const py::dict& live, const py::set& structural, py::handle hyper,
       py::handle remote)
      : groups_(std::move(groups)), state_(std::move(state)), hyper_(unpack(hyper)) {
    if (!remote.is_none()) remote_ = unpack(remote);
    for (auto [key, columns] : live) {
      auto& list = live_[key.cast<std::string>()];
      for (auto entry : columns) {
        auto pair = entry.cast<std::pair<int, int>>();
        list.push_back(pair);
      }
    }
    for (auto key : structural) structural_.insert(key.cast<std::string>());
    for (auto group : groups_) {
      const auto dict = py::reinterpret_borrow<py::dict>(group);
      snapshots_.emplace_back(dict);
      lists_.push_back(dict["params"]);
      params_.emplace_back();
      for (auto p : lists_.back()) params_.back().push_back(py::reinterpret_borrow<py::object>(p));
      mutable_.push_back(false);
    }
    for (size_t g = 0; g < snapshots_.size(); ++g) read_hypers(g);
  }

  // Row i of `table` (int64, on the CPU) is that of `params[i]`, whose state is `states[i]` and whose tensors there
  // are `tensors[i]`. Parameters that are `absent` have no gradient. `guarded`: that somebody else wrote to a
  // parameter, as its version tells, is a change of structure.
  void watch(const py::list& params, const py::list& states, const py::list& tensors, const py::list& absent,
             py::handle table, bool guarded) {
    table_ = unpack(table);
    guarded_ = guarded;
    for (auto p : params) rows_.emplace_back(p, shapes_);
    for (auto s : states) row_states_.emplace_back(py::reinterpret_borrow<py::dict>(s));
    for (auto list : tensors) {
      for (auto t : list) others_.emplace_back(t);
    }
    for (auto p : absent) absent_.push_back(py::reinterpret_borrow<py::object>(p));
    for (const auto& r : rows_) versions_.push_back(version(r.tensor()));
  }

  // Of the parameters, after the last step.
  std::vector<int64_t> versions() const { return versions_; }

  int check(py::handle groups, py::handle state) {
    if (groups.ptr() != groups_.ptr() || state.ptr() != state_.dict()) return kStructure;
    int changes = check_groups();
    if (changes & kStructure) return kStructure;
    if (!state_.unchanged()) return kStructure;
    for (const auto& s : row_states_) {
      if (!s.unchanged()) return kStructure;
    }
    for (size_t i = 0; i < others_.size(); ++i) {
      fetch_ahead(others_, i);
      if (!others_[i].unchanged()) return kStructure;
    }
    for (const auto& p : absent_) {
      if (unpack(p).grad().defined()) return kStructure;
    }
    if (rows_.empty()) return changes;
    auto* const table = table_.mutable_data_ptr<int64_t>();
    for (size_t i = 0; i < rows_.size(); ++i) {
      fetch_ahead(rows_, i);
      const at::Tensor& param = rows_[i].tensor();
      if (!rows_[i].unchanged(shapes_) || (guarded_ && version(param) != versions_[i])) return kStructure;
      const at::Tensor& grad = param.grad();
      if (!grad.defined() || !follows(grad, param)) return kStructure;
      const auto at = reinterpret_cast<int64_t>(grad.const_data_ptr());
      int64_t& entry = table[i * kColumns + kGrad];
      if (entry != at) entry = at, changes |= kPointers;
    }
    return changes;
  }

  // For Python's garbage collector: an optimizer may belong to what it steps.
  int traverse(visitproc visit, void* arg) const {
    const auto all = [&](const auto& list, const auto& object_of) {
      for (const auto& item : list) Py_VISIT(object_of(item));
      return 0;
    };
    const auto itself = [](const py::object& object) { return object.ptr(); };
    const auto held = [](const Placed& placed) { return placed.object.ptr(); };
    Py_VISIT(groups_.ptr());
    int stop = state_.traverse(visit, arg);
    for (const auto* list : {&snapshots_, &row_states_}) {
      for (const auto& s : *list) stop = stop ? stop : s.traverse(visit, arg);
    }
    for (const auto& list : params_) stop = stop ? stop : all(list, itself);
    stop = stop ? stop : all(lists_, itself);
    stop = stop ? stop : all(rows_, held);
    stop = stop ? stop : all(others_, held);
    return stop ? stop : all(absent_, itself);
  }

  // What it held afterwards is not to be asked about.
  void clear() { const Plan last(std::move(*this)); }

  // Autograd must learn that the parameters (and, unscaled, the gradients) were written to.
  void bump_versions(bool gradients) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      const at::Tensor& t = rows_[i].tensor();
      bump(t);
      if (gradients) bump(t.grad());
      versions_[i] = version(t);
    }
  }

 private:
  // Tensors of inference mode have no version.
  static int64_t version(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }
  static void bump(const at::Tensor& t) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }

  int check_groups() {
    if (static_cast<size_t>(PyList_GET_SIZE(groups_.ptr())) != snapshots_.size()) return kStructure;
    int changes = kNothing;
    for (size_t g = 0; g < snapshots_.size(); ++g) {
      if (PyList_GET_ITEM(groups_.ptr(), g) != snapshots_[g].dict()) return kStructure;
      bool structure = false, any = false;
      if (!snapshots_[g].untouched()) {
        const bool same_keys = snapshots_[g].compare([&](PyObject* key, PyObject*) {
          any = true;
          structure = structure || (PyUnicode_Check(key) && structural_.count(py::handle(key).cast<std::string>()));
        });
        if (!same_keys || structure) return kStructure;
        snapshots_[g].take();
      }
      if (any || mutable_[g]) changes |= read_hypers(g);
      if (changes & kStructure) return kStructure;
      PyObject* const params = lists_[g].ptr();
      if (static_cast<size_t>(PyList_GET_SIZE(params)) != params_[g].size()) return kStructure;
      for (size_t i = 0; i < params_[g].size(); ++i) {
        if (PyList_GET_ITEM(params, i) != params_[g][i].ptr()) return kStructure;
      }
    }
    return changes;
  }

  // kHypers if a value differs from the one it had; kStructure if one that asks for a new table does.
  int read_hypers(size_t g) {
    int changes = kNothing;
    mutable_[g] = false;
    auto* const row = hyper_.mutable_data_ptr<double>() + g * kHyper;
    for (const auto& [key, columns] : live_) {
      PyObject* const value = PyDict_GetItemString(snapshots_[g].dict(), key.c_str());
      if (!value) continue;
      const bool fixed = PyFloat_CheckExact(value) || PyLong_Check(value) || PyTuple_CheckExact(value);
      if (!fixed && !THPVariable_Check(value)) mutable_[g] = true;
      for (const auto& [index, column] : columns) {
        py::object part = py::reinterpret_borrow<py::object>(value);
        if (index >= 0) part = part[py::int_(index)];
        double number;
        if (THPVariable_Check(part.ptr())) {
          const at::Tensor& value = THPVariable_Unpack(part.ptr());
          const bool there = remote_.defined() && value.device() == remote_.device();
          if (!there) mutable_[g] = true;
          number = there ? std::numeric_limits<double>::quiet_NaN() : value.item<double>();
        } else {
          if (!PyFloat_CheckExact(part.ptr()) && !PyLong_Check(part.ptr())) mutable_[g] = true;
          number = PyFloat_AsDouble(part.ptr());
          if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
        }
        if (row[column] == number) continue;
        row[column] = number;
        changes |= structural_.count(key) ? kStructure | kHypers : kHypers;
      }
    }
    return changes;
  }

  py::list groups_;
  Snapshot state_;
  at::Tensor hyper_, table_, remote_;
  std::unordered_map<std::string, std::vector<std::pair<int, int>>> live_;
  std::unordered_set<std::string> structural_;
  std::vector<Snapshot> snapshots_;              // of the groups
  std::vector<py::list> lists_;                  // each group's "params"
  std::vector<std::vector<py::object>> params_;  // what is in them
  std::vector<char> mutable_;                    // has the group values that change in place?
  std::vector<Parameter> rows_;
  std::vector<Placed> others_;  // states and what else rows point to
  std::vector<int64_t> shapes_;
  std::vector<Snapshot> row_states_;
  std::vector<py::object> absent_;
  std::vector<int64_t> versions_;
  bool guarded_ = false;
};

// Null while it is being made.
Plan* plan_of(PyObject* self) {
  const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Plan>() : nullptr;
}

}  // namespace
}  // namespace fusedtricks

PYBIND11_MODULE(_plan, m) {
  using fusedtricks::Plan;
  using fusedtricks::plan_of;
  namespace py = pybind11;
  m.attr("torch") = TORCH_VERSION;
  m.attr("STRUCTURE") = static_cast<int>(fusedtricks::kStructure);
  m.attr("POINTERS") = static_cast<int>(fusedtricks::kPointers);
  m.attr("HYPERS") = static_cast<int>(fusedtricks::kHypers);
  py::class_<Plan>(m, "Plan", py::custom_type_setup([](PyHeapTypeObject* heap) {
                     PyTypeObject* const type = &heap->ht_type;
                     type->tp_flags |= Py_TPFLAGS_HAVE_GC;
                     type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
                       Py_VISIT(Py_TYPE(self));
                       const Plan* const plan = plan_of(self);
                       return plan ? plan->traverse(visit, arg) : 0;
                     };
                     type->tp_clear = [](PyObject* self) {
                       if (Plan* const plan = plan_of(self)) plan->clear();
                       return 0;
                     };
                   }))
      .def(py::init<py::list, py::dict, const py::dict&, const py::set&, py::handle, py::handle>())
      .def("watch", &Plan::watch)
      .def("versions", &Plan::versions)
      .def("check", &Plan::check)
      .def("bump_versions", &Plan::bump_versions);
}
