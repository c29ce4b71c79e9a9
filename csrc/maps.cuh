// The maps on the products of a pixel with its 9 neighbours (plan.h): one lane holds the pixel.
#pragma once

#include <gpu.cuh>

namespace stvit {

constexpr float LOG2_E = 1.44269504f;

// Softmax, as powers of 2.
__device__ inline void associate(float (&products)[9], float scale) {
  const float factor = scale * LOG2_E;
#pragma unroll
  for (float& product : products) product *= factor;
  float most = products[0], sum = 0;
#pragma unroll
  for (const float product : products) most = fmaxf(most, product);
#pragma unroll
  for (float& product : products) sum += product = gpu::power_of_two(product - most);
  const float share = gpu::reciprocal(sum);
#pragma unroll
  for (float& product : products) product *= share;
}

// dlogit = A (dA - sum A dA / sum A): rounded, nine weights near 0 and 1 sum to 1 only to a rounding.
__device__ inline void differentiate(float (&slopes)[9], const float (&weights)[9]) {
  float sum = 0, mean = 0;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    sum += weights[k];
    mean += weights[k] * slopes[k];
  }
  mean *= gpu::reciprocal(sum == 0 ? 1 : sum);
#pragma unroll
  for (int k = 0; k < 9; ++k) slopes[k] = weights[k] * (slopes[k] - mean);
}

}  // namespace stvit
