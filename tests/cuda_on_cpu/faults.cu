// Kernels with the mistakes that cuda_on_cpu.h must find, and kernels without mistakes. The program runs one kernel, by
// its name. sound_kernel compares its own results with those of a GPU.
#include <iostream>

extern __shared__ unsigned char dynamic_shared[];

namespace {

constexpr int threads = 96, warp = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// out[i] = in[threads - 1 - i], through shared memory.
template <bool synchronised>
__global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int values[threads];
  values[threadIdx.x] = in[threadIdx.x];
  if (synchronised) __syncthreads();
  out[threadIdx.x] = values[threads - 1 - threadIdx.x];
}

// A fast warp overwrites what slower warps still have to read.
__global__ void overtake_kernel(const int* in, int* out) {
  __shared__ int value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = in[i];
    __syncthreads();
    out[threadIdx.x] += value;
  }
}

// Lanes exchange values without __syncwarp, as if a warp ran in lockstep.
__global__ void lockstep_kernel(const int* in, int* out) {
  __shared__ int values[threads];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void float_atomics_kernel(const int* in, int* out) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1.0f / static_cast<float>(1 + in[threadIdx.x]));
  __syncthreads();
  std::memcpy(out + threadIdx.x, &sum, sizeof sum);
}

__global__ void stale_shared_kernel(const int*, int* out) {
  __shared__ float values[threads];
  out[threadIdx.x] = values[threadIdx.x] != values[threadIdx.x] && dynamic_shared[threadIdx.x] == 0xff;
  values[threadIdx.x] = 1;
  dynamic_shared[threadIdx.x] = 1;
}

__global__ void other_barrier_kernel(const int*, int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
  }
}

__global__ void early_exit_kernel(const int*, int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_warp_kernel(const int* in, int* out) {
  if (threadIdx.x % warp < 16) out[threadIdx.x] = __shfl_down_sync(all_lanes, in[threadIdx.x], 1);
}

__global__ void not_in_mask_kernel(const int* in, int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], 0);
}

