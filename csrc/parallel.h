// Splits work over threads, and compiles functions for several instruction sets.
#pragma once

#include <cstdint>

// Compiles a function for several instruction sets. The best one is chosen when the module is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPERC_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPERC_MULTIVERSION
#endif

// Inlines a function into each of those versions, so that it is compiled for their instruction sets too.
#ifdef _MSC_VER
#define FASTPERC_INLINE __forceinline
#define FASTPERC_INLINE_LAMBDA
#else
#define FASTPERC_INLINE inline __attribute__((always_inline))
#define FASTPERC_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace fastperc {

// Calls f(task) for every task in [0, tasks), on at most `threads` threads. Any thread may take any task. Where PyTorch
// uses the same OpenMP runtime, as its Linux wheels do, its threads are used and none is started.
template <typename F>
void parallel_for(std::int64_t tasks, [[maybe_unused]] int threads, F&& f) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks > 1 && threads > 1)
  for (std::int64_t task = 0; task < tasks; ++task) f(task);
}

}  // namespace fastperc
