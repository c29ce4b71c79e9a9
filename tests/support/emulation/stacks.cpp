#include "stacks.h"

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace stvit::emulation {
namespace {

constexpr size_t SIZE = 256 * 1024;

#ifdef __SANITIZE_ADDRESS__
Stack* left = nullptr;
void start_switch(void** fake_stack, Stack& from, Stack& to) {
  left = &from;
  __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
}
void finish_switch(void* fake_stack) { __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->size); }
#else
void start_switch(void**, Stack&, Stack&) {}
void finish_switch(void*) {}
#endif

// The functions that switch must not be seen through: each runs on two stacks.
[[gnu::noinline, gnu::no_sanitize_address]] void jump(void** place) { __builtin_longjmp(place, 1); }

[[gnu::noinline, gnu::no_sanitize_address]] void go(Stack& from, Stack& to, const ucontext_t* beginning) {
  void* fake_stack = nullptr;
  start_switch(&fake_stack, from, to);
  if (__builtin_setjmp(from.place) == 0) beginning ? void(setcontext(beginning)) : jump(to.place);
  finish_switch(fake_stack);
}

void (*begun)();
void begin() {
  finish_switch(nullptr);
  begun();
}

}  // namespace

void switch_stacks(Stack& from, Stack& to) { go(from, to, nullptr); }

void begin_stack(Stack& from, Stack& to, void (*body)()) {
  to.memory.reset(new char[SIZE]);
  to.bottom = to.memory.get();
  to.size = SIZE;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = to.memory.get();
  context.uc_stack.ss_size = SIZE;
  context.uc_link = nullptr;
  makecontext(&context, begin, 0);
  begun = body;
  go(from, to, &context);
}

}  // namespace stvit::emulation
