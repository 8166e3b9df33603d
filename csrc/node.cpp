// The Python module fusedtricks._node: an operator and its backward as one autograd node. A small call spends more time
// in Python than in the kernels, twice: in `torch.autograd.Function` and in `torch.ops`. Here a call is parsed, goes
// through the dispatcher and is recorded without either. See fusedtricks/_pair.py for what a pair is.
//
// Like plan.cpp this needs torch's own headers, and is a library of its own so that another torch than the one it was
// built for loses this and nothing else: the Python Functions then serve.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable_info.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/version.h>

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fusedtricks {
namespace {

namespace py = pybind11;
namespace autograd = torch::autograd;
using at::Tensor;
using autograd::variable_list;
using c10::IValue;
using torch::jit::Stack;

// Is one back end forced? Then Python decides what runs.
std::atomic<bool> forced{false};

enum class Kind : uint8_t { kTensor, kInt, kFloat, kBool, kDtype };

struct Parameter {
  Kind kind;
  bool optional;
};

// Where an argument of the backward operator comes from; numbers as fusedtricks/_pair.py has them.
enum class From : int { kGradient, kSaved, kNumber, kConstant, kNeed };

struct Source {
  From from;
  int index;        // of the result, the saved tensor, the number, or the differentiable argument
  bool optional;    // a gradient: may it be left out?
  bool contiguous;  // a gradient: must it be?
  IValue constant;
};

// Lives as long as the process: nodes point to it.
struct Pair {
  std::string name;
  c10::OperatorHandle forward, backward;
  std::vector<Parameter> parameters;        // of forward
  size_t results = 0;                       // of forward
  std::vector<int> written;                 // parameters that forward writes to
  int seed = 0;                             // parameter for which True stands for a new one; 0: none
  size_t returned = 0;                      // results that are returned, and differentiable
  std::vector<int> differentiable;          // parameters
  std::vector<int> gradients;               // for each of them the result of backward, or -1: the gradient itself
  std::vector<int> laid_out;                // of them, those whose gradient is laid out as they were
  std::vector<std::pair<bool, int>> saved;  // (is it a result?, index), index -1: nothing
  std::vector<int> numbers;                 // parameters that are no tensors
  std::vector<Source> sources;              // of backward's arguments
  PyObject* slow = nullptr;                 // gradients in Python
  bool partial = false;                     // may some gradients of results be undefined?
  PyMethodDef method{};

  bool is_returned(int result) const { return static_cast<size_t>(result) < returned; }
};

using Needs = c10::SmallVector<bool, 8>;

// Strides of the differentiable arguments that `laid_out` names, one list after the other.
using Strides = std::vector<int64_t>;

bool has_strides(const Tensor& t, at::IntArrayRef strides) {
  const auto sizes = t.sym_sizes(), has = t.sym_strides();
  for (size_t d = 0; d < strides.size(); ++d) {
    if (has[d] != strides[d] && sizes[d] != 1) return false;
  }
  return true;
}

Tensor with_strides(const Tensor& t, at::IntArrayRef strides) {
  if (has_strides(t, strides)) return t;
  return t.new_empty_strided_symint(t.sym_sizes(), c10::fromIntArrayRefSlow(strides)).copy_(t);  // under vmap as well
}

// The gradients of the differentiable arguments, from the backward operator. `grads`: defined where they have to be.
variable_list run_backward(const Pair& pair, const variable_list& grads, const variable_list& saved,
                           at::ArrayRef<IValue> numbers, at::IntArrayRef strides, const Needs& needs) {
  bool any = false;
  for (size_t e = 0; e < needs.size(); ++e) any = any || (needs[e] && pair.gradients[e] >= 0);
  Stack stack;
  if (any) {
    stack.reserve(pair.sources.size());
    for (const Source& source : pair.sources) {
      switch (source.from) {
        case From::kGradient: {
          const Tensor& grad = grads[source.index];
          if (!grad.defined()) {
            stack.emplace_back();
          } else {
            stack.emplace_back(source.contiguous ? grad.contiguous() : grad);
          }
          break;
        }
        case From::kSaved:
          if (saved[source.index].defined()) {
            stack.emplace_back(saved[source.index]);
          } else {
            stack.emplace_back();
          }
          break;
        case From::kNumber:
          stack.push_back(numbers[source.index]);
          break;
        case From::kConstant:
          stack.push_back(source.constant);
          break;
        case From::kNeed:
          stack.emplace_back(needs[source.index] && pair.gradients[source.index] >= 0);
          break;
      }
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    pair.backward.callBoxed(&stack);
  }
  variable_list found(needs.size());
  for (size_t e = 0; e < needs.size(); ++e) {
    if (!needs[e]) continue;
    found[e] = pair.gradients[e] < 0 ? grads[0] : std::move(stack[pair.gradients[e]]).toTensor();
  }
  for (size_t i = 0; i < pair.laid_out.size(); ++i) {
    const size_t e = pair.laid_out[i], dims = strides.size() / pair.laid_out.size();
    if (needs[e]) found[e] = with_strides(found[e], strides.slice(i * dims, dims));
  }
  return found;
}

py::object wrapped(const Tensor& t) {
  return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
}

template <class List>
py::tuple wrapped_all(const List& list) {
  py::tuple result(list.size());
  for (size_t i = 0; i < list.size(); ++i) result[i] = wrapped(list[i]);
  return result;
}

py::object to_python(const IValue& value) {
  if (value.isNone()) return py::none();
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isInt()) return py::int_(value.toInt());
  return py::float_(value.toDouble());
}

// The same by the Function in Python, which is differentiable and knows of forced back ends.
variable_list run_in_python(const Pair& pair, const variable_list& grads, const variable_list& saved,
                            at::ArrayRef<IValue> numbers, at::IntArrayRef strides, const Needs& needs) {
  const py::gil_scoped_acquire gil;
  try {
    py::tuple need(needs.size()), values(numbers.size()), lists(pair.laid_out.size());
    for (size_t e = 0; e < needs.size(); ++e) need[e] = py::bool_(needs[e]);
    for (size_t i = 0; i < numbers.size(); ++i) values[i] = to_python(numbers[i]);
    const size_t dims = lists.empty() ? 0 : strides.size() / lists.size();
    for (size_t i = 0; i < lists.size(); ++i) {
      py::tuple list(dims);
      for (size_t d = 0; d < dims; ++d) list[d] = py::int_(strides[i * dims + d]);
      lists[i] = list;
    }
    const py::object slow = py::reinterpret_borrow<py::object>(pair.slow);
    const py::tuple result = slow(wrapped_all(grads), wrapped_all(saved), values, lists, need);
    variable_list found(needs.size());
    for (size_t e = 0; e < needs.size(); ++e) {
      const py::object grad = result[e];
      if (needs[e] && !grad.is_none()) found[e] = THPVariable_Unpack(grad.ptr());
    }
    return found;
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;
    error.persist();
    throw error;
  }
}

class PairNode final : public autograd::Node {
 public:
  PairNode(const Pair& pair, autograd::edge_list&& edges) : Node(std::move(edges)), pair_(pair) {}

  std::string name() const override { return pair_.name; }

  // After the results have their history.
  void save(const Stack& arguments, const Stack& results) {
    numbers_.reserve(pair_.numbers.size());
    for (const int i : pair_.numbers) numbers_.push_back(arguments[i]);
    saved_.reserve(pair_.saved.size());
    for (const auto& [is_result, i] : pair_.saved) {
      const IValue* value = i < 0 ? nullptr : &(is_result ? results : arguments)[i];
      if (value == nullptr || value->isNone()) {
        saved_.emplace_back();
      } else {
        saved_.emplace_back(value->toTensor(), is_result && pair_.is_returned(i));
      }
    }
    for (const int e : pair_.laid_out) {
      // Those of empty_like.
      const Tensor& t = arguments[pair_.differentiable[e]].toTensor();
      if (t.is_non_overlapping_and_dense()) {
        strides_.insert(strides_.end(), t.strides().begin(), t.strides().end());
      } else {
        const auto dense = at::infer_dense_strides(t.sizes(), t.strides());
        strides_.insert(strides_.end(), dense.begin(), dense.end());
      }
    }
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    for (auto& s : saved_) s.reset_data();
  }

  // ---- compiled autograd --------------------------------------------------------------------------------------------

  // Everything but tensors is part of the key.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(&pair_)));
    args.collect(released_);
    for (size_t i = 0; i < saved_.size(); ++i) args.collect(saved_[i], saved_is_output(i));
    for (const IValue& number : numbers_) args.collect(number, /*nested=*/true);
    for (const int64_t stride : strides_) args.collect(stride);
    for (size_t e = 0; e < num_outputs(); ++e) args.collect(should_compute_output(e));
    for (uint32_t i = 0; i < num_inputs(); ++i) {
      const auto sizes = input_metadata(i).shape_as_dim_vector();
      for (const auto& size : sizes) args.collect(size.guard_int(__FILE__, __LINE__));
    }
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using torch::dynamo::autograd::IValuePacker;
    using Metadata = std::vector<std::optional<autograd::InputMetadata>>;
    using Infos = std::vector<autograd::VariableInfo>;
    TORCH_CHECK(!released_, autograd::ERR_BACKWARD_TWICE);
    swap.before(saved_);
    const Needs needs = needed();
    Infos results;
    for (uint32_t i = 0; i < num_inputs(); ++i) {
      autograd::VariableInfo& info = results.emplace_back();
      const auto& metadata = input_metadata(i);
      info.layout = metadata.layout();
      info.device = metadata.device();
      info.scalar_type = c10::typeMetaToScalarType(metadata.dtype());
      info.size.assign(metadata.shape_as_dim_vector().begin(), metadata.shape_as_dim_vector().end());
    }
    std::vector<IValue> packed;
    for (const Tensor& t : unpacked()) packed.emplace_back(t.defined() ? IValue(t) : IValue());
    packed.push_back(IValuePacker<Infos>::pack(results));
    std::vector<at::TypePtr> types;
    for (const IValue& value : packed) {
      types.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    // What is left is constant for this key.
    const auto run = [&pair = pair_, numbers = numbers_, strides = strides_, needs](const variable_list& given,
                                                                                    const std::vector<IValue>& args) {
      variable_list saved;
      for (size_t i = 0; i + 1 < args.size(); ++i) saved.push_back(args[i].isNone() ? Tensor() : args[i].toTensor());
      const auto results = IValuePacker<Infos>::unpack(args.back());
      variable_list grads = given;
      at::OptionalDeviceGuard device;
      if (!materialize(pair, grads, [&](size_t i) { return results[i].zeros(device); })) {
        return variable_list(needs.size());
      }
      return run_backward(pair, grads, saved, numbers, strides, needs);
    };
    const auto& python = torch::dynamo::autograd::getPyCompilerInterface();
    const auto bound = python->bind_function(swap.get_py_compiler(), pair_.name, run, types, true, true);
    const auto outputs = IValuePacker<Metadata>::pack(torch::dynamo::autograd::get_input_metadata(next_edges()));
    auto found = python->call_function(swap.get_py_compiler(), "apply_functional", bound, grads, packed, outputs);
    swap.after(saved_);
    return found;
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    variable_list saved;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK(!released_, autograd::ERR_BACKWARD_TWICE);
      saved = unpacked();
    }
    if (!materialize(pair_, grads, [&](size_t i) { return input_metadata(i).zeros_like(); })) {
      return variable_list(num_outputs());
    }
    const bool in_python = forced.load(std::memory_order_relaxed) || at::GradMode::is_enabled();
    return (in_python ? run_in_python : run_backward)(pair_, grads, saved, numbers_, strides_, needed());
  }

 private:
  bool saved_is_output(size_t i) const {
    return pair_.saved[i].first && pair_.saved[i].second >= 0 && pair_.is_returned(pair_.saved[i].second);
  }

  Needs needed() const {
    Needs needs(num_outputs());
    for (size_t e = 0; e < needs.size(); ++e) needs[e] = should_compute_output(e);
    return needs;
  }

  variable_list unpacked() {
    variable_list list(saved_.size());
    for (size_t i = 0; i < saved_.size(); ++i) {
      list[i] = saved_is_output(i) ? saved_[i].unpack(getptr()) : saved_[i].unpack();
    }
    return list;
  }

  // Zeros for the undefined gradients that backward cannot do without. False: nothing is there to go back from.
  template <class Zeros>
  static bool materialize(const Pair& pair, variable_list& grads, const Zeros& zeros) {
    bool some = !pair.partial;
    for (const Tensor& grad : grads) some = some || grad.defined();
    if (!some) return false;
    for (const Source& s : pair.sources) {
      if (s.from == From::kGradient && !s.optional && !grads[s.index].defined()) grads[s.index] = zeros(s.index);
    }
    return true;
  }

  const Pair& pair_;
  std::vector<autograd::SavedVariable> saved_;
  std::vector<IValue> numbers_;
  Strides strides_;
  bool released_ = false;
};

// torch holds its nodes by one pointer or, before 2.13, by the other.
template <class Pointer>
Pointer make_node(const Pair& pair, autograd::edge_list&& edges) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<autograd::Node>>) {
    // A long graph is taken apart without recursion.
    return Pointer(new PairNode(pair, std::move(edges)), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<PairNode>(pair, std::move(edges));
  }
}

