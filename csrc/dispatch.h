// From a Type to a C++ type.
#pragma once

#include <gpu.cuh>

#include "plan.h"

namespace stvit {

// A type as a value, so that a generic lambda can take it.
template <typename T>
struct Is {
  using type = T;
};

// Calls `run` with the type of the numbers: with_type(type, [&](auto is) { using T = typename decltype(is)::type; ... }).
template <typename Run>
void with_type(Type type, const Run& run) {
  switch (type) {
    case Type::half: return run(Is<gpu::half>{});
    case Type::bfloat16: return run(Is<gpu::bfloat16>{});
    case Type::single: return run(Is<float>{});
    case Type::twofold: return run(Is<double>{});
  }
}

}  // namespace stvit
