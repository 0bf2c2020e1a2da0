// The one door through which CUDA kernels start.
#pragma once

#include <stdexcept>
#include <string>

namespace fastperc {

// Starts kernel<<<blocks, threads, 0, stream>>>(args...); a launch that fails raises at once, naming what failed.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream,
            Arguments... arguments) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace fastperc
