// The order of threads, for tests/cuda_on_cpu/module.cpp.
void run_in_order(unsigned number) { cuda_on_cpu::run_in_order(number); }
