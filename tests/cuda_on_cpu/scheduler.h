// Runs the threads of a block as fibers, one at a time, and makes them wait for each other: see cuda_on_cpu.h.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "fibers.h"
#include "types.h"

namespace cuda_on_cpu {

constexpr int warp_size = 32, block_limit = 1024;

// Where a thread waits. Two threads wait for the same operation if they wait at the same place in the source.
struct Site {
  const char* operation;
  const char* file;
  int line;
  unsigned mask;                              // of the lanes; 0 for the whole block
  bool operator==(const Site& other) const {  // equal literals of one source have one address
    return operation == other.operation && file == other.file && line == other.line && mask == other.mask;
  }
};

struct Fiber {
  Context context;
  char* stack;
  dim3 index;
  enum { ready, waiting, done } state;
  Site site;
  // For operations of a warp: the value that it gives, the value that it receives, and the lane that this comes from.
  std::uint64_t given, received;
  int source;
  unsigned votes;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block so far; kept for the next block
  int threads = 0;
  Fiber* running = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::function<void()> kernel;

  unsigned order = 0;
  std::mt19937 random;
  std::vector<int> by_rank, rank_of;            // of the threads that are ready, the one with the lowest rank runs
  std::uint64_t ready_ranks[block_limit / 64];  // one bit for each rank
  int at_barrier = 0;
};
inline Machine machine;

// Sets the order in which threads and blocks run: first to last for 0, last to first for 1. Any other number is the
// seed of a random order. The order of threads is drawn again after each __syncthreads.
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
// The main function of a fiber: it runs a thread of one block after another.
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
  const std::size_t guard = 4096 * 16;  // inaccessible, so that a stack overflow is caught
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
inline void make_all_ready() {
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
    if (thread == machine.threads) make_all_ready();
  }
  switch_to_scheduler(self);
}

// Waits for all lanes of the mask. Each lane then receives the value that lane `source` gave, and a vote for each lane
// that gave a value other than 0. If `source` is not in the mask, which is undefined on a GPU, all bits are set.
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

// Fails because no thread can continue. The message says where each thread waits, with threads at the same place in one
// line.
[[noreturn]] inline void fail_diverged() {
  const auto place_of = [](const Fiber& fiber) {
    if (fiber.state == Fiber::done) return std::string("exited");
    char mask[40] = "";
    if (fiber.site.mask) std::snprintf(mask, sizeof mask, " with the lanes of 0x%08x", fiber.site.mask);
    const std::string file = fiber.site.file;
    return std::string("wait at ") + fiber.site.operation + " (" + file.substr(file.rfind('/') + 1) + ":" +
           std::to_string(fiber.site.line) + ")" + mask;
  };
  std::string message = "divergence in block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
                        std::to_string(blockIdx.z) + ": no thread can continue";
  for (int begin = 0, end; begin < machine.threads; begin = end) {
    const std::string place = place_of(*machine.fibers[begin]);
    for (end = begin + 1; end < machine.threads && place_of(*machine.fibers[end]) == place;) ++end;
    message += "\n  threads " + std::to_string(begin) + " to " + std::to_string(end - 1) + ": " + place;
  }
  fail(message);
}

// Running

// Sets all shared memory to NaN. Static shared memory is in the thread-local memory of the module that contains
// dynamic_shared.
inline void poison_shared_memory(std::size_t dynamic_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(dynamic_shared, dynamic_shared_limit);
#endif
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void*) {
        char* begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          const char* shared = reinterpret_cast<char*>(dynamic_shared);
          if (segment.p_type == PT_TLS && begin <= shared && shared < begin + segment.p_memsz) {
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
  make_all_ready();
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

// The bits of a value that lanes exchange.
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
  using type = T;  // for parameters that take no part in deduction
};
template <typename T>
using same_t = typename same<T>::type;

}  // namespace cuda_on_cpu
