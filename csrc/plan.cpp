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

  bool untouched() const { return version_ != 0 && version_ == version(); }

  bool unchanged() const {
    bool same = true;
    return untouched() || (compare([&](PyObject*, PyObject*) { same = false; }) && same);
  }

  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(dict_.ptr());
    for (const auto& [key, value] : entries_) {
      Py_VISIT(key.ptr());
      Py_VISIT(value.ptr());
    }
    return 0;
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

const at::Tensor& unpack(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("fusedtricks: expected a tensor");
  return THPVariable_Unpack(object.ptr());
}

// A tensor and the place it had. Held as its Python object, which torch.utils.swap_tensors may give another impl; a
// tensor that C++ holds too it would refuse.
struct Placed {
  py::object object;
  at::TensorImpl* impl;  // gone, perhaps, where it is not the object's any more
  const void* data;

  explicit Placed(py::handle t)
      : object(py::reinterpret_borrow<py::object>(t)), impl(unpack(t).unsafeGetTensorImpl()), data(impl->data()) {}

  const at::Tensor& tensor() const { return THPVariable_Unpack(object.ptr()); }

  bool unchanged() const { return tensor().unsafeGetTensorImpl() == impl && impl->data() == data; }
};

// And its shape, in a list of all shapes and strides one after the other.
struct Parameter : Placed {
  caffe2::TypeMeta dtype;
  size_t dims, shape;

  Parameter(py::handle p, std::vector<int64_t>& shapes)
      : Placed(p), dtype(impl->dtype()), dims(impl->dim()), shape(shapes.size()) {
    shapes.insert(shapes.end(), impl->sizes().begin(), impl->sizes().end());
    shapes.insert(shapes.end(), impl->strides().begin(), impl->strides().end());
  }

  bool unchanged(const std::vector<int64_t>& shapes) const {
    if (!Placed::unchanged()) return false;
    const auto sizes = impl->sizes(), strides = impl->strides();
    if (impl->dtype() != dtype || sizes.size() != dims) return false;
    const int64_t* was = shapes.data() + shape;
    return std::equal(sizes.begin(), sizes.end(), was) && std::equal(strides.begin(), strides.end(), was + dims);
  }
};

// A thousand parameters do not fit the caches together with a training step: what is looked at soon is fetched early.
constexpr size_t kAhead = 8;
template <class List>
void fetch_ahead(const List& list, size_t i) {
  if (i + kAhead >= list.size()) return;
  __builtin_prefetch(list[i + kAhead].object.ptr());
  const auto* const impl = reinterpret_cast<const char*>(list[i + kAhead].impl);
  __builtin_prefetch(impl);
  __builtin_prefetch(impl + 64);
  __builtin_prefetch(impl + 128);
}

// Can kernels read this gradient with the strides of its parameter?
bool follows(const at::TensorImpl& grad, const at::TensorImpl& param) {
  if (grad.layout() != at::kStrided || grad.is_python_dispatch()) return false;
  if (grad.is_conj() || grad.is_neg() || grad._is_zerotensor()) return false;
  if (grad.dtype() != param.dtype() || grad.device() != param.device()) return false;
  const auto sizes = grad.sizes(), strides = grad.strides(), wanted = param.strides();
  if (sizes != param.sizes()) return false;
  if (strides == wanted || grad.numel() <= 1) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && strides[d] != wanted[d]) return false;
  }
  return true;
}

int64_t version(const at::TensorImpl* t) { return t->version_counter().current_version(); }

