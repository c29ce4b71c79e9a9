#include "fibers.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "stacks.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace stvit::emulation {

Device device;

namespace {

constexpr int NAN_BYTE = 0xff;  // of any format

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};

struct Thread : Stack {
  int index = 0;
  const char* waits_at = nullptr;
  std::deque<Copy> copies;
  int64_t committed = 0;
};

struct Warp {
  int size, next = 0;  // lanes; of those in order, the next to run
  int arrived = 0, phase = 0;
  int among_some = 0;  // lanes that wait for some threads of the block
  const char* operation = nullptr;
  alignas(16) unsigned char deposits[2][LANES][DEPOSIT];
};

struct Block {
  int threads = 0, ended = 0, arrived = 0, next_warp = 0;
  int some = 0, some_arrived = 0;  // threads that are waited for, and have come
  std::vector<Warp> warps;
  std::vector<int> warp_order, lane_order;
  std::unique_ptr<char[]> shared;
  int64_t shared_bytes = 0;
};

Stack own_stack;  // of the OS thread
std::vector<std::unique_ptr<Thread>> threads;
Thread* running = nullptr;
Block block;
const std::function<void()>* kernel = nullptr;
std::exception_ptr error;
bool aborting = false;
struct Aborted {};

// The next thread in order that does not wait for others, if there is one.
Thread* next_thread() {
  for (; block.next_warp < int(block.warps.size()); ++block.next_warp) {
    const int warp = block.warp_order[block.next_warp];
    while (block.warps[warp].next < LANES) {
      const int lane = block.lane_order[block.warps[warp].next++];
      if (lane < block.warps[warp].size) return threads[warp * LANES + lane].get();
    }
  }
  return nullptr;
}

void go_on(Stack& from, Thread* to) {
  running = to;
  if (to) {
    threadIdx.x = unsigned(to->index);
    if (to != &from) switch_stacks(from, *to);
  } else {
    switch_stacks(from, own_stack);
  }
}

void wait(const char* where) {
  Thread& self = *running;
  self.waits_at = where;
  go_on(self, next_thread());
  self.waits_at = nullptr;
  if (aborting) throw Aborted();
}

void run_kernel(Thread& self) {
  try {
    (*kernel)();
    if (!self.copies.empty()) fail("ended with asynchronous copies that it did not wait for");
    ++block.ended;
  } catch (const Aborted&) {
  } catch (...) {
    error = std::current_exception();
  }
}

Warp& running_warp() { return block.warps[running->index / LANES]; }

// Whether the thread is the last lane of its warp to come.
bool arrive(const char* operation) {
  Warp& warp = running_warp();
  if (warp.arrived++ == 0) warp.operation = operation;
  if (warp.operation != operation && std::strcmp(warp.operation, operation) != 0)
    fail(std::string(operation) + " while other lanes of the warp are at " + warp.operation);
  return warp.arrived == LANES;
}

void release(Warp& warp) { warp.arrived = warp.next = 0; }

// What a thread's stack is for: it runs a kernel each time that it is entered.
void run_kernels() {
  Thread& self = *running;
  go_on(self, nullptr);
  for (;;) {
    run_kernel(self);
    go_on(self, error || aborting ? nullptr : next_thread());
  }
}

void make_thread() {
  threads.push_back(std::make_unique<Thread>());
  running = threads.back().get();
  running->index = int(threads.size()) - 1;
  begin_stack(own_stack, *running, run_kernels);
}

