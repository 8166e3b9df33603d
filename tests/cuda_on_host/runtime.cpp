// The scheduler of cuda_runtime.h beside this, the memory that it watches, and the way into Python.
//
// What it finds: a thread that reads shared memory nobody wrote (it is NaN at the start of a block), results that
// depend on the order in which threads run between two barriers, a barrier or warp exchange that not all threads reach,
// misaligned accesses, writes next to the launcher's own tensors or to the block's shared memory, launches that are not
// on torch's current stream and device, and more shared memory than the kernel was allowed.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "torch_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FT_ASAN 1
#else
#define FT_ASAN 0
#endif

namespace {

constexpr size_t kMostShared = 256 << 10, kSharedGuard = 1 << 10;
// Of 48 KB what kernels may declare is taken off (kStaticShared): the host does not know what they do declare.
constexpr size_t kSharedWithoutAsking = (48 << 10) - (4 << 10);
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;  // 0xff: NaN in every floating type, -1 in integers

struct {
  int processors = 2, threads = 1024, shared = 227 << 10;
  int order = 0;  // 0: ascending, 1: descending, else the seed of a random one
} device;

char torch_stream;  // not the null stream, on which a launcher runs that does not ask
int guards = 0;

}  // namespace

namespace fusedtricks::cuda {
thread_local __align__(128) unsigned char ft_dynamic_shared[kMostShared + kSharedGuard];
}  // namespace fusedtricks::cuda

namespace cuda_on_host {
namespace {

using fusedtricks::cuda::ft_dynamic_shared;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  State state;
  Site site;
  unsigned mask;
  dim3 index;
  bool started;
  ucontext_t context;
  jmp_buf resume;
  char* stack;
};

struct Warp {
  uint64_t shown[2][kWarp];
  unsigned generation[kWarp];
};

constexpr size_t kStack = FT_ASAN ? 512 << 10 : 64 << 10;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int running = -1;
  ucontext_t scheduler;
  jmp_buf back;
  const std::function<void()>* thread = nullptr;
  std::string error;
};

thread_local Block block;

// A switch saves no signal mask, which makes it a hundred times faster than swapcontext; AddressSanitizer wants the
// latter.
void to_scheduler() {
  Fiber& self = block.fibers[block.running];
#if FT_ASAN
  swapcontext(&self.context, &block.scheduler);
#else
  if (!_setjmp(self.resume)) _longjmp(block.back, 1);
#endif
}

void begin() {
  (*block.thread)();
  block.fibers[block.running].state = State::kDone;
  to_scheduler();
}

void resume(int i) {
  Fiber& fiber = block.fibers[i];
  block.running = i;
  threadIdx = fiber.index;
  auto start = [&] {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
    fiber.started = true;
  };
#if FT_ASAN
  if (!fiber.started) start();
  swapcontext(&block.scheduler, &fiber.context);
#else
  if (_setjmp(block.back)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  start();
  setcontext(&fiber.context);
#endif
}

std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  text << "thread " << fiber.index.x << " of block " << blockIdx.x;
  if (fiber.state == State::kDone) {
    text << " has returned";
  } else {
    text << " waits at " << (fiber.state == State::kAtBarrier ? "a barrier" : "a warp exchange") << " ("
         << fiber.site.file << ":" << fiber.site.line << ")";
  }
  return text.str();
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.site.line == b.site.line && !strcmp(a.site.file, b.site.file);
}

[[noreturn]] void diverged(const Fiber& a, const Fiber& b) {
  throw std::runtime_error("cuda_on_host: divergent synchronisation: " + describe(a) + ", but " + describe(b));
}

