// Runs CUDA sources on the CPU, for tests: g++ -std=c++17 -include cuda_on_cpu.h -x c++ kernels.cu
//
// Blocks run one after the other. The threads of a block are fibers with a stack each. One fiber runs at a time, until
// it waits for other threads or has finished. The caller chooses the order of threads and blocks (run_in_order). A
// kernel whose result depends on the order has a race, or adds floats in no fixed order.
//
// The emulation is stricter than the hardware. A thread that waits must be joined, at the same line of the source, by
// all the threads that it waits for: the whole block for __syncthreads, the lanes of the mask for an operation of a
// warp. A thread that has exited cannot join (on a GPU, __syncthreads goes on without it). If no thread can continue,
// the process prints where each thread waits, and aborts.
//
// Shared memory is thread-local memory of the only thread of the process. When a block begins, all its bytes are 0xFF,
// which is NaN. Dynamic shared memory has one name: extern __shared__ unsigned char dynamic_shared[], declared outside
// of namespaces.
//
// It has the parts of CUDA that the kernels use so far. Add others here when a kernel needs them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "scheduler.h"

// The last parameters of a function: the place that it is called from.
#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_for_block({"__syncthreads", file, line, 0}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
  cuda_on_cpu::wait_for_warp({"__syncwarp", file, line, mask}, 0, 0);
}

// Shuffles within groups of `width` lanes. A lane whose source is outside of its group gets its own value.
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

// Atomics. Plain operations suffice, because threads switch only where they wait.
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
