// Runs CUDA sources on the CPU, for tests: g++ -std=c++17 -include cuda_on_cpu.h -x c++ kernels.cu
//
// Blocks run one after the other. The threads of a block are fibers, each with a stack of its own, of which one runs at
// a time, until it waits for others or is done. Which comes first is the caller's choice (run_in_order): a kernel whose
// result depends on it has a race, or adds floats in no fixed order.
//
// Stricter than the hardware. Whatever waits must be joined by all that it waits for, at the same line of the source:
// a whole block for __syncthreads, the lanes of the mask for a warp's operation. A thread that has exited joins nothing
// (a GPU lets __syncthreads go on without it). If no thread can run on, who waits where is told, and the process aborts.
//
// Shared memory is thread-local memory of the one thread there is: every byte is 0xFF, a NaN, when a block begins. Its
// dynamic part has one name: extern __shared__ unsigned char dynamic_shared[], declared outside of namespaces.
//
// What nvcc has and this lacks is to be added as kernels come to need it.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// Vectors, aligned as on a GPU: UBSan tells of a pointer that is not.
#define CUDA_ON_CPU_VECTORS(type, name)                                                            \
  struct alignas(2 * sizeof(type)) name##2 {                                                       \
    type x, y;                                                                                     \
  };                                                                                               \
  struct alignas(sizeof(type) > 4 ? 16 : 4 * sizeof(type)) name##4 {                               \
    type x, y, z, w;                                                                               \
  };                                                                                               \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr std::int64_t count() const { return std::int64_t(x) * y * z; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr std::size_t dynamic_shared_limit = 227 * 1024;
alignas(16) inline thread_local unsigned char dynamic_shared[dynamic_shared_limit];

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace cuda_on_cpu {

constexpr int warp_size = 32, block_limit = 1024;
constexpr std::size_t stack_size = 256 * 1024;

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::abort();
}

// Stacks, and the way from one to another

#ifdef __x86_64__
using Context = void*;  // the stack pointer, what a call preserves lying above it

// Saves the running context in *from and goes on with `to`.
__attribute__((naked, noinline)) inline void switch_context(Context*, Context) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_size) - 2;  // as if `entry` had just been called
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, const Context& to) { swapcontext(from, &to); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_size;
  makecontext(&context, entry, 0);
}
#endif

// What a thread waits at. The same place in the source is the same operation.
struct Site {
  const char* operation;
  const char* file;
  int line;
  unsigned mask;  // of lanes; none for the whole block
  bool operator==(const Site& other) const {  // equal literals of one source are one
    return operation == other.operation && file == other.file && line == other.line && mask == other.mask;
  }
};

struct Fiber {
  Context context;
  char* stack;
  dim3 index;
  enum { ready, waiting, done } state;
  Site site;
  // What it gives to a warp's operation, the lane it wants to hear from, and what it gets.
  std::uint64_t given, received;
  int source;
  unsigned votes;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // of the largest block so far, kept for the next
  int threads = 0;
  Fiber* running = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::function<void()> kernel;

  unsigned order = 0;
  std::mt19937 random;
  std::vector<int> by_rank, rank_of;            // the first that is ready, by rank, runs
  std::uint64_t ready_ranks[block_limit / 64];  // bits
  int at_barrier = 0;
};
inline Machine machine;

// Threads and blocks run first to last for 0, last to first for 1, and in an order drawn from this seed for any other
// number: that of the threads anew after each __syncthreads.
inline void run_in_order(unsigned number) {
  machine.order = number;
  machine.random.seed(number);
}
inline std::vector<int> draw_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

inline void switch_to_fiber(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, stack_size);
#endif
  switch_context(&machine.scheduler, fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}
