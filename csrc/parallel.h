// Splitting work over threads and instruction sets, for kernels that run in tens of microseconds.
#pragma once

#include <cstdint>

// A function compiled once per instruction set, the best chosen when the module is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPERC_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPERC_MULTIVERSION
#endif

// Inlined into each of those versions, so that it is compiled for their instruction sets too.
#ifdef _MSC_VER
#define FASTPERC_INLINE __forceinline
#else
#define FASTPERC_INLINE inline __attribute__((always_inline))
#endif

namespace fastperc {

// f(task) for every task in [0, tasks), on at most `threads` threads; which thread takes a task must not matter. Where
// PyTorch runs on the same OpenMP runtime, as its Linux wheels do, the threads are the ones it keeps awake anyway.
template <typename F>
void parallel_for(std::int64_t tasks, [[maybe_unused]] int threads, F&& f) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks > 1 && threads > 1)
  for (std::int64_t task = 0; task < tasks; ++task) f(task);
}

}  // namespace fastperc
