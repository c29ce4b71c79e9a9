// Super tokens to pixels: chooses between spread.cuh and spread_single.cuh, for 16-bit numbers and float in channels_last,
// and the general kernel below, for everything else: one thread for one channel of one pixel.
//
// Bytes, X those of the pixels: A read, 1 X written, and what is added read once; the super tokens come from the caches.
#include <gpu.cuh>

#include "dispatch.h"
#include "launch.h"
#include "spread_single.cuh"

namespace stvit {
namespace {

constexpr int THREADS = 256;

template <typename T, typename RESIDUAL, typename OUT>
struct General {
  using S = typename gpu::Accumulator<T>::type;
  const TokensToPixels& call;
  const Shape& shape;
  int64_t image, channel, y, x, row, column;

  __device__ S total() const {
    const int64_t at = ((image * shape.height + y) * shape.width + x) * 9;
    S sum = products(static_cast<const T*>(call.weights) + at, call.tokens, call.mass);
    if (call.weights2)
      sum += S(call.scale2) * products(static_cast<const T*>(call.weights2) + at, call.tokens2, nullptr);
    if (call.means) {
      const int64_t mean = ((image * shape.gh + row) * shape.gw + column) * shape.channels + channel;
      sum += gpu::widen(gpu::load(static_cast<const T*>(call.means) + mean)) / S(shape.h * shape.w);
    }
    if (call.residual.data) {
      const View& view = call.residual;
      const int64_t place = image * view.image + channel * view.channel + y * view.row + x * view.column;
      sum += S(gpu::widen(gpu::load(static_cast<const RESIDUAL*>(view.data) + place)));
    }
    return sum;
  }

  // Outside the grid super tokens are zeros, by which a weight that is not finite still shows.
  __device__ S products(const T* weights, const View& view, const void* mass) const {
    const T* tokens = static_cast<const T*>(view.data) + image * view.image + channel * view.channel;
    S sum = 0;
    for (int k = 0; k < 9; ++k) {
      const int64_t near_row = row + k / 3 - 1, near_column = column + k % 3 - 1;
      const bool inside = near_row >= 0 && near_row < shape.gh && near_column >= 0 && near_column < shape.gw;
      S token = inside ? S(gpu::widen(gpu::load(tokens + near_row * view.row + near_column * view.column))) : S(0);
      if (mass && inside) {
        const int64_t place = (image * shape.gh + near_row) * shape.gw + near_column;
        token = gpu::widen(gpu::narrow<T>(token / (gpu::load(static_cast<const S*>(mass) + place) + S(MASS_EPSILON))));
      }
      sum += S(gpu::widen(gpu::load(weights + k))) * token;
    }
    return sum;
  }
};

template <typename T, typename RESIDUAL, typename OUT>
__global__ void __launch_bounds__(THREADS) tokens_to_pixels_kernel(const TokensToPixels call) {
  const Shape& shape = call.shape;
  int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= shape.batch * shape.channels * shape.height * shape.width) return;
  General<T, RESIDUAL, OUT> general{call, shape};
  const auto next = [&](int64_t size) {
    const int64_t place = i % size;
    i /= size;
    return place;
  };
  // Neighbouring threads take what lies side by side in memory.
  const bool channels_last = call.pixels.channel == 1;
  if (channels_last) general.channel = next(shape.channels);
  general.x = next(shape.width);
  general.y = next(shape.height);
  if (!channels_last) general.channel = next(shape.channels);
  general.image = i;
  general.row = general.y / shape.h;
  general.column = general.x / shape.w;
  const View& view = call.pixels;
  OUT* to = static_cast<OUT*>(view.data) + general.image * view.image + general.channel * view.channel +
            general.y * view.row + general.x * view.column;
  using Wide = typename gpu::Accumulator<OUT>::type;
  gpu::store(to, gpu::narrow<OUT>(Wide(general.total())));
}

template <typename T, typename RESIDUAL, typename OUT>
void run_general(const TokensToPixels& call, void* stream) {
  const int64_t threads = call.shape.batch * call.shape.channels * call.shape.height * call.shape.width;
  gpu::launch(tokens_to_pixels_kernel<T, RESIDUAL, OUT>, (threads + THREADS - 1) / THREADS, THREADS, 0, stream, call);
}

// The types that PyTorch promotes super tokens and residual to.
template <typename T, typename RESIDUAL>
struct Promoted {
  using type = std::conditional_t<(sizeof(T) > sizeof(RESIDUAL)), T, RESIDUAL>;
};
template <>
struct Promoted<gpu::half, gpu::bfloat16> {
  using type = float;
};
template <>
struct Promoted<gpu::bfloat16, gpu::half> {
  using type = float;
};

}  // namespace

void tokens_to_pixels(const TokensToPixels& call, void* stream) {
  with_type(call.type, [&](auto is) {
    using T = typename decltype(is)::type;
    if constexpr (sizeof(T) == 2)
      if (spreads(call))
        return call.pixels_type == call.type ? run_spread<T, T>(call, stream) : run_spread<T, float>(call, stream);
    if constexpr (sizeof(T) == 4)
      if (spreads_single(call)) return run_spread_single(call, stream);
    if (!call.residual.data) return run_general<T, T, T>(call, stream);
    with_type(call.residual_type, [&](auto other) {
      using RESIDUAL = typename decltype(other)::type;
      run_general<T, RESIDUAL, typename Promoted<T, RESIDUAL>::type>(call, stream);
    });
  });
}

}  // namespace stvit
