// Small kernels that the emulation itself is tested with, right ones and ones with a known fault.
#include <functional>
#include <gpu.cuh>
#include <map>

namespace stvit {
namespace {

// The sum of each thread's number, by halves; with SKIP one of the barriers is missing.
template <bool SKIP>
__global__ void block_sum(const float* in, float* out, int64_t) {
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  const int thread = threadIdx.x;
  shared[thread] = gpu::load(in + blockIdx.x * blockDim.x + thread);
  gpu::barrier();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (thread < half) shared[thread] += shared[thread + half];
    if (!(SKIP && half == 32)) gpu::barrier();
  }
  if (thread == 0) gpu::store(out + blockIdx.x, shared[0]);
}

// Each lane hands its number to the next one; with SKIP without the barrier in between.
template <bool SKIP>
__global__ void warp_rotate(const float* in, float* out, int64_t) {
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  shared[threadIdx.x] = gpu::load(in + threadIdx.x);
  if (!SKIP) gpu::warp_barrier();
  gpu::store(out + threadIdx.x, shared[(threadIdx.x + 1) % 32]);
}

// Of four warps the last two hand their numbers to each other; with SKIP without the barrier in between.
template <bool SKIP>
__global__ void half_block_turn(const float* in, float* out, int64_t) {
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  const int thread = threadIdx.x;
  shared[thread] = gpu::load(in + thread);
  if (thread >= 64) {
    if (!SKIP) gpu::barrier_of(64);
    gpu::store(out + thread - 64, shared[191 - thread]);
  }
  gpu::barrier();
}

__global__ void warp_sum(const double* in, double* out, int64_t) {
  double value = gpu::load(in + threadIdx.x);
  for (int lanes = 16; lanes > 0; lanes /= 2) value += gpu::shuffle_xor(value, lanes);
  gpu::store(out + threadIdx.x, value);
}

__global__ void warp_turn(const float* in, float* out, int64_t) {
  gpu::store(out + threadIdx.x, gpu::shuffle(gpu::load(in + threadIdx.x), 31 - int(threadIdx.x)));
}

__global__ void warp_any(const float* in, float* out, int64_t) {
  gpu::store(out + threadIdx.x, float(gpu::any(gpu::load(in + threadIdx.x) > 0)));
}

// out (16 x 8, float) = a (16 x 16) b, b (16 x 8) after it; TRANSPOSED: b is given as (8 x 16).
template <typename T, bool TRANSPOSED>
__global__ void product(const T* in, float* out, int64_t) {
  T* shared = reinterpret_cast<T*>(gpu::shared_memory());
  const int lane = threadIdx.x, r = lane / 4, q = lane % 4 * 2;
  for (int i = lane; i < 384; i += 32) shared[i] = gpu::load(in + i);
  gpu::warp_barrier();
  uint32_t a[4], b[4];
  gpu::load_matrices(a, gpu::shared_address(shared + lane % 16 * 16 + lane / 16 * 8));
  const T* right = shared + 256;
  if (TRANSPOSED) {
    gpu::load_matrices(b, gpu::shared_address(right + lane % 8 * 16 + lane / 8 % 2 * 8));
  } else {
    gpu::load_matrices_transposed(b, gpu::shared_address(right + lane % 16 * 8));
  }
  float sum[4] = {};
  gpu::multiply_add<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) gpu::store(out + (r + i / 2 * 8) * 8 + q + i % 2, sum[i]);
}

enum Fault { NONE, NO_WAIT, EARLY_REUSE, LEFT_OVER };

