// What tests set and read, as plain C functions: see tests/support/emulated.py.
#include <dlfcn.h>

#include <algorithm>

#include "fibers.h"

using stvit::emulation::device;
using stvit::emulation::launches;

namespace stvit::emulation {

std::vector<Launch> launches;

void record(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes, std::vector<char> arguments) {
  Dl_info found{};
  dladdr(kernel, &found);
  launches.push_back({found.dli_sname ? found.dli_sname : "", blocks, shared_bytes, threads, std::move(arguments)});
}

}  // namespace stvit::emulation

extern "C" {

void emulation_limits(int multiprocessors, int shared_bytes) {
  device.multiprocessors = multiprocessors;
  device.shared_bytes = shared_bytes;
}

void emulation_order(int order) { device.order = stvit::emulation::Order(order); }

// Bytes of device memory loaded and stored, and launches, since the last call.
void emulation_counts(int64_t (&counts)[3]) {
  const int64_t now[3] = {device.loaded, device.stored, device.launches};
  std::copy(now, now + 3, counts);
  device.loaded = device.stored = device.launches = 0;
}

// While on, launches are noted instead of run.
void emulation_record(int on) {
  device.recording = on;
  launches.clear();
}
int emulation_recorded() { return int(launches.size()); }
// sizes: blocks, threads, bytes of shared memory, bytes of arguments
const char* emulation_launch(int index, int64_t (&sizes)[4], const char** arguments) {
  const auto& launch = launches.at(index);
  const int64_t found[4] = {launch.blocks, launch.threads, launch.shared_bytes, int64_t(launch.arguments.size())};
  std::copy(found, found + 4, sizes);
  *arguments = launch.arguments.data();
  return launch.kernel.c_str();
}
}
