// The Python module fusedtricks._C: which kernels were built, which run on this machine, and their registration.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "large_pages.h"
#include "torch_api.h"

namespace fusedtricks {
namespace {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> list;
  return list;
}

bool runs_here(const std::string& backend) {
#if defined(__x86_64__)
  if (backend == "cpu:avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (backend == "cpu:avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
  }
#endif
  return true;
}

struct Entry {
  std::string op, backend;
  bool runs_here;
};

std::vector<Entry> list_kernels() {
  std::vector<Entry> entries;
  for (const Kernel& k : kernels()) entries.push_back({k.op, k.backend, runs_here(k.backend)});
  return entries;
}

// Register kernel `index` at its device's key of the operator of the same name in `ns`.
void register_kernel(size_t index, const std::string& ns) {
  const Kernel& kernel = kernels().at(index);
  const char* key = std::string(kernel.backend) == "cuda" ? "CUDA" : "CPU";
  using torch::stable::detail::StableLibrary;
  // Never freed: a registration outlives the interpreter.
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, (new std::string(ns))->c_str(), key, __FILE__, __LINE__);
  library->impl(kernel.op, kernel.call);
}

}  // namespace

bool enter_kernel(Kernel kernel) {
  kernels().push_back(kernel);
  return true;
}

}  // namespace fusedtricks

PYBIND11_MODULE(_C, m) {
  using namespace fusedtricks;
  namespace py = pybind11;
  py::class_<Entry>(m, "Kernel")
      .def_readonly("op", &Entry::op)
      .def_readonly("backend", &Entry::backend)
      .def_readonly("runs_here", &Entry::runs_here);
  m.def("kernels", &list_kernels, "Every compiled kernel, worst instruction set first.");
  m.def("register", &register_kernel, py::arg("index"), py::arg("namespace"));
  m.def(
      "advise_large_pages",
      [](uintptr_t address, int64_t bytes) { advise_large_pages(reinterpret_cast<const void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"),
      "Large pages are welcome for memory that is yet to be written: see csrc/large_pages.h.");
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = FT_CUDA_ARCHS;
}
