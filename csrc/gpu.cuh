// What the kernels ask of the hardware, in one place: number formats, device memory, barriers, shuffles, the matrix
// instruction, asynchronous copies and launches. tests/support/emulation/gpu.cuh offers the same names on the CPU, so that the
// kernels themselves hold no `#ifdef`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace stvit::gpu {

using half = __half;
using bfloat16 = __nv_bfloat16;

// Sums are taken in float, of double in double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// torch compiles with __CUDA_NO_BFLOAT16_CONVERSIONS__: intrinsics only.
__device__ inline float widen(half x) { return __half2float(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

template <typename T>
__device__ inline T narrow(typename Accumulator<T>::type x) {
  return x;
}
template <>
__device__ inline half narrow<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit numbers in one register, `low` at the lower address.
__device__ inline uint32_t pack(half low, half high) {
  return __half_as_ushort(low) | uint32_t(__half_as_ushort(high)) << 16;
}
__device__ inline uint32_t pack(bfloat16 low, bfloat16 high) {
  return __bfloat16_as_ushort(low) | uint32_t(__bfloat16_as_ushort(high)) << 16;
}

// Two numbers, rounded.
template <typename T>
__device__ inline uint32_t pack_narrowed(float low, float high);
template <>
__device__ inline uint32_t pack_narrowed<half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return pack(__low2half(both), __high2half(both));
}
template <>
__device__ inline uint32_t pack_narrowed<bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return pack(__low2bfloat16(both), __high2bfloat16(both));
}

__device__ inline bool finite(float x) { return fabsf(x) < INFINITY; }

// Device memory, one element or 16 bytes at a time. Every access but copy_async goes through these two.
template <typename T>
__device__ inline T load(const T* from) {
  return *from;
}
template <typename T>
__device__ inline void store(T* to, T value) {
  *to = value;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// 2^x and 1 / x by one instruction each: within two units of the last place, powers below 2^-126 are 0.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// All threads of the block; all lanes of the warp.
__device__ inline void barrier() { __syncthreads(); }
__device__ inline void warp_barrier() { __syncwarp(); }
// `threads` threads of the block, in whole warps and always the same ones; the others neither wait nor are waited for.
// Lanes that have parted must meet before.
__device__ inline void barrier_of(int threads) {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" : : "r"(threads) : "memory");
}

// x, from which the compiler computes nothing beforehand: what follows is computed where it is used, again and again,
// rather than held in registers through the loop around it.
template <typename T>
__device__ inline T anew(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

template <typename T>
__device__ inline T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
// The value of another lane.
template <typename T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Whether it is true in any lane.
__device__ inline bool any(bool value) { return __any_sync(0xffffffffu, value); }

// Numbers of as many bytes.
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

// Dynamic shared memory of the block, 16-byte aligned.
__device__ inline char* shared_memory() {
  extern __shared__ int4 memory[];
  return reinterpret_cast<char*>(memory);
}

// An address in it: what matrix loads and copies take. From a pointer it takes a few instructions every time.
using Shared = uint32_t;
__device__ inline Shared shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Matrix loads and products are done by a whole warp, whose lanes must have met: warp_barrier after a branch. Products
// are volatile, or the compiler could move one into the branch that alone uses it.
//
// Four 8 x 8 matrices of 16-bit numbers. Lane l gives the 16-byte row l % 8 of matrix l / 8 and gets, of each matrix,
// entries (l / 4, 2 (l % 4)) and the next; transposed: entries (2 (l % 4), l / 4) and the one below.
__device__ inline void load_matrices(uint32_t (&out)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// sum (16 x 8) += a (16 x 16) b (16 x 8). Lane l holds, with r = l / 4 and q = 2 (l % 4),
//   sum: (r, q), (r, q + 1), (r + 8, q), (r + 8, q + 1)
//   a:   (r, q..), (r + 8, q..), (r, q + 8..), (r + 8, q + 8..)      two neighbours of a row in each register
//   b:   (q.., r), (q + 8.., r)                                      two neighbours of a column in each register
template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from device to shared memory, both 16-byte aligned, without passing registers: the first `bytes` are read,
// the rest is zero. Copies belong to the group closed by the next commit; wait<n> waits for all but the n latest groups
// of this thread.
__device__ inline void copy_async(Shared to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}
// All 16 bytes.
__device__ inline void copy_async(Shared to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATEST>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(LATEST) : "memory");
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Runs `kernel` in `blocks` blocks of `threads` threads on `stream`, a cudaStream_t of the current device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("a launch of " + std::to_string(blocks) + " blocks is too large");
  if (shared_bytes > 48 * 1024)  // beyond which a kernel must ask
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "setting shared memory");
  kernel<<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

// Multiprocessors of the current device, and the shared memory in bytes that one block can have.
inline void device_limits(int& multiprocessors, int& shared_bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
}

}  // namespace stvit::gpu