// Is it the same number for as long as it is the same object?
bool fixed(PyObject* value) { return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value); }

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
    for (const auto& r : rows_) versions_.push_back(version(r.impl));
  }

  // Of the parameters, after the last step.
  std::vector<int64_t> versions() const { return versions_; }

  // `changes` are told by the next check too.
  void expect(int changes) { expected_ |= changes; }

  int check(py::handle groups, py::handle state) {
    if (groups.ptr() != groups_.ptr() || state.ptr() != state_.dict()) return kStructure;
    int changes = check_groups() | std::exchange(expected_, kNothing);
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
      if (!rows_[i].unchanged(shapes_)) return kStructure;
      auto* const param = rows_[i].impl;
      if (guarded_ && version(param) != versions_[i]) return kStructure;
      const at::Tensor& grad = std::as_const(*param).grad();
      if (!grad.defined() || !follows(*grad.unsafeGetTensorImpl(), *param)) return kStructure;
      const auto at = reinterpret_cast<int64_t>(grad.const_data_ptr());
      int64_t& entry = table[i * kColumns + kGrad];
      if (entry != at) entry = at, changes |= kPointers;
    }
    return changes;
  }

  // Autograd must learn that the parameters (and, unscaled, the gradients) were written to.
  void bump_versions(bool gradients) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      auto* const param = rows_[i].impl;
      param->bump_version();
      if (gradients && !param->grad().is_inference()) param->grad().unsafeGetTensorImpl()->bump_version();
      versions_[i] = version(param);
    }
  }

  // For the cycle collector: a parameter, a group or a state may lead back to the optimizer that has this plan.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(groups_.ptr());
    if (const int stop = state_.traverse(visit, arg)) return stop;
    for (const auto* dicts : {&snapshots_, &row_states_}) {
      for (const auto& dict : *dicts) {
        if (const int stop = dict.traverse(visit, arg)) return stop;
      }
    }
    for (const auto& list : lists_) Py_VISIT(list.ptr());
    for (const auto& list : params_) {
      for (const auto& p : list) Py_VISIT(p.ptr());
    }
    for (const auto& row : rows_) Py_VISIT(row.object.ptr());
    for (const auto& other : others_) Py_VISIT(other.object.ptr());
    for (const auto& p : absent_) Py_VISIT(p.ptr());
    return 0;
  }

  // Whoever is called while objects go finds an empty plan, to which everything is a change.
  void clear() { const Plan gone = std::move(*this); }

 private:
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

  int read_hypers(size_t g) {
    int changes = kNothing;
    mutable_[g] = false;
    auto* const row = hyper_.mutable_data_ptr<double>() + g * kHyper;
    for (const auto& [key, columns] : live_) {
      PyObject* const value = PyDict_GetItemString(snapshots_[g].dict(), key.c_str());
      if (!value) continue;
      const bool structural = structural_.count(key);
      for (const auto& [index, column] : columns) {
        py::object part = py::reinterpret_borrow<py::object>(value);
        if (index >= 0) part = part[py::int_(index)];
        bool stays = fixed(part.ptr()), there = false;
        double number;
        if (THPVariable_Check(part.ptr())) {
          const at::Tensor& value = THPVariable_Unpack(part.ptr());
          stays = there = remote_.defined() && value.device() == remote_.device();
          number = there ? std::numeric_limits<double>::quiet_NaN() : value.item<double>();
        } else {
          number = PyFloat_AsDouble(part.ptr());
          if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
        }
        if (!stays || (index >= 0 && !PyTuple_CheckExact(value))) mutable_[g] = true;
        if (row[column] == number) continue;
        row[column] = number;
        changes |= structural && !there ? kStructure : kHypers;
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
  int expected_ = kNothing;
  bool guarded_ = false;
};

// The plan in `object`, or null while it is being made.
Plan* plan_in(PyObject* object) {
  auto place = reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder();
  return place.holder_constructed() ? static_cast<Plan*>(place.value_ptr()) : nullptr;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Plan* const plan = plan_in(self);
  return plan ? plan->traverse(visit, arg) : 0;
}

int clear(PyObject* self) {
  if (Plan* const plan = plan_in(self)) plan->clear();
  return 0;
}

void collected(PyHeapTypeObject* type) {
  type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->ht_type.tp_traverse = traverse;
  type->ht_type.tp_clear = clear;
}

}  // namespace
}  // namespace fusedtricks

PYBIND11_MODULE(_plan, m) {
  using fusedtricks::Plan;
  namespace py = pybind11;
  m.attr("torch") = TORCH_VERSION;
  m.attr("STRUCTURE") = static_cast<int>(fusedtricks::kStructure);
  m.attr("POINTERS") = static_cast<int>(fusedtricks::kPointers);
  m.attr("HYPERS") = static_cast<int>(fusedtricks::kHypers);
  py::class_<Plan>(m, "Plan", py::custom_type_setup(fusedtricks::collected))
      .def(py::init<py::list, py::dict, const py::dict&, const py::set&, py::handle, py::handle>())
      .def("watch", &Plan::watch)
      .def("versions", &Plan::versions)
      .def("expect", &Plan::expect)
      .def("check", &Plan::check)
      .def("bump_versions", &Plan::bump_versions);
}