// Sums 4 x 32 numbers a step, copied two steps ahead into three slots of shared memory; the last step may be short.
template <int FAULT>
__global__ void pipeline(const float* in, float* out, int64_t n) {
  char* shared = gpu::shared_memory();
  const int lane = threadIdx.x, slots = FAULT == EARLY_REUSE ? 2 : 3;
  const int steps = int((n + 127) / 128);
  const auto copy = [&](int step) {
    const int64_t first = step * 128 + lane * 4, left = (n - first) * 4;
    const int bytes = step < steps && left > 0 ? left < 16 ? int(left) : 16 : 0;
    if (step < steps)
      gpu::copy_async(gpu::shared_address(shared + (step % slots) * 512 + lane * 16), bytes ? in + first : in, bytes);
    gpu::commit();
  };
  copy(0);
  copy(1);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (FAULT != EARLY_REUSE) copy(step + 2);
    if (FAULT == NO_WAIT) gpu::wait<3>();
    if (FAULT != NO_WAIT) gpu::wait<FAULT == EARLY_REUSE ? 1 : 2>();
    gpu::warp_barrier();
    const float* slot = reinterpret_cast<const float*>(shared + step % slots * 512);
    if (FAULT == EARLY_REUSE) copy(step + 2);
    for (int i = 0; i < 4; ++i) sum += slot[(lane * 4 + i + 64) % 128];
    gpu::warp_barrier();
  }
  if (FAULT == LEFT_OVER) gpu::copy_async(gpu::shared_address(shared), in, 16);
  if (FAULT == NO_WAIT) gpu::wait<0>();
  gpu::store(out + lane, sum);
}

__global__ void some_leave(const float*, float*, int64_t) {
  if (threadIdx.x != 40) gpu::barrier();
}
__global__ void different_numbers(const float*, float*, int64_t) { gpu::barrier_of(threadIdx.x < 32 ? 64 : 32); }
__global__ void no_whole_warps(const float*, float*, int64_t) { gpu::barrier_of(48); }
__global__ void halves_of_warps(const float*, float*, int64_t) {
  if (threadIdx.x % 32 < 16) gpu::barrier_of(32);
}
__global__ void two_operations(const float*, float*, int64_t) {
  if (threadIdx.x % 2) gpu::warp_barrier();
  gpu::shuffle_xor(1.f, 1);
}
__global__ void misaligned_copy(const float* in, float*, int64_t) {
  gpu::copy_async(gpu::shared_address(gpu::shared_memory()), in + 1, 16);
}
__global__ void misaligned_rows(const float*, float*, int64_t) {
  uint32_t out[4];
  gpu::load_matrices(out, gpu::shared_address(gpu::shared_memory() + 8));
}
__global__ void misaligned_load(const char* in, char* out, int64_t) {
  gpu::store(out, char(gpu::load(reinterpret_cast<const int*>(in + 2))));
}
__global__ void outside_shared(const float* in, float*, int64_t n) {
  gpu::copy_async(gpu::shared_address(gpu::shared_memory() + n), in, 16);
}
__global__ void reads_past_the_end(const float* in, float* out, int64_t n) { gpu::store(out, gpu::load(in + n)); }
__global__ void writes_past_the_end(const float*, float* out, int64_t n) { gpu::store(out + n, 1.f); }
__global__ void copies_past_the_end(const float* in, float*, int64_t n) {
  gpu::copy_async(gpu::shared_address(gpu::shared_memory()), in + n - 4, 16);
  gpu::copy_async(gpu::shared_address(gpu::shared_memory()), in + n, 0);  // reads nothing
  gpu::commit();
  gpu::copy_async(gpu::shared_address(gpu::shared_memory()), in + n, 4);
  gpu::commit();
  gpu::wait<0>();
}
__global__ void shared_past_the_end(const float*, float* out, int64_t n) {
  gpu::store(out, reinterpret_cast<float*>(gpu::shared_memory())[n]);
}

template <typename T>
__global__ void widened(const T* in, float* out, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) gpu::store(out + i, gpu::widen(gpu::load(in + i)));
}
template <typename T>
__global__ void narrowed(const float* in, T* out, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) gpu::store(out + i, gpu::narrow<T>(gpu::load(in + i)));
}

