// The maps on the products of a pixel with its 9 neighbours (plan.h), where four neighbouring lanes share the pixel: each
// holds two of its slots, and the first one also slot 8. `count` is 3 in that lane and 2 in the others.
#pragma once

#include <gpu.cuh>

namespace stvit {

// Over the four lanes that share a pixel.
__device__ inline float sum_of_four(float x) {
  x += gpu::shuffle_xor(x, 1);
  return x + gpu::shuffle_xor(x, 2);
}
__device__ inline float largest_of_four(float x) {
  x = fmaxf(x, gpu::shuffle_xor(x, 1));
  return fmaxf(x, gpu::shuffle_xor(x, 2));
}

// Softmax; rounded once, so that sums, mass and backward all see the weights that are stored.
template <typename T>
__device__ inline void associate(const float (&products)[3], int count, float scale, T (&weights)[3]) {
  float most = fmaxf(products[0] * scale, products[1] * scale);
  if (count == 3) most = fmaxf(most, products[2] * scale);
  most = largest_of_four(most);
  float shares[3] = {}, sum = 0;
  for (int i = 0; i < count; ++i) sum += shares[i] = gpu::exponential(products[i] * scale - most);
  const float one = 1.f / sum_of_four(sum);
  for (int i = 0; i < 3; ++i) weights[i] = gpu::narrow<T>(shares[i] * one);
}

// dlogit = A (dA - sum A dA / sum A): rounded, nine weights near 0 and 1 sum to 1 only to a rounding.
template <typename T>
__device__ inline void differentiate(const float (&slopes)[3], const T (&weights)[3], int count, T (&dlogit)[3]) {
  float shares[3] = {}, sum = 0, mean = 0;
  for (int i = 0; i < count; ++i) {
    shares[i] = gpu::widen(weights[i]);
    sum += shares[i];
    mean += shares[i] * slopes[i];
  }
  sum = sum_of_four(sum);
  mean = sum_of_four(mean) / (sum == 0 ? 1 : sum);
  for (int i = 0; i < 3; ++i) dlogit[i] = gpu::narrow<T>(shares[i] * (slopes[i] - mean));
}

}  // namespace stvit
