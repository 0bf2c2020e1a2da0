// Starts CUDA kernels. Every kernel is started through launch().
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastperc {

// The number of blocks of a launch.
inline unsigned grid_size(const char* name, std::int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string("fastperc: ") + name + ": the tensor is too large for a grid of blocks");
  }
  return static_cast<unsigned>(blocks);
}

// Starts kernel<<<blocks, threads, 0, stream>>>(arguments...). If that fails, throws an error that names the kernel.
// Starts nothing for no blocks.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream,
            Arguments... arguments) {
  if (blocks == 0) return;
#ifdef __CUDACC__
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
#else  // tests/cuda_on_cpu runs the kernels on the CPU
  const cudaError_t error = cuda_on_cpu::launch(blocks, threads, 0, stream, kernel, arguments...);
#endif
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace fastperc