void choose_order(int64_t index) {
  const auto arrange = [&](std::vector<int>& order, size_t size) {
    order.resize(size);
    std::iota(order.begin(), order.end(), 0);
    if (device.order == Order::reverse) std::reverse(order.begin(), order.end());
    std::mt19937 random{unsigned(index)};
    if (device.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  };
  arrange(block.warp_order, block.warps.size());
  arrange(block.lane_order, LANES);
}

void start_block(int64_t index, int count, int64_t shared_bytes) {
  block.threads = count;
  block.ended = block.arrived = block.next_warp = block.some_arrived = 0;
  block.warps.resize((count + LANES - 1) / LANES);
  for (int i = 0; i < int(block.warps.size()); ++i) {
    Warp& warp = block.warps[i];
    warp.size = std::min(LANES, count - i * LANES);
    warp.next = warp.arrived = warp.phase = warp.among_some = 0;
  }
  choose_order(index);
  block.shared_bytes = shared_bytes;
  block.shared.reset(new char[shared_bytes]);  // at its exact size, for the address sanitizer
  std::memset(block.shared.get(), NAN_BYTE, shared_bytes);
  for (int i = 0; i < count; ++i) {
    threads[i]->copies.clear();
    threads[i]->committed = 0;
  }
  blockIdx.x = unsigned(index);
}

// Makes the threads that still wait leave the kernel, so that the next one finds them at its start.
void abort_block() {
  aborting = true;
  for (int i = 0; i < block.threads; ++i)
    if (threads[i]->waits_at) go_on(own_stack, threads[i].get());
  aborting = false;
}

std::string stuck() {
  std::string what = "block " + std::to_string(blockIdx.x) + ": threads wait for ever:";
  for (int i = 0, seen = 0; i < block.threads; ++i) {
    const char* where = threads[i]->waits_at;
    if (where && (i == 0 || threads[i - 1]->waits_at != where) && ++seen <= 4)
      what += " thread " + std::to_string(i) + " at " + where + ",";
  }
  return what + " while " + std::to_string(block.ended) + " of " + std::to_string(block.threads) + " have ended";
}

void run_block() {
  if (Thread* first = next_thread()) go_on(own_stack, first);
  if (!error && block.ended < block.threads) error = std::make_exception_ptr(std::runtime_error(stuck()));
  if (!error) return;
  abort_block();
  std::rethrow_exception(std::exchange(error, nullptr));
}

}  // namespace

void run(int64_t blocks, int count, int64_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (blocks < 0 || blocks > INT32_MAX) throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks");
  if (count < 1 || count > 1024) throw std::runtime_error("a launch of " + std::to_string(count) + " threads a block");
  if (shared_bytes < 0 || shared_bytes > device.shared_bytes)
    throw std::runtime_error("a launch with " + std::to_string(shared_bytes) +
                             " bytes of shared memory, the device has " + std::to_string(device.shared_bytes));
  while (int(threads.size()) < count) make_thread();
  gridDim = dim3{unsigned(blocks), 1, 1};
  blockDim = dim3{unsigned(count), 1, 1};
  kernel = &body;
  ++device.launches;
  for (int64_t i = 0; i < blocks; ++i) {
    start_block(i, count, shared_bytes);
    run_block();
  }
  block.shared.reset();
  block.shared_bytes = 0;
}

void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " +
                           what);
}

void wait_for_block() {
  if (++block.arrived == block.threads) {
    block.arrived = block.next_warp = 0;
    for (Warp& warp : block.warps) warp.next = 0;
  }
  wait("barrier");
}

void wait_for_some(int threads) {
  const std::string what = "barrier of " + std::to_string(threads) + " threads";
  if (threads <= 0 || threads % LANES || threads > block.threads) fail(what);
  if (block.some_arrived++ == 0) block.some = threads;
  if (block.some != threads) fail(what + " and of " + std::to_string(block.some));
  ++running_warp().among_some;
  if (block.some_arrived == threads) {
    for (Warp& warp : block.warps) {
      if (warp.among_some % LANES) fail(what + ": a part of a warp came");
      if (warp.among_some) warp.next = warp.among_some = 0;
    }
    block.some_arrived = block.next_warp = 0;
  }
  wait("barrier of some");
}

void wait_for_warp(const char* operation) {
  if (arrive(operation)) release(running_warp());
  wait(operation);
}

// Of two sets of deposits one is filled while lanes may still have to read the other.
void collective(const char* operation, void* mine, int bytes, void (*combine)(unsigned char*, int), int argument) {
  Warp& warp = running_warp();
  auto& deposits = warp.deposits[warp.phase];
  unsigned char* own = deposits[running->index % LANES];
  std::memcpy(own, mine, bytes);
  if (arrive(operation)) {
    combine(deposits[0], argument);
    warp.phase ^= 1;
    release(warp);
  }
  wait(operation);
  std::memcpy(mine, own, bytes);
}

char* shared_memory() { return block.shared.get(); }

bool in_shared_memory(const void* from, int64_t bytes) {
  const char* byte = static_cast<const char*>(from);
  return byte >= block.shared.get() && byte + bytes <= block.shared.get() + block.shared_bytes;
}

void issue_copy(void* to, const void* from, int bytes) {
  std::memset(to, NAN_BYTE, 16);
  running->copies.push_back({to, from, bytes, running->committed});
}

void commit_copies() { ++running->committed; }

void wait_for_copies(int latest) {
  auto& copies = running->copies;
  for (; !copies.empty() && copies.front().group < running->committed - latest; copies.pop_front()) {
    const Copy& copy = copies.front();
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

}  // namespace stvit::emulation