inline void switch_to_scheduler(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  switch_context(&fiber.context, machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}
// A fiber plays a thread of one block after another.
inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  for (;;) {
    Fiber& self = *machine.running;
    machine.kernel();
    self.state = Fiber::done;
    switch_to_scheduler(self);
  }
}
inline std::unique_ptr<Fiber> make_fiber() {
  const std::size_t guard = 4096 * 16;  // so that a stack that overflows is told
  void* memory = mmap(nullptr, guard + stack_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for stacks");
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = static_cast<char*>(memory) + guard;
  mprotect(fiber->stack, stack_size, PROT_READ | PROT_WRITE);
  make_context(fiber->context, fiber->stack, fiber_main);
  return fiber;
}

// Waiting

inline void make_ready(int thread) {
  machine.fibers[thread]->state = Fiber::ready;
  const int rank = machine.rank_of[thread];
  machine.ready_ranks[rank / 64] |= std::uint64_t(1) << rank % 64;
}
inline void everybody_ready() {
  machine.by_rank = draw_order(machine.threads);
  machine.rank_of.resize(machine.threads);
  for (int rank = 0; rank < machine.threads; ++rank) machine.rank_of[machine.by_rank[rank]] = rank;
  for (int thread = 0; thread < machine.threads; ++thread) make_ready(thread);
  machine.at_barrier = 0;
}
inline int current_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + std::int64_t(blockDim.y) * threadIdx.z));
}
inline bool waits_at(int thread, const Site& site) {
  return thread < machine.threads && machine.fibers[thread]->state == Fiber::waiting &&
         machine.fibers[thread]->site == site;
}

inline void wait_for_block(const Site& site) {
  Fiber& self = *machine.running;
  self.state = Fiber::waiting;
  self.site = site;
  if (++machine.at_barrier == machine.threads) {
    int thread = 0;
    while (thread < machine.threads && waits_at(thread, site)) ++thread;
    if (thread == machine.threads) everybody_ready();
  }
  switch_to_scheduler(self);
}

// All lanes of the mask meet; each hears what `source` gave (every bit set if that lane is not among them: undefined on
// a GPU), and which lanes gave something other than 0.
inline const Fiber& wait_for_warp(const Site& site, std::uint64_t given, int source) {
  Fiber& self = *machine.running;
  const int first = current_thread() / warp_size * warp_size;
  if (!(site.mask >> current_thread() % warp_size & 1)) fail(std::string(site.operation) + ": a lane not in its mask");
  self.state = Fiber::waiting;
  self.site = site;
  self.given = given;
  self.source = source;
  const auto in_mask = [&](int lane) { return site.mask >> lane & 1; };
  int lane = 0;
  while (lane < warp_size && (!in_mask(lane) || waits_at(first + lane, site))) ++lane;
  if (lane == warp_size) {
    unsigned votes = 0;
    for (int i = 0; i < warp_size; ++i) {
      if (in_mask(i) && machine.fibers[first + i]->given) votes |= 1u << i;
    }
    for (int i = 0; i < warp_size; ++i) {
      if (!in_mask(i)) continue;
      Fiber& other = *machine.fibers[first + i];
      other.received = in_mask(other.source) ? machine.fibers[first + other.source]->given : ~std::uint64_t(0);
      other.votes = votes;
      make_ready(first + i);
    }
  }
  switch_to_scheduler(self);
  return self;
}

// No thread can run on: says where each is, threads at the same place together.
[[noreturn]] inline void fail_diverged() {
  const auto where = [](const Fiber& fiber) {
    if (fiber.state == Fiber::done) return std::string("exited");
    char mask[40] = "";
    if (fiber.site.mask) std::snprintf(mask, sizeof mask, " with the lanes of 0x%08x", fiber.site.mask);
    const std::string file = fiber.site.file;
    return std::string("wait at ") + fiber.site.operation + " (" + file.substr(file.rfind('/') + 1) + ":" +
           std::to_string(fiber.site.line) + ")" + mask;
  };
  std::string message = "divergence in block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
                        std::to_string(blockIdx.z) + ": no thread can run on";
  for (int begin = 0, end; begin < machine.threads; begin = end) {
    const std::string here = where(*machine.fibers[begin]);
    for (end = begin + 1; end < machine.threads && where(*machine.fibers[end]) == here;) ++end;
    message += "\n  threads " + std::to_string(begin) + " to " + std::to_string(end - 1) + ": " + here;
  }
  fail(message);
}

// Running

// All static shared memory is in the thread-local memory of the module that dynamic_shared is in.
inline void poison_shared_memory(std::size_t dynamic_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(dynamic_shared, dynamic_shared_limit);
#endif
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void*) {
        char* begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          const char* mine = reinterpret_cast<char*>(dynamic_shared);
          if (segment.p_type == PT_TLS && begin <= mine && mine < begin + segment.p_memsz) {
            std::memset(begin, 0xff, segment.p_memsz);
            return 1;
          }
        }
        return 0;
      },
      nullptr);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(dynamic_shared + dynamic_bytes, dynamic_shared_limit - dynamic_bytes);
