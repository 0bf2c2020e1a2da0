// What CUDA kernels share: vectors of 16 bytes, and sums over a warp and a block in a fixed order.
#pragma once

#include <cstdint>

namespace fastperc {

constexpr int warp = 32;
constexpr int vector_bytes = 16;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// a / b, neither of them negative. A 64-bit division takes long.
__device__ inline std::int64_t divided(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  return a / b;
}

template <typename T, int size>
struct alignas(sizeof(T) * size) Vector {
  T at[size];
};
template <int size, typename T>
__device__ Vector<T, size> load(const T* ptr) {
  return *reinterpret_cast<const Vector<T, size>*>(ptr);
}
template <int size, typename T>
__device__ void store(T* ptr, const Vector<T, size>& vector) {
  *reinterpret_cast<Vector<T, size>*>(ptr) = vector;
}

// The sum of `value` over the warp, in its first lane, and over the block, in every thread. The order is fixed.
template <typename A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int offset = warp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}
template <int threads, typename A>
__device__ A block_sum(A value) {
  __shared__ A warp_sums[threads / warp];
  const int lane = threadIdx.x % warp;
  value = warp_sum(value);
  __syncthreads();  // the threads have read the sums of an earlier call
  if (lane == 0) warp_sums[threadIdx.x / warp] = value;
  __syncthreads();
  return __shfl_sync(0xffffffffu, warp_sum(lane < threads / warp ? warp_sums[lane] : A(0)), 0);
}

}  // namespace fastperc
