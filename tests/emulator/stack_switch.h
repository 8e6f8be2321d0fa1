// Stacks that take turns on one thread: what a fiber is made of.
//
// swapcontext does it everywhere, with two system calls a switch, and AddressSanitizer wipes the shadow of the whole stack
// each time. x86-64 has a switch of its own: half the time of the kernels' tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

constexpr std::size_t kStackBytes = 64 * 1024;
using Stack = std::unique_ptr<char[]>;

inline Stack make_stack() {
  return Stack(new char[kStackBytes]);
}

#if defined(__x86_64__)

// Where a stack goes on: the top of it, with the registers that a function must keep.
class Turn {
 public:
  // Begins with `entry`, which must not return.
  void begin(char* stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // of the frames that its previous user never left
#endif
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(stack) + kStackBytes) / 16 * 16;
    top_ = reinterpret_cast<void**>(end) - 8;
    for (int i = 0; i < 8; ++i) top_[i] = nullptr;
    top_[6] = reinterpret_cast<void*>(entry);  // behind six registers, before the place of a return address
  }
  void give_to(Turn& other) {
    switch_stacks(&top_, other.top_);
  }

 private:
  __attribute__((naked, noipa)) static void switch_stacks(void*** /* rdi: kept */, void** /* rsi: next */) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
        "ret");
  }

  void** top_ = nullptr;
};

#else

class Turn {
 public:
  void begin(char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void give_to(Turn& other) {
    swapcontext(&context_, &other.context_);
  }

 private:
  ucontext_t context_;
};

#endif

}  // namespace emulator
