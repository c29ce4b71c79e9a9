// Pixels to super tokens: chooses between the walk (walk.cuh), for 16- and 32-bit numbers in channels_last, and the
// general kernels below, for everything else.
//
// The general kernels take any strides, type, tile and channel count. One warp weighs one pixel; then one block of
// threads owns one super token (and a block of channels), and sums over the 9 tiles around it. Nothing is folded and
// nothing is shared between blocks, so that results repeat bit for bit.
//
// Bytes, X those of the pixels: 2 X read from device memory; the sums read every pixel 9 times, 8 of them from the
// caches.
#include <gpu.cuh>

#include "dispatch.h"
#include "launch.h"
#include "maps.cuh"

namespace stvit {

template <Map MAP, bool POOLS = false>
void run_walk(const PixelsToTokens&, const Walk&, void* stream);

namespace {

constexpr int THREADS = 128;

template <typename T>
using Sum = typename gpu::Accumulator<T>::type;

template <typename S>
__device__ S over_warp(S value) {
  for (int lanes = 16; lanes; lanes /= 2) value += gpu::shuffle_xor(value, lanes);
  return value;
}

// One warp: the products of a pixel with its 9 neighbours, outside the grid those with zeros; then the map.
// Behind the last pixel come, for `associate` with padding, the tiles: a warp weighs a pixel of zeros of that tile.
template <typename T, Map MAP>
struct Weigher {
  using S = Sum<T>;
  const PixelsToTokens& call;
  const Shape& shape;
  const int lane;
  int64_t image, row, column;  // of the tile
  const T* pixel = nullptr;    // null for one of zeros

  __device__ bool inside(int k, int64_t& near_row, int64_t& near_column) const {
    near_row = row + k / 3 - 1;
    near_column = column + k % 3 - 1;
    return near_row >= 0 && near_row < shape.gh && near_column >= 0 && near_column < shape.gw;
  }

  __device__ void multiply(S (&products)[9]) const {
    const T* tokens = static_cast<const T*>(call.tokens.data) + image * call.tokens.image;
    const T* near[9];  // null outside the grid
    S masses[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      int64_t near_row, near_column;
      const bool known = inside(k, near_row, near_column);
      near[k] = known ? tokens + near_row * call.tokens.row + near_column * call.tokens.column : nullptr;
      masses[k] = MAP == Map::differentiate && known ? mass_of(near_row, near_column) : S(1);
      products[k] = 0;
    }
    for (int64_t c = lane; c < shape.channels; c += 32) {
      const S value = pixel ? S(gpu::widen(gpu::load(pixel + c * call.pixels.channel))) : S(0);
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        S token = near[k] ? S(gpu::widen(gpu::load(near[k] + c * call.tokens.channel))) : S(0);
        if (MAP == Map::differentiate) token = gpu::widen(gpu::narrow<T>(token / (masses[k] + S(MASS_EPSILON))));
        products[k] += value * token;
      }
    }
#pragma unroll
    for (int k = 0; k < 9; ++k) products[k] = over_warp(products[k]);
  }
  __device__ S mass_of(int64_t near_row, int64_t near_column) const {
    return gpu::load(static_cast<const S*>(call.mass) + (image * shape.gh + near_row) * shape.gw + near_column);
  }

  // Every lane holds all nine.
  __device__ void associate(S (&values)[9]) const {
    S most = values[0] * S(call.scale), sum = 0;
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      values[k] *= S(call.scale);
      most = values[k] > most ? values[k] : most;
    }
#pragma unroll
    for (int k = 0; k < 9; ++k) sum += values[k] = gpu::exponential(values[k] - most);
#pragma unroll
    for (int k = 0; k < 9; ++k) values[k] /= sum;
  }