// Is there nothing about this thread that the Functions in Python handle and this does not?
bool ordinary() {
  return !forced.load(std::memory_order_relaxed) && !at::impl::torch_function_mode_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

// False: an argument this does not take, such as a subclass of Tensor.
bool parse(const Parameter& parameter, PyObject* object, Stack& stack) {
  if (object == Py_None) {
    stack.emplace_back();
    return parameter.optional;
  }
  switch (parameter.kind) {
    case Kind::kTensor:
      if (!THPVariable_CheckExact(object)) return false;
      stack.emplace_back(THPVariable_Unpack(object));
      return true;
    case Kind::kInt: {
      if (!PyLong_CheckExact(object)) return false;
      int overflow = 0;
      stack.emplace_back(static_cast<int64_t>(PyLong_AsLongLongAndOverflow(object, &overflow)));
      return overflow == 0;
    }
    case Kind::kFloat:
      if (!PyFloat_Check(object) && !PyLong_CheckExact(object)) return false;
      stack.emplace_back(PyFloat_AsDouble(object));
      return !PyErr_Occurred();
    case Kind::kBool:
      if (!PyBool_Check(object)) return false;
      stack.emplace_back(object == Py_True);
      return true;
    case Kind::kDtype:
      if (!THPDtype_Check(object)) return false;
      stack.emplace_back(static_cast<int64_t>(reinterpret_cast<THPDtype*>(object)->scalar_type));
      return true;
  }
  return false;
}

// As new_seed in fusedtricks/ops/_philox.py. A tensor that Python has seen costs more to keep and to let go of.
Tensor new_seed(c10::Device device) {
  constexpr auto kMax = std::numeric_limits<int64_t>::max();
  return at::randint(-kMax - 1, kMax, {1}, at::TensorOptions().dtype(at::kLong).device(device));
}

// The results, recorded where a gradient is wanted; None where the Functions in Python must be asked.
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& pair = *static_cast<const Pair*>(PyCapsule_GetPointer(self, nullptr));
  TORCH_CHECK_TYPE(static_cast<size_t>(count) == pair.parameters.size(), pair.name, ": expected ",
                   pair.parameters.size(), " arguments, got ", count);
  if (!ordinary()) Py_RETURN_NONE;
  Stack arguments;
  arguments.reserve(count);
  const bool draw = pair.seed > 0 && args[pair.seed] == Py_True;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (draw && i == pair.seed) {
      arguments.emplace_back();
    } else if (!parse(pair.parameters[i], args[i], arguments)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  bool record = false;
  if (at::GradMode::is_enabled()) {
    for (const int i : pair.differentiable) {
      record = record || (arguments[i].isTensor() && arguments[i].toTensor().requires_grad());
    }
  }
  Stack results;
  {
    const py::gil_scoped_release no_gil;
    if (draw) arguments[pair.seed] = new_seed(arguments[0].toTensor().device());
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = arguments;
    pair.forward.callBoxed(&results);
  }
  for (const int i : pair.written) {
    if (arguments[i].isTensor()) arguments[i].toTensor().unsafeGetTensorImpl()->bump_version();
  }
  if (record) {
    using Pointer = decltype(autograd::Edge::function);
    autograd::edge_list edges;
    edges.reserve(pair.differentiable.size());
    for (const int i : pair.differentiable) {
      const bool wanted = arguments[i].isTensor() && arguments[i].toTensor().requires_grad();
      edges.push_back(wanted ? autograd::impl::gradient_edge(arguments[i].toTensor()) : autograd::Edge());
    }
    const auto node = make_node<Pointer>(pair, std::move(edges));
    for (size_t i = 0; i < pair.returned; ++i) autograd::set_history(results[i].toTensor(), node);
    static_cast<PairNode*>(node.get())->save(arguments, results);
  }
  if (pair.returned == 1) return THPVariable_Wrap(results[0].toTensor());
  py::tuple all(pair.returned);
  for (size_t i = 0; i < pair.returned; ++i) all[i] = wrapped(results[i].toTensor());
  return all.release().ptr();
  END_HANDLE_TH_ERRORS
}

Parameter parameter_of(const c10::Argument& argument) {
  auto type = argument.real_type();
  const bool optional = type->kind() == c10::TypeKind::OptionalType;
  if (optional) type = type->castRaw<c10::OptionalType>()->getElementType();
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      return {Kind::kTensor, optional};
    case c10::TypeKind::IntType:
      return {Kind::kInt, optional};
    case c10::TypeKind::FloatType:
      return {Kind::kFloat, optional};
    case c10::TypeKind::BoolType:
      return {Kind::kBool, optional};
    case c10::TypeKind::ScalarTypeType:
      return {Kind::kDtype, optional};
    default:
      throw py::type_error("fusedtricks: " + argument.name() + " is of a type that a node does not take");
  }
}