using Sample = std::function<void(const void* in, void* out, int64_t n)>;
template <typename In, typename Out>
Sample sample(void (*kernel)(const In*, Out*, int64_t), int blocks, int threads, int shared_bytes) {
  return [=](const void* in, void* out, int64_t n) {
    gpu::launch(kernel, blocks, threads, shared_bytes, nullptr, static_cast<const In*>(in), static_cast<Out*>(out), n);
  };
}

const std::map<std::string, Sample> samples = {
    {"block_sum", sample(block_sum<false>, 3, 128, 512)},
    {"block_sum without a barrier", sample(block_sum<true>, 3, 128, 512)},
    {"half_block_turn", sample(half_block_turn<false>, 1, 128, 512)},
    {"half_block_turn without a barrier", sample(half_block_turn<true>, 1, 128, 512)},
    {"different_numbers", sample(different_numbers, 1, 64, 0)},
    {"no_whole_warps", sample(no_whole_warps, 1, 64, 0)},
    {"halves_of_warps", sample(halves_of_warps, 1, 64, 0)},
    {"warp_rotate", sample(warp_rotate<false>, 1, 32, 128)},
    {"warp_rotate without a barrier", sample(warp_rotate<true>, 1, 32, 128)},
    {"warp_sum", sample(warp_sum, 1, 32, 0)},
    {"warp_any", sample(warp_any, 1, 32, 0)},
    {"warp_turn", sample(warp_turn, 1, 32, 0)},
    {"half product", sample(product<gpu::half, false>, 1, 32, 768)},
    {"half product transposed", sample(product<gpu::half, true>, 1, 32, 768)},
    {"bfloat16 product", sample(product<gpu::bfloat16, false>, 1, 32, 768)},
    {"bfloat16 product transposed", sample(product<gpu::bfloat16, true>, 1, 32, 768)},
    {"pipeline", sample(pipeline<NONE>, 1, 32, 1536)},
    {"pipeline without waiting", sample(pipeline<NO_WAIT>, 1, 32, 1536)},
    {"pipeline with a slot too few", sample(pipeline<EARLY_REUSE>, 1, 32, 1536)},
    {"pipeline with a copy left over", sample(pipeline<LEFT_OVER>, 1, 32, 1536)},
    {"some_leave", sample(some_leave, 2, 64, 0)},
    {"partial warp", sample(warp_rotate<false>, 1, 16, 128)},
    {"two_operations", sample(two_operations, 1, 32, 0)},
    {"misaligned_copy", sample(misaligned_copy, 1, 32, 16)},
    {"misaligned_rows", sample(misaligned_rows, 1, 32, 64)},
    {"misaligned_load", sample(misaligned_load, 1, 1, 0)},
    {"outside_shared", sample(outside_shared, 1, 1, 32)},
    {"too much shared memory", sample(warp_sum, 1, 32, 1 << 20)},
    {"too many threads", sample(warp_sum, 1, 2048, 0)},
    {"reads_past_the_end", sample(reads_past_the_end, 1, 1, 0)},
    {"writes_past_the_end", sample(writes_past_the_end, 1, 1, 0)},
    {"copies_past_the_end", sample(copies_past_the_end, 1, 1, 16)},
    {"shared_past_the_end", sample(shared_past_the_end, 1, 1, 32)},
    {"half widened", sample(widened<gpu::half>, 1, 32, 0)},
    {"half narrowed", sample(narrowed<gpu::half>, 1, 32, 0)},
    {"bfloat16 widened", sample(widened<gpu::bfloat16>, 1, 32, 0)},
    {"bfloat16 narrowed", sample(narrowed<gpu::bfloat16>, 1, 32, 0)},
};

}  // namespace
}  // namespace stvit

// Runs a sample; the text of its error, empty without one.
extern "C" const char* run_sample(const char* name, const void* in, void* out, int64_t n) {
  static std::string error;
  error.clear();
  try {
    stvit::samples.at(name)(in, out, n);
  } catch (const std::exception& found) {
    error = found.what();
  }
  return error.c_str();
}