  __device__ void differentiate(S (&values)[9], int64_t at) const {
    S shares[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      int64_t near_row, near_column;
      const bool known = inside(k, near_row, near_column);
      const int64_t place = (image * shape.gh + near_row) * shape.gw + near_column;
      if (known) values[k] -= gpu::load(static_cast<const S*>(call.offset) + place);
      if (call.grad) values[k] += gpu::widen(gpu::load(static_cast<const T*>(call.grad) + at + k));
      shares[k] = gpu::widen(gpu::load(static_cast<const T*>(call.weights) + at + k));
    }
    stvit::differentiate<true>(values, shares);
  }
};

template <typename T, Map MAP>
__global__ void __launch_bounds__(THREADS, 1) weigh_kernel(const PixelsToTokens call) {
  const Shape& shape = call.shape;
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
  const int64_t pixels = shape.batch * shape.height * shape.width, tiles = shape.batch * shape.gh * shape.gw;
  const bool padding = i >= pixels;
  if (i >= pixels + (call.padding ? tiles : 0)) return;
  Weigher<T, MAP> weigher{call, shape, int(threadIdx.x % 32)};
  if (padding) {
    weigher.column = (i - pixels) % shape.gw;
    weigher.row = (i - pixels) / shape.gw % shape.gh;
    weigher.image = (i - pixels) / shape.gw / shape.gh;
  } else {
    const int64_t x = i % shape.width, y = i / shape.width % shape.height;
    weigher.image = i / shape.width / shape.height;
    weigher.row = y / shape.h;
    weigher.column = x / shape.w;
    const View& view = call.pixels;
    weigher.pixel = static_cast<const T*>(view.data) + weigher.image * view.image + y * view.row + x * view.column;
  }
  Sum<T> values[9];
  weigher.multiply(values);
  if (MAP == Map::associate) weigher.associate(values);
  if (MAP == Map::differentiate) weigher.differentiate(values, i * 9);
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    if (weigher.lane != k) continue;
    if (!padding) gpu::store(static_cast<T*>(call.out) + i * 9 + k, gpu::narrow<T>(values[k]));
    // All nine are alike: 1/9, or NaN next to super tokens that are not finite.
    if (padding && k == 0) gpu::store(static_cast<T*>(call.padding) + i - pixels, gpu::narrow<T>(values[k]));
  }
}

// One thread: one channel of one super token. `factors`: what is summed with, (B, H, W, 9).
template <typename T, Map MAP>
__global__ void __launch_bounds__(THREADS) sum_kernel(const PixelsToTokens call, const T* factors) {
  using S = Sum<T>;
  const Shape& shape = call.shape;
  const int64_t blocks = (shape.channels + THREADS - 1) / THREADS;
  const int64_t channel = blockIdx.x % blocks * THREADS + threadIdx.x, token = blockIdx.x / blocks;
  if (channel >= shape.channels) return;
  const int64_t column = token % shape.gw, row = token / shape.gw % shape.gh, image = token / shape.gw / shape.gh;
  const View& view = call.pixels;
  const T* from = static_cast<const T*>(view.data) + image * view.image + channel * view.channel;
  S sum = 0, mass = 0;
  for (int k = 0; k < 9; ++k) {
    // The super token is neighbour k of this tile.
    const int64_t tile_row = row + 1 - k / 3, tile_column = column + 1 - k % 3;
    if (tile_row < 0 || tile_row >= shape.gh || tile_column < 0 || tile_column >= shape.gw) continue;
    S tile_sum = 0, tile_mass = 0;
    int seen = 0;
    for (int64_t y = tile_row * shape.h; y < (tile_row + 1) * shape.h && y < shape.height; ++y) {
      S line = 0, line_mass = 0;
      for (int64_t x = tile_column * shape.w; x < (tile_column + 1) * shape.w && x < shape.width; ++x, ++seen) {
        const S factor = gpu::widen(gpu::load(factors + ((image * shape.height + y) * shape.width + x) * 9 + k));
        line += factor * gpu::widen(gpu::load(from + y * view.row + x * view.column));
        line_mass += factor;
      }
      tile_sum += line;
      tile_mass += line_mass;
    }
    if (MAP == Map::associate && seen < shape.h * shape.w) {
      const int64_t tile = (image * shape.gh + tile_row) * shape.gw + tile_column;
      const S factor = gpu::widen(gpu::load(static_cast<const T*>(call.padding) + tile));
      tile_sum += factor * 0;
      tile_mass += factor * S(shape.h * shape.w - seen);
    }
    sum += tile_sum;
    mass += tile_mass;
  }
  const View& out = call.stokens;
  const S value = MAP == Map::associate ? sum / (mass + S(MASS_EPSILON)) : sum * S(call.scale);
  gpu::store(
      static_cast<T*>(out.data) + image * out.image + row * out.row + column * out.column + channel * out.channel,
      gpu::narrow<T>(value));
  if (MAP == Map::associate && channel == 0) gpu::store(static_cast<S*>(call.mass) + token, mass);
}