IValue constant_of(const py::object& value) {
  if (value.is_none()) return {};
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::int_>(value)) return value.cast<int64_t>();
  return value.cast<double>();
}

// A callable that takes what `forward` takes. `sources`: (from, index or constant, is contiguous) of each argument of
// `backward`; the rest as Pair has it.
py::object make(const std::string& name, const std::string& forward, const std::string& backward, size_t returned,
                std::vector<int> differentiable, std::vector<int> gradients, std::vector<int> laid_out,
                std::vector<std::pair<bool, int>> saved, std::vector<int> numbers, const py::list& sources,
                const py::object& slow) {
  const auto find = [](const std::string& op) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), "");
  };
  auto* pair = new Pair{name, find(forward), find(backward)};
  const auto& arguments = pair->forward.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    pair->parameters.push_back(parameter_of(arguments[i]));
    if (arguments[i].name() == "seed") pair->seed = static_cast<int>(i);
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) pair->written.push_back(static_cast<int>(i));
  }
  pair->results = pair->forward.schema().returns().size();
  pair->returned = returned;
  pair->differentiable = std::move(differentiable);
  pair->gradients = std::move(gradients);
  pair->laid_out = std::move(laid_out);
  pair->saved = std::move(saved);
  pair->numbers = std::move(numbers);
  const auto& taken = pair->backward.schema().arguments();
  for (size_t i = 0; i < taken.size(); ++i) {
    const py::tuple source = sources[i];
    const auto from = static_cast<From>(source[0].cast<int>());
    const bool optional = parameter_of(taken[i]).optional;
    const bool constant = from == From::kConstant;
    pair->sources.push_back({from, constant ? 0 : source[1].cast<int>(), optional, source[2].cast<bool>(),
                             constant ? constant_of(source[1]) : IValue()});
    pair->partial = pair->partial || (from == From::kGradient && optional);
  }
  pair->slow = py::object(slow).release().ptr();
  pair->method.ml_name = pair->name.c_str();
  pair->method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call));
  pair->method.ml_flags = METH_FASTCALL;
  const auto self = py::reinterpret_steal<py::object>(PyCapsule_New(pair, nullptr, nullptr));
  return py::reinterpret_steal<py::object>(PyCFunction_New(&pair->method, self.ptr()));
}

}  // namespace
}  // namespace fusedtricks

PYBIND11_MODULE(_node, m) {
  m.attr("torch") = TORCH_VERSION;
  m.def("make", &fusedtricks::make);
  m.def("force", [](bool value) { fusedtricks::forced.store(value); });
}