std::vector<int> ordered(int count, std::mt19937& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (device.order == 1) std::reverse(order.begin(), order.end());
  if (device.order > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Runs the lanes of a warp as far as they get alone; true if an exchange among them was completed.
bool step_warp(int warp, int threads, std::mt19937& random) {
  const int first = warp * kWarp, lanes = std::min(kWarp, threads - first);
  for (int lane : ordered(lanes, random)) {
    if (block.fibers[first + lane].state == State::kReady) resume(first + lane);
    if (!block.error.empty()) throw std::runtime_error(block.error);
  }
  bool completed = false;
  for (int lane = 0; lane < lanes; ++lane) {
    const Fiber waiting = block.fibers[first + lane];
    if (waiting.state != State::kAtExchange) continue;
    for (int other = 0; other < lanes; ++other) {
      const Fiber& partner = block.fibers[first + other];
      if (waiting.mask >> other & 1 && !same_place(waiting, partner)) diverged(waiting, partner);
    }
    for (int other = 0; other < lanes; ++other) {
      if (waiting.mask >> other & 1) block.fibers[first + other].state = State::kReady;
    }
    completed = true;
  }
  return completed;
}

void run_block(int threads, std::mt19937& random) {
  const int warps = (threads + kWarp - 1) / kWarp;
  for (int i = 0; i < threads; ++i) {
    block.fibers[i].state = State::kReady;
    block.fibers[i].started = false;
    block.fibers[i].index = dim3(i, 0, 0);
  }
  std::memset(block.warps.data(), 0, warps * sizeof(Warp));
  for (;;) {
    for (int warp : ordered(warps, random)) {
      while (step_warp(warp, threads, random)) {
      }
    }
    // A barrier asks for every thread of the block: one that has returned is as far from it as one that waits
    // elsewhere.
    const Fiber* waiting = nullptr;
    for (int i = 0; i < threads; ++i) {
      const Fiber& fiber = block.fibers[i];
      if (fiber.state == State::kDone) continue;
      if (waiting && !same_place(*waiting, fiber)) diverged(*waiting, fiber);
      waiting = &fiber;
    }
    if (!waiting) return;
    if (waiting->state == State::kAtBarrier) {
      for (int i = 0; i < threads; ++i) {
        if (block.fibers[i].state == State::kDone) diverged(*waiting, block.fibers[i]);
        block.fibers[i].state = State::kReady;
      }
    }
  }
}

// ---- guarded tensors ------------------------------------------------------------------------------------------------

constexpr int64_t kGuardElements = 4096;  // before and behind: farther than a block reaches beyond a row

struct Allocation {
  AtenTensorHandle base;
  unsigned char* at;
  size_t guard, bytes;
};
std::vector<Allocation> allocations;

std::set<std::string> launched;
int launches = 0;

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
  int status;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status ? info.dli_sname : readable;
  std::free(readable);
  return name.substr(0, name.find('('));
}

void check_guards(const std::string& when) {
  for (const Allocation& a : allocations) {
    for (size_t side : {size_t{0}, a.guard + a.bytes}) {
      for (size_t i = 0; i < a.guard; ++i) {
        if (a.at[side + i] == kGuard) continue;
        std::ostringstream text;
        text << "cuda_on_host: " << when << ": out-of-bounds write, ";
        if (side) {
          text << i << " bytes past the end";
        } else {
          text << a.guard - i << " bytes before the start";
        }
        text << " of a tensor of " << a.bytes << " bytes";
        throw std::runtime_error(text.str());
      }
    }
  }
}

}  // namespace

void fail(const char* what, const void* address, Site site) {
  std::ostringstream text;
  text << "cuda_on_host: " << what << " at " << address << " (" << site.file << ":" << site.line << ") by thread "
       << threadIdx.x << " of block " << blockIdx.x;
  block.error = text.str();
  to_scheduler();
  std::abort();
}

void block_barrier(Site site) {
  Fiber& self = block.fibers[block.running];
  self.state = State::kAtBarrier;
  self.site = site;
  self.mask = 0;
  to_scheduler();
}

unsigned lane() { return threadIdx.x % kWarp; }

// Two places in turn: when a lane shows its next value, all others have returned from the exchange before the last.
const uint64_t* warp_exchange(unsigned mask, uint64_t shown, Site site) {
  Fiber& self = block.fibers[block.running];
  Warp& warp = block.warps[block.running / kWarp];
  uint64_t* place = warp.shown[warp.generation[lane()]++ % 2];
  place[lane()] = shown;
  self.state = State::kAtExchange;
  self.site = site;
  self.mask = mask;
  to_scheduler();
  return place;
}

void run(const void* kernel, dim3 grid, dim3 threads, size_t shared, const std::function<void()>& thread) {
  const int count = static_cast<int>(threads.x);
  const std::string name = name_of(kernel);
  ++launches;
  launched.insert(name);
  while (static_cast<int>(block.fibers.size()) < count) {
    Fiber fiber{};
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    block.fibers.push_back(fiber);
  }
  block.warps.resize((block.fibers.size() + kWarp - 1) / kWarp);
  block.thread = &thread;
  block.error.clear();
  blockDim = threads;
  gridDim = grid;
  std::mt19937 random(device.order);
  for (int b : ordered(static_cast<int>(grid.x), random)) {
    blockIdx = dim3(b, 0, 0);
    std::memset(ft_dynamic_shared, kPoison, shared);
    std::memset(ft_dynamic_shared + shared, kGuard, kSharedGuard);
#if FT_ASAN
    ASAN_POISON_MEMORY_REGION(ft_dynamic_shared + shared, kMostShared + kSharedGuard - shared);
#endif
    run_block(count, random);
#if FT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(ft_dynamic_shared + shared, kMostShared + kSharedGuard - shared);
#endif
    for (size_t i = 0; i < kSharedGuard; ++i) {
      if (ft_dynamic_shared[shared + i] != kGuard) {
        throw std::runtime_error("cuda_on_host: " + name + ": out-of-bounds write past the " + std::to_string(shared) +
                                 " bytes of shared memory");
      }
    }
  }
  check_guards(name);
}