template <Map MAP>
void run_general(const PixelsToTokens& call, void* stream) {
  const Shape& shape = call.shape;
  with_type(call.type, [&](auto is) {
    using T = typename decltype(is)::type;
    const int64_t tiles = shape.batch * shape.gh * shape.gw;
    if constexpr (MAP != Map::weighted) {
      const int64_t warps = shape.batch * shape.height * shape.width + (call.padding ? tiles : 0);
      gpu::launch(weigh_kernel<T, MAP>, (warps * 32 + THREADS - 1) / THREADS, THREADS, 0, stream, call);
    }
    const bool made = MAP == Map::associate || MAP == Map::differentiate;
    const T* factors = static_cast<const T*>(made ? call.out : call.weights);
    const int64_t blocks = tiles * ((shape.channels + THREADS - 1) / THREADS);
    gpu::launch(sum_kernel<T, MAP>, blocks, THREADS, 0, stream, call, factors);
  });
}

template <Map MAP>
void run(const PixelsToTokens& call, const Walk& walk, void* stream) {
  if (walk.fits) return run_walk<MAP>(call, walk, stream);
  run_general<MAP>(call, stream);
}

bool moves_in_vectors(const PixelsToTokens& call) {
  const auto aligned = [](const void* data) { return reinterpret_cast<intptr_t>(data) % 16 == 0; };
  const int size = size_of(call.type);
  // Offsets within an image are 32-bit.
  const int64_t bytes = size * (call.pixels.row * call.shape.height + call.pixels.column * call.shape.width);
  return size <= 4 && bytes < (int64_t(1) << 31) && call.pixels.vectors(size) && aligned(call.weights) &&
         aligned(call.grad);
}

}  // namespace

Limits current_limits() {
  Limits limits;
  gpu::device_limits(limits.multiprocessors, limits.shared_bytes);
  return limits;
}

void pixels_to_tokens(const PixelsToTokens& given, void* stream) {
  PixelsToTokens call = given;
  const bool pool = call.map == Map::associate && !call.tokens.data;
  const Task task{call.map, pool, call.grad != nullptr, moves_in_vectors(call), size_of(call.type)};
  const Walk walk = plan(task, call.shape, current_limits());
  if (walk.pools) return run_walk<Map::associate, true>(call, walk, stream);
  if (pool) {
    pooling({call.type, call.shape, call.pixels, call.pooled}, stream);
    const int64_t channels = call.shape.channels, row = call.shape.gw * channels;
    call.tokens = {call.pooled, call.shape.gh * row, 1, row, channels};
  }
  switch (call.map) {
    case Map::associate: return run<Map::associate>(call, walk, stream);
    case Map::weighted: return run<Map::weighted>(call, walk, stream);
    case Map::products: return run<Map::products>(call, walk, stream);
    case Map::differentiate: return run<Map::differentiate>(call, walk, stream);
  }
}

}  // namespace stvit
