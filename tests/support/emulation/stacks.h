// Stacks that can be left and entered again, by jumps within one OS thread: no system call, unlike swapcontext.
#pragma once

#include <cstddef>
#include <memory>

namespace stvit::emulation {

struct Stack {
  void* place[5];  // where it was left, as __builtin_setjmp says it
  std::unique_ptr<char[]> memory;
  const void* bottom = nullptr;  // for the address sanitizer; of the OS thread's own stack found when it is first left
  size_t size = 0;
};

// Leaves `from` and goes on where `to` was left. Returns when something switches to `from`.
void switch_stacks(Stack& from, Stack& to);

// Gives `to` memory, leaves `from`, and calls `body` on `to`. It must not return, only switch.
void begin_stack(Stack& from, Stack& to, void (*body)());

}  // namespace stvit::emulation
