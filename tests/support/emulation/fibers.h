// The threads of a block as fibers: one OS thread runs them in turn, each until it waits for others or ends. A warp runs
// until all its lanes wait at a barrier of the block, so that threads are as far apart as barriers allow; the order is
// chosen (Order), and a kernel whose results depend on it lacks a barrier. Blocks run one after another.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace stvit::emulation {

constexpr int LANES = 32;
constexpr int DEPOSIT = 64;  // bytes that a lane can hand to a collective

enum class Order { forward, reverse, shuffled };

// What tests set and read; control.cpp hands it to Python.
struct Device {
  int multiprocessors = 132;  // an H100
  int shared_bytes = 232448;
  Order order = Order::forward;
  int64_t loaded = 0, stored = 0;  // bytes of device memory, since they were last set to 0
  int64_t launches = 0;
  bool recording = false;  // launches are noted, not run
};
extern Device device;

// A launch as the compiled kernel would see it.
struct Launch {
  std::string kernel;  // symbol
  int64_t blocks, shared_bytes;
  int threads;
  std::vector<char> arguments;  // as they lie in constant memory
};
extern std::vector<Launch> launches;
void record(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes, std::vector<char> arguments);

// Runs `kernel` in every thread of every block. Throws std::runtime_error where the kernel did what a GPU punishes.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

// An error of the thread that is running, whose place the message names.
[[noreturn]] void fail(const std::string& what);

// These return when all threads of the block, `threads` of them in whole warps, all lanes of the warp have come.
void wait_for_block();
void wait_for_some(int threads);
void wait_for_warp(const char* operation);

// Every lane of a warp deposits `bytes`; `combine` changes those of all 32, DEPOSIT bytes apart, in place; then every lane
// gets its own back. A lane that is at another operation is an error.
void collective(const char* operation, void* mine, int bytes, void (*combine)(unsigned char* deposits, int argument),
                int argument = 0);

char* shared_memory();
bool in_shared_memory(const void* from, int64_t bytes);

// Copies that have been issued become visible when they are waited for, not before.
void issue_copy(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int latest);

}  // namespace stvit::emulation