__global__ void out_of_bounds_kernel(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void shared_out_of_bounds_kernel(const int* in, int* out) {
  __shared__ int values[threads];
  values[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = values[0];
}

__global__ void dynamic_out_of_bounds_kernel(const int*, int* out) {
  dynamic_shared[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}

__global__ void misaligned_kernel(const int* in, int* out) {
  out[threadIdx.x] = threadIdx.x == 0 ? reinterpret_cast<const uint4*>(in + 1)->x : 0;
}

// Compares every operation that has a result with plain arithmetic. in[i] = i.
__global__ void sound_kernel(const int* in, int* out) {
  __shared__ int highest, count;
  __shared__ unsigned turn;
  const int thread = in[threadIdx.x], lane = thread % warp, first = thread - lane;
  bool right = threadIdx.y == 0 && blockDim.x == threads && blockIdx.x < gridDim.x;
  const auto expect = [&](bool condition) { right = right && condition; };
  if (thread == 0) highest = count = turn = 0;
  __syncthreads();
  expect(__shfl_sync(all_lanes, thread, 7) == first + 7);
  expect(__shfl_sync(all_lanes, thread, 9, 8) == thread / 8 * 8 + 1);
  expect(__shfl_down_sync(all_lanes, thread, 3) == (lane < 29 ? thread + 3 : thread));
  expect(__shfl_down_sync(all_lanes, thread, 3, 8) == (lane % 8 < 5 ? thread + 3 : thread));
  expect(__shfl_up_sync(all_lanes, thread, 2u) == (lane >= 2 ? thread - 2 : thread));
  expect(__shfl_up_sync(all_lanes, thread, 2u, 16) == (lane % 16 >= 2 ? thread - 2 : thread));
  expect(__shfl_xor_sync(all_lanes, thread + 0.5, 16) == (thread ^ 16) + 0.5);
  expect(__shfl_xor_sync(all_lanes, thread, 4, 4) == (lane % 8 < 4 ? thread : thread - 4));
  expect(__ballot_sync(all_lanes, lane % 3 == 0) == 0x49249249u);
  expect(__any_sync(all_lanes, lane == 31) && !__any_sync(all_lanes, lane == 32));
  expect(__all_sync(all_lanes, lane < 32) && !__all_sync(all_lanes, lane < 31));
  if (lane >= 8) expect(__shfl_down_sync(0xffffff00u, thread, 1) == (lane < 31 ? thread + 1 : thread));
  if (lane < 4) {  // lanes of two masks wait at the same time
    expect(__ballot_sync(0x0000000fu, lane > 1) == 0x0000000cu);
  } else {
    expect(__ballot_sync(0xfffffff0u, 1) == 0xfffffff0u);
  }
  __syncwarp();
  atomicMax(&highest, thread);
  atomicAdd(&count, 1);
  if (thread == 0) {
    expect(atomicCAS(&turn, 0u, 5u) == 0u && atomicCAS(&turn, 0u, 6u) == 5u && atomicExch(&turn, 7u) == 5u);
  }
  __syncthreads();
  expect(highest == threads - 1 && count == threads && turn == 7 && min(thread, 1L) + max(0, thread) >= thread);
  const float4 vector = make_float4(1, 2, 3, __ldg(in + threadIdx.x));
  expect(vector.w == thread && sizeof vector == 16 && alignof(float4) == 16);
  if (blockIdx.x == 0) out[thread] = right;
  if (blockIdx.x == 1 && !right) out[thread] = 0;
}

struct Kernel {
  const char* name;
  void (*kernel)(const int*, int*);
};
constexpr Kernel kernels[] = {
    {"missing-barrier", reverse_kernel<false>},
    {"missing-second-barrier", overtake_kernel},
    {"lockstep", lockstep_kernel},
    {"float-atomics", float_atomics_kernel},
    {"other-barrier", other_barrier_kernel},
    {"early-exit", early_exit_kernel},
    {"half-a-warp", half_warp_kernel},
    {"not-in-mask", not_in_mask_kernel},
    {"out-of-bounds", out_of_bounds_kernel},
    {"shared-out-of-bounds", shared_out_of_bounds_kernel},
    {"dynamic-out-of-bounds", dynamic_out_of_bounds_kernel},
    {"misaligned", misaligned_kernel},
    {"stale-shared", stale_shared_kernel},
    {"reverse", reverse_kernel<true>},
    {"sound", sound_kernel},
};

}  // namespace

// Prints the output of the first block of the kernel called argv[1], or "depends on the order".
int main(int, char** argv) {
  constexpr unsigned blocks = 2;
  const std::string name = argv[1];
  const auto* fault = std::find_if(std::begin(kernels), std::end(kernels), [&](auto& k) { return name == k.name; });
  if (fault == std::end(kernels)) return 2;
  const std::unique_ptr<int[]> in(new int[threads]);
  std::iota(in.get(), in.get() + threads, 0);
  std::vector<int> first;
  for (unsigned order = 0; order < 6; ++order) {
    const std::unique_ptr<int[]> out(new int[blocks * threads]());
    cuda_on_cpu::run_in_order(order);
    const int* const_in = in.get();
    if (cuda_on_cpu::launch(blocks, threads, threads, nullptr, fault->kernel, const_in, out.get())) return 4;
    const std::vector<int> result(out.get(), out.get() + threads);
    if (order == 0) first = result;
    if (result != first) {
      std::cout << "depends on the order" << std::endl;
      return 3;
    }
  }
  for (int i = 0; i < threads; ++i) std::cout << first[i] << " ";
  // CUDA refuses a grid without blocks, a block of too many threads, and too much shared memory.
  const auto refused = [&](dim3 grid, dim3 block, std::size_t bytes) {
    return cuda_on_cpu::launch(grid, block, bytes, nullptr, fault->kernel, in.get(), in.get()) != cudaSuccess;
  };
  if (!refused(0, 32, 0) || !refused(1, 1025, 0) || !refused(1, 32, 228 * 1024)) return 5;
}
