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

// The same to the last places of float: differences of logits are not rounded before they are scaled.
__device__ inline void associate_single(float (&logits)[9], float scale) {
#pragma unroll
  for (float& logit : logits) logit *= scale;
  float most = logits[0], sum = 0;
#pragma unroll
  for (const float logit : logits) most = fmaxf(most, logit);
  const float shift = most * LOG2_E;
#pragma unroll
  for (float& logit : logits) sum += logit = gpu::power_of_two(fmaf(logit, LOG2_E, -shift));
  const float share = gpu::reciprocal(sum);
#pragma unroll
  for (float& logit : logits) logit *= share;
}

// dlogit = A (dA - sum A dA / sum A): rounded, nine weights near 0 and 1 sum to 1 only to a rounding. EXACT: to the last
// places of S. There all dA are first taken less that of the pixel's own tile, which changes nothing but roundings:
// where its weight is near 1, the mean would be near its dA, and their difference small.
template <bool EXACT, typename S>
__device__ inline void differentiate(S (&slopes)[9], const S (&weights)[9]) {
  S sum = 0, mean = 0;
  const S own = EXACT ? slopes[4] : 0;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    sum += weights[k];
    if (EXACT) slopes[k] -= own;
    mean += weights[k] * slopes[k];
  }
  if (sum == 0) sum = 1;
  if constexpr (EXACT) {
    mean /= sum;
  } else {
    mean *= gpu::reciprocal(sum);
  }
#pragma unroll
  for (int k = 0; k < 9; ++k) slopes[k] = weights[k] * (slopes[k] - mean);
}

}  // namespace stvit