#else
  (void)dynamic_bytes;
#endif
}

inline void run_block() {
  everybody_ready();
  for (int finished = 0; finished < machine.threads;) {
    int word = 0;
    while (word < block_limit / 64 && !machine.ready_ranks[word]) ++word;
    if (word == block_limit / 64) fail_diverged();
    const int thread = machine.by_rank[word * 64 + __builtin_ctzll(machine.ready_ranks[word])];
    machine.ready_ranks[word] &= machine.ready_ranks[word] - 1;
    machine.running = machine.fibers[thread].get();
    threadIdx = machine.running->index;
    switch_to_fiber(*machine.running);
    finished += machine.running->state == Fiber::done;
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, void*, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (grid.count() == 0 || block.count() == 0 || block.count() > block_limit || dynamic_bytes > dynamic_shared_limit) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  machine.kernel = [=] { kernel(arguments...); };
  machine.threads = static_cast<int>(block.count());
  while (static_cast<int>(machine.fibers.size()) < machine.threads) machine.fibers.push_back(make_fiber());
  for (unsigned i = 0; i < block.count(); ++i) {
    machine.fibers[i]->index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
  for (const unsigned number : draw_order(static_cast<int>(grid.count()))) {
    blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    poison_shared_memory(dynamic_bytes);
    run_block();
  }
  return cudaSuccess;
}

// What a lane gives and gets, as bits.
template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "as __shfl_sync takes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T shuffle(const Site& site, T value, int source) {
  const std::uint64_t bits = wait_for_warp(site, to_bits(value), source).received;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() { return current_thread() % warp_size; }

template <typename T>
struct same {
  using type = T;  // of a parameter that does not take part in deduction
};
template <typename T>
using same_t = typename same<T>::type;

}  // namespace cuda_on_cpu

// Where a function was called: its last arguments.
#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_for_block({"__syncthreads", file, line, 0}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
  cuda_on_cpu::wait_for_warp({"__syncwarp", file, line, mask}, 0, 0);
}

// Shuffles: within groups of `width` lanes; a lane that would reach beyond its group hears itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle({"__shfl_sync", file, line, mask}, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle({"__shfl_up_sync", file, line, mask}, value,
                              source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle({"__shfl_down_sync", file, line, mask}, value,
                              source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  return cuda_on_cpu::shuffle({"__shfl_xor_sync", file, line, mask}, value,
                              source > (lane | (width - 1)) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::wait_for_warp({"__ballot_sync", file, line, mask}, predicate != 0, 0).votes;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::wait_for_warp({"__any_sync", file, line, mask}, predicate != 0, 0).votes != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::wait_for_warp({"__all_sync", file, line, mask}, predicate != 0, 0).votes == mask;
}
#undef CUDA_ON_CPU_HERE

// Atomics: threads take turns only where they wait.
template <typename T>
T atomicExch(T* ptr, cuda_on_cpu::same_t<T> value) {
  return std::exchange(*ptr, value);
}
template <typename T>
T atomicAdd(T* ptr, cuda_on_cpu::same_t<T> value) {
  return std::exchange(*ptr, static_cast<T>(*ptr + value));
}
template <typename T>
T atomicMax(T* ptr, cuda_on_cpu::same_t<T> value) {
  return std::exchange(*ptr, std::max(*ptr, value));
}
template <typename T>
T atomicMin(T* ptr, cuda_on_cpu::same_t<T> value) {
  return std::exchange(*ptr, std::min(*ptr, value));
}
template <typename T>
T atomicCAS(T* ptr, cuda_on_cpu::same_t<T> expected, cuda_on_cpu::same_t<T> value) {
  return std::exchange(*ptr, *ptr == expected ? value : *ptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* ptr) {
  return *ptr;
}
template <typename T, typename U>
constexpr std::common_type_t<T, U> min(T a, U b) {
  return std::min<std::common_type_t<T, U>>(a, b);
}
template <typename T, typename U>
constexpr std::common_type_t<T, U> max(T a, U b) {
  return std::max<std::common_type_t<T, U>>(a, b);
}
