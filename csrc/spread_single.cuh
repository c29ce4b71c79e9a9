// Super tokens to pixels for float in channels_last: fused multiply-adds, 4 channels a thread.
//
// A thread holds the nine super tokens around a tile in registers, four channels of each, and goes through the tile's
// pixels, or some rows of them. Threads side by side have channels side by side: weights come to all of them at once, and
// pixels are written 16 bytes a thread. Where runs of four pixels begin on 16 bytes, their 36 weights are nine loads.
//
// Bytes, X those of the pixels: A = 9/C X read, 1 X written, and what is added read once; the super tokens, X / (h w), are
// read 9 times, mostly from the caches.
#pragma once

#include <algorithm>

#include "spread.cuh"
#include "vectors.cuh"

namespace stvit {

constexpr int SINGLE_SPREAD_THREADS = 128;
constexpr int SINGLE_SPREAD_BLOCKS = 3;   // on a multiprocessor, at least
constexpr int SINGLE_SPREAD_PIXELS = 64;  // of a thread, about

struct SingleSpreadArguments {
  TokensToPixels call;
  int blocks;      // of a row of the grid
  Divisor fours;   // fours of channels
  Divisor slices;  // threads that share four channels of a tile
  int lines;       // rows of a tile that each of them takes
  bool wide[2];    // whether super tokens of either sum can be read four channels at a time
};

template <Added ADDED, int RUN>
struct SingleSpreader {
  static constexpr bool TWO = ADDED == Added::gradient;  // there is a second sum

  const SingleSpreadArguments& a;
  const TokensToPixels& call;
  const Shape& shape;
  int image, row, column, channel, line, lines;  // tile and channels of the thread; first of its rows, and how many

  __device__ explicit SingleSpreader(const SingleSpreadArguments& arguments)
      : a(arguments), call(a.call), shape(a.call.shape) {
    const int block = int(blockIdx.x), of_grid = block / a.blocks;
    image = of_grid / shape.gh;
    row = of_grid - image * shape.gh;
    const int i = (block - of_grid * a.blocks) * SINGLE_SPREAD_THREADS + int(threadIdx.x);
    const int unit = a.fours.quotient(i);
    channel = (i - unit * int(a.fours.d)) * 4;
    column = a.slices.quotient(unit);
    line = (unit - column * int(a.slices.d)) * a.lines;
    lines = smaller(smaller(a.lines, shape.h - line), int(shape.height) - row * shape.h - line);
  }

  __device__ void run() const {
    if (column >= shape.gw || lines <= 0) return;
    Four near[9], near2[9], mean = {};
    load_tokens(near, call.tokens, a.wide[0]);
    if (call.mass) divide(near);
    if (TWO) {
      load_tokens(near2, call.tokens2, a.wide[1]);
#pragma unroll
      for (Four& four : near2) scale(four, float(call.scale2));
    }
    if (TWO && call.means) {
      const int64_t tile = (int64_t(image) * shape.gh + row) * shape.gw + column;
      mean = gpu::load(
          reinterpret_cast<const Four*>(static_cast<const float*>(call.means) + tile * shape.channels + channel));
      scale(mean, 1.f / float(shape.h * shape.w));
    }
    const int columns = smaller(shape.w, int(shape.width) - column * shape.w);
    const int64_t y = row * shape.h + line, x = column * shape.w, step = shape.width * 9;
    const int64_t weight = ((image * shape.height + y) * shape.width + x) * 9;
    const float* weights = static_cast<const float*>(call.weights) + weight;
    const float* weights2 = TWO ? static_cast<const float*>(call.weights2) + weight : nullptr;
    const float* residual = ADDED == Added::residual ? place(call.residual, y, x) : nullptr;
    float* to = place(call.pixels, y, x);
#pragma unroll 1
    for (int left = lines; left > 0; --left) {
      spread(columns, weights, weights2, residual, to, near, near2, mean);
      weights += step;
      if (TWO) weights2 += step;
      if (ADDED == Added::residual) residual += call.residual.row;
      to += call.pixels.row;
    }
  }

  // A row of the tile's pixels; pointers to the first of them.
  __device__ void spread(int columns, const float* weights, const float* weights2, const float* residual, float* to,
                         const Four (&near)[9], const Four (&near2)[9], const Four& mean) const {
#pragma unroll 1
    for (; columns > 0; columns -= RUN) {
      Four sums[RUN];
#pragma unroll
      for (int i = 0; i < RUN; ++i)
        sums[i] = ADDED == Added::residual ? load(residual + i * call.residual.column) : mean;
      add(sums, weights, near);
      if (TWO) add(sums, weights2, near2);
#pragma unroll
      for (int i = 0; i < RUN; ++i) gpu::store(reinterpret_cast<Four*>(to + i * call.pixels.column), sums[i]);
      weights += 9 * RUN;
      if (TWO) weights2 += 9 * RUN;
      if (ADDED == Added::residual) residual += RUN * call.residual.column;
      to += RUN * call.pixels.column;
    }
  }

