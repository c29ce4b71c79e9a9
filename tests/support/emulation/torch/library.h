// torch's own, but a library that is registered already is left as it is: by the compiled extension, where that is
// installed too. Implementations for the CPU are then added to the same ops.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include_next <torch/library.h>

namespace stvit::emulation {

inline void define_library(const char* name, void (*define)(torch::Library&), const char* file, int line) {
  if (c10::Dispatcher::singleton().findSchema({std::string(name) + "::sampling", ""})) return;
  static torch::Library library(torch::Library::DEF, name, std::nullopt, file, line);
  define(library);
}

}  // namespace stvit::emulation

#undef TORCH_LIBRARY
#define TORCH_LIBRARY(name, m)                                                                                       \
  static void define_##name(torch::Library&);                                                                        \
  static const int defined_##name = (stvit::emulation::define_library(#name, define_##name, __FILE__, __LINE__), 0); \
  void define_##name(torch::Library& m)
