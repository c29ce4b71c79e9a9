// Floats that one instruction moves.
#pragma once

namespace stvit {

struct alignas(8) Two {
  float first, second;
};
struct alignas(16) Four {
  float values[4];
};

}  // namespace stvit