bool is_current(cudaStream_t stream) { return stream == &torch_stream && guards > 0; }

size_t& allowed_shared(const void* kernel) {
  static std::map<const void*, size_t> allowed;
  return allowed.try_emplace(kernel, kSharedWithoutAsking).first->second;
}

}  // namespace cuda_on_host

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount  ? device.processors
           : which == cudaDevAttrMaxThreadsPerBlock ? device.threads
                                                    : device.shared;
  return cudaSuccess;
}

// ---- in place of torch's own ----------------------------------------------------------------------------------------

#define FT_EXPORT extern "C" __attribute__((visibility("default")))

FT_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &torch_stream;
  return AOTI_TORCH_SUCCESS;
}
FT_EXPORT AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  ++guards;
  return AOTI_TORCH_SUCCESS;
}
FT_EXPORT AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}

FT_EXPORT AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                                  int32_t dtype, int32_t device_type, int32_t device_index,
                                                  AtenTensorHandle* result) {
  using namespace cuda_on_host;
  static const auto torchs =
      reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, "aoti_torch_empty_strided"));
  int64_t last = 0, numel = 1;
  for (int64_t d = 0; d < dims; ++d) {
    last += (sizes[d] - 1) * strides[d];
    numel *= sizes[d];
  }
  if (numel == 0) return torchs(dims, sizes, strides, dtype, device_type, device_index, result);
  const int64_t whole = last + 1 + 2 * kGuardElements, one = 1;
  Allocation a{};
  if (auto error = torchs(1, &whole, &one, dtype, device_type, device_index, &a.base)) return error;
  const size_t element = aoti_torch_dtype_element_size(dtype);
  void* at;
  aoti_torch_get_data_ptr(a.base, &at);
  a.at = static_cast<unsigned char*>(at);
  a.guard = kGuardElements * element;
  a.bytes = (last + 1) * element;
  std::memset(a.at, kGuard, whole * element);
  std::memset(a.at + a.guard, kPoison, a.bytes);
  allocations.push_back(a);
  return aoti_torch__reinterpret_tensor(a.base, dims, sizes, strides, kGuardElements, result);
}

// ---- kernels and Python ---------------------------------------------------------------------------------------------

namespace {
std::vector<fusedtricks::Kernel>& kernels() {
  static std::vector<fusedtricks::Kernel> list;
  return list;
}
}  // namespace

bool fusedtricks::enter_kernel(Kernel kernel) {
  kernels().push_back(kernel);
  return true;
}

FT_EXPORT int ft_kernel_count() { return static_cast<int>(kernels().size()); }
FT_EXPORT const char* ft_kernel_name(int i) { return kernels()[i].op; }

FT_EXPORT void ft_register(const char* ns) {
  using torch::stable::detail::StableLibrary;
  for (const auto& kernel : kernels()) {
    auto* library =
        new StableLibrary(StableLibrary::Kind::IMPL, (new std::string(ns))->c_str(), "CPU", __FILE__, __LINE__);
    library->impl(kernel.op, kernel.call);
  }
}

FT_EXPORT void ft_configure(int processors, int threads, int shared, int order) {
  device = {processors, threads, std::min(shared, static_cast<int>(kMostShared)), order};
}

// How many kernels have been launched so far.
FT_EXPORT int ft_launches() { return cuda_on_host::launches; }

// Bytes loaded and stored so far.
FT_EXPORT int64_t ft_loaded() { return cuda_on_host::loaded; }
FT_EXPORT int64_t ft_stored() { return cuda_on_host::stored; }

// Names of the kernels launched so far, a line each.
FT_EXPORT const char* ft_launched() {
  static std::string text;
  text.clear();
  for (const auto& name : cuda_on_host::launched) text += name + "\n";
  return text.c_str();
}

// Forget the tensors of the last call.
FT_EXPORT void ft_release() {
  for (auto& a : cuda_on_host::allocations) aoti_torch_delete_tensor_object(a.base);
  cuda_on_host::allocations.clear();
}
