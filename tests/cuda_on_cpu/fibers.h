// Contexts: stacks that threads of a block run on, and switching between them.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

constexpr std::size_t stack_size = 256 * 1024;

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::abort();
}

#ifdef __x86_64__
using Context = void*;  // the stack pointer; the registers that a call preserves are saved above it

// Saves the running context in *from and continues with `to`.
__attribute__((naked, noinline)) inline void switch_context(Context*, Context) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_size) - 2;  // as if `entry` had just been called
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, const Context& to) { swapcontext(from, &to); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_size;
  makecontext(&context, entry, 0);
}
#endif

}  // namespace cuda_on_cpu
