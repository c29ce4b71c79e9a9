// csrc/gpu.cuh on the CPU: the same names with the same meaning. What a GPU punishes or leaves undefined is an error here:
// misaligned accesses, shared memory that was not asked for, threads that wait for others in vain.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"
#include "numbers.h"

namespace stvit::gpu {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

inline float widen(half x) { return emulation::to_float(x); }
inline float widen(bfloat16 x) { return emulation::to_float(x); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <typename T>
inline T narrow(typename Accumulator<T>::type x) {
  return x;
}
template <>
inline half narrow<half>(float x) {
  return emulation::to_half(x);
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  return emulation::to_bfloat16(x);
}

template <typename T>
inline uint32_t pack(T low, T high) {
  return low.bits | uint32_t(high.bits) << 16;
}

template <typename T>
inline uint32_t pack_narrowed(float low, float high) {
  return pack(narrow<T>(low), narrow<T>(high));
}

inline bool finite(float x) { return std::fabs(x) < INFINITY; }

inline void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    emulation::fail(std::string(what) + ": the address is no multiple of " + std::to_string(bytes));
}
inline void check_shared(const void* address, const char* what) {
  if (!emulation::in_shared_memory(address, 16)) emulation::fail(std::string(what) + ": outside shared memory");
}

template <typename T>
inline T load(const T* from) {
  check_alignment(from, sizeof(T), "load");
  emulation::device.loaded += sizeof(T);
  return *from;
}
template <typename T>
inline void store(T* to, T value) {
  check_alignment(to, sizeof(T), "store");
  emulation::device.stored += sizeof(T);
  *to = value;
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }

inline void barrier() { emulation::wait_for_block(); }
inline void barrier_of(int threads) { emulation::wait_for_some(threads); }
inline void warp_barrier() { emulation::wait_for_warp("warp_barrier"); }

template <typename T>
inline T anew(T x) {
  return x;
}

template <typename T>
inline T shuffle_xor(T value, int lanes) {
  const auto exchange = [](unsigned char* deposits, int lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      T* mine = reinterpret_cast<T*>(deposits + lane * emulation::DEPOSIT);
      T* other = reinterpret_cast<T*>(deposits + (lane ^ lanes) * emulation::DEPOSIT);
      if (lane < (lane ^ lanes)) std::swap(*mine, *other);
    }
  };
  emulation::collective("shuffle_xor", &value, sizeof(T), exchange, lanes);
  return value;
}

template <typename T>
inline T shuffle(T value, int lane) {
  struct Deposit {
    T value;
    int from;
  } mine{value, lane};
  const auto exchange = [](unsigned char* deposits, int) {
    T values[emulation::LANES];
    for (int lane = 0; lane < 32; ++lane)
      values[lane] = reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT)->value;
    for (int lane = 0; lane < 32; ++lane) {
      Deposit* to = reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT);
      if (to->from < 0 || to->from >= 32) emulation::fail("shuffle: from lane " + std::to_string(to->from));
      to->value = values[to->from];
    }
  };
  emulation::collective("shuffle", &mine, sizeof(mine), exchange);
  return mine.value;
}

inline bool any(bool value) {
  int mine = value;
  const auto combine = [](unsigned char* deposits, int) {
    int found = 0;
    for (int lane = 0; lane < 32; ++lane) found |= *reinterpret_cast<int*>(deposits + lane * emulation::DEPOSIT);
    for (int lane = 0; lane < 32; ++lane) *reinterpret_cast<int*>(deposits + lane * emulation::DEPOSIT) = found;
  };
  emulation::collective("any", &mine, sizeof(mine), combine);
  return mine;
}

template <int BYTES>
struct Bytes;
template <>
struct Bytes<2> {
  using type = uint16_t;
};
template <>
struct Bytes<4> {
  using type = uint32_t;
};
template <>
struct Bytes<8> {
  using type = uint64_t;
};
template <>
struct Bytes<16> {
  using type = int4;
};

inline char* shared_memory() { return emulation::shared_memory(); }
using Shared = char*;
inline Shared shared_address(const void* shared) { return static_cast<char*>(const_cast<void*>(shared)); }