  __device__ float* place(const View& view, int64_t y, int64_t x) const {
    return static_cast<float*>(view.data) + image * view.image + y * view.row + x * view.column + channel;
  }
  static __device__ Four load(const float* from) { return gpu::load(reinterpret_cast<const Four*>(from)); }

  // The nine around the tile, zeros outside the grid: by them a weight that is not finite still shows.
  __device__ void load_tokens(Four (&near)[9], const View& view, bool wide) const {
    const float* corner = static_cast<const float*>(view.data) + image * view.image + (row - 1) * view.row +
                          (column - 1) * view.column + channel * view.channel;
#pragma unroll
    for (Four& four : near) four = Four{};
    if (wide) {
#pragma unroll
      for (int k = 0; k < 9; ++k)
        if (known(k)) near[k] = load(corner + k / 3 * view.row + k % 3 * view.column);
      return;
    }
#pragma unroll
    for (int k = 0; k < 9; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (known(k)) near[k].values[i] = gpu::load(corner + k / 3 * view.row + k % 3 * view.column + i * view.channel);
  }
  __device__ bool known(int k) const {
    return unsigned(row + k / 3 - 1) < unsigned(shape.gh) && unsigned(column + k % 3 - 1) < unsigned(shape.gw);
  }

  // Over the masses: a division for four channels.
  __device__ void divide(Four (&near)[9]) const {
    const float* masses = static_cast<const float*>(call.mass) + (int64_t(image) * shape.gh + row) * shape.gw + column;
#pragma unroll
    for (int k = 0; k < 9; ++k)
      if (known(k)) scale(near[k], 1 / (gpu::load(masses + (k / 3 - 1) * shape.gw + k % 3 - 1) + float(MASS_EPSILON)));
  }
  static __device__ void scale(Four& four, float factor) {
#pragma unroll
    for (float& value : four.values) value *= factor;
  }

  // The weights of a run of pixels times the nine.
  static __device__ void add(Four (&sums)[RUN], const float* from, const Four (&near)[9]) {
    using Piece = typename gpu::Bytes<4 * RUN>::type;
    union {
      Piece pieces[9];
      float weights[9 * RUN];
    };
#pragma unroll
    for (int i = 0; i < 9; ++i) pieces[i] = gpu::load(reinterpret_cast<const Piece*>(from) + i);
#pragma unroll
    for (int i = 0; i < RUN; ++i)
#pragma unroll
      for (int k = 0; k < 9; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i].values[j] += weights[i * 9 + k] * near[k].values[j];
  }
};

template <Added ADDED, int RUN>
__global__ void __launch_bounds__(SINGLE_SPREAD_THREADS, SINGLE_SPREAD_BLOCKS)
    spread_single_kernel(const SingleSpreadArguments arguments) {
  SingleSpreader<ADDED, RUN>(arguments).run();
}

// Whether the kernel takes a call: float in vectors of four.
inline bool spreads_single(const TokensToPixels& call) {
  const Shape& shape = call.shape;
  if (call.type != Type::single || call.pixels_type != Type::single || shape.channels % 4) return false;
  if (call.residual.data && (call.residual_type != Type::single || !call.residual.vectors(4) || call.weights2))
    return false;
  if (!call.pixels.vectors(4) || (call.means && !call.weights2) || reinterpret_cast<intptr_t>(call.means) % 16)
    return false;
  const int64_t fours = shape.channels / 4, threads = fours * shape.gw * shape.h + SINGLE_SPREAD_THREADS;
  return fours > 0 && threads < INT32_MAX / std::max(fours, int64_t(shape.h));  // what a row of the grid is divided by
}

inline void run_spread_single(const TokensToPixels& call, void* stream) {
  const Shape& shape = call.shape;
  SingleSpreadArguments a;
  a.call = call;
  a.fours = Divisor(shape.channels / 4);
  a.lines = larger(SINGLE_SPREAD_PIXELS / shape.w, 1);
  a.slices = Divisor((shape.h + a.lines - 1) / a.lines);
  a.wide[0] = call.tokens.vectors(4);
  a.wide[1] = call.tokens2.vectors(4);
  const int64_t threads = int64_t(shape.gw) * a.slices.d * a.fours.d;
  a.blocks = int((threads + SINGLE_SPREAD_THREADS - 1) / SINGLE_SPREAD_THREADS);
  const bool runs = shape.w % 4 == 0 && shape.width % 4 == 0 &&
                    (reinterpret_cast<intptr_t>(call.weights) | reinterpret_cast<intptr_t>(call.weights2)) % 16 == 0;
  const auto run = [&](auto kernel, auto each) {
    gpu::launch(runs ? each : kernel, shape.batch * shape.gh * a.blocks, SINGLE_SPREAD_THREADS, 0, stream, a);
  };
  if (call.residual.data)
    return run(spread_single_kernel<Added::residual, 1>, spread_single_kernel<Added::residual, 4>);
  if (call.weights2) return run(spread_single_kernel<Added::gradient, 1>, spread_single_kernel<Added::gradient, 4>);
  run(spread_single_kernel<Added::nothing, 1>, spread_single_kernel<Added::nothing, 4>);
}

}  // namespace stvit
