// What tests set and read, as plain C functions: see tests/support/emulated.py.
#include <algorithm>

#include "fibers.h"

using stvit::emulation::device;

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
}
