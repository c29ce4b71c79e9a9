// What kernels and bindings use of CUDA's language and runtime besides gpu.cuh.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// Of the thread that is running; one-dimensional, as launch makes them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = void*;