// A row is read when its lane comes, so that one written by another lane without a warp_barrier in between shows.
template <bool TRANSPOSED, int COUNT>
inline void load_matrices_of(uint32_t (&out)[COUNT], const void* row, const char* what) {
  union Deposit {
    uint16_t row[8];
    uint16_t out[2 * COUNT];
  } mine = {};
  if (int(threadIdx.x % 32) < 8 * COUNT) {
    check_alignment(row, 16, what);
    check_shared(row, what);
    std::memcpy(mine.row, row, 16);
  }
  const auto distribute = [](unsigned char* deposits, int) {
    uint16_t matrices[COUNT][8][8];
    for (int i = 0; i < 8 * COUNT; ++i) std::memcpy(matrices[i / 8][i % 8], deposits + i * emulation::DEPOSIT, 16);
    for (int lane = 0; lane < 32; ++lane) {
      auto* out = reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT)->out;
      const int major = lane / 4, minor = lane % 4 * 2;
      for (int i = 0; i < 2 * COUNT; ++i)
        out[i] = TRANSPOSED ? matrices[i / 2][minor + i % 2][major] : matrices[i / 2][major][minor + i % 2];
    }
  };
  emulation::collective(what, &mine, sizeof(mine), distribute);
  std::memcpy(out, mine.out, sizeof(out));
}
inline void load_matrices(uint32_t (&out)[4], Shared row) { load_matrices_of<false>(out, row, "load_matrices"); }
inline void load_matrices_transposed(uint32_t (&out)[4], Shared row) {
  load_matrices_of<true>(out, row, "load_matrices_transposed");
}

template <typename T>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Deposit {
    float sum[4];
    T a[8], b[4];
  } mine;
  std::memcpy(mine.sum, sum, sizeof(sum));
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, &b0, 4);
  std::memcpy(mine.b + 2, &b1, 4);
  const auto multiply = [](unsigned char* deposits, int) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Deposit& from = *reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT);
      const int r = lane / 4, q = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) a[r + i / 2 % 2 * 8][q + i / 4 * 8 + i % 2] = widen(from.a[i]);
      for (int i = 0; i < 4; ++i) b[q + i / 2 * 8 + i % 2][r] = widen(from.b[i]);
    }
    float sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Deposit& from = *reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT);
      for (int i = 0; i < 4; ++i) sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = from.sum[i];
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane) {
      Deposit& to = *reinterpret_cast<Deposit*>(deposits + lane * emulation::DEPOSIT);
      for (int i = 0; i < 4; ++i) to.sum[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  };
  emulation::collective("multiply_add", &mine, sizeof(mine), multiply);
  std::memcpy(sum, mine.sum, sizeof(sum));
}

inline void copy_async(Shared to, const void* from, int bytes) {
  check_alignment(to, 16, "copy_async, shared memory");
  check_alignment(from, 16, "copy_async, device memory");
  check_shared(to, "copy_async");
  if (bytes < 0 || bytes > 16) emulation::fail("copy_async: " + std::to_string(bytes) + " bytes");
  emulation::device.loaded += bytes;
  emulation::issue_copy(to, from, bytes);
}
inline void copy_async(Shared to, const void* from) { copy_async(to, from, 16); }
inline void commit() { emulation::commit_copies(); }
template <int LATEST>
inline void wait() {
  emulation::wait_for_copies(LATEST);
}

// Arguments one after another, each aligned as C++ aligns it.
template <typename... Parameters>
std::vector<char> packed(const Parameters&... arguments) {
  std::vector<char> bytes;
  const auto append = [&](const auto& one) {
    bytes.resize((bytes.size() + alignof(decltype(one)) - 1) / alignof(decltype(one)) * alignof(decltype(one)));
    const char* from = reinterpret_cast<const char*>(&one);
    bytes.insert(bytes.end(), from, from + sizeof(one));
  };
  (append(arguments), ...);
  return bytes;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
            const Arguments&... arguments) {
  if (emulation::device.recording)
    return emulation::record(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
                             packed<std::remove_cv_t<Parameters>...>(arguments...));
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline void device_limits(int& multiprocessors, int& shared_bytes) {
  multiprocessors = emulation::device.multiprocessors;
  shared_bytes = emulation::device.shared_bytes;
}

}  // namespace stvit::gpu
