// A Python module of the CUDA launchers, which run on the CPU: csrc/bindings_cuda.cpp, and the order of the threads.
// tests/emulation.py puts its functions in the place of those of fastperc._C.
//
// The launchers are in a library of their own: the emulation sets all its thread-local memory to NaN, and pybind11 has
// some too.
#include <pybind11/pybind11.h>

#include "bindings.h"

void run_in_order(unsigned number);

PYBIND11_MODULE(cuda_on_cpu, m) {
  fastperc::def_cuda_launchers(m);
  m.def("run_in_order", &run_in_order);
}
