// Super tokens to pixels for 16-bit numbers in channels_last, by matrix products: 16 pixels x 16 slots, of which 9 hold
// weights, times 16 slots x 8 channels.
//
// A block of threads takes a run of tiles in a row of the grid. The super tokens around it are staged in shared memory
// once; a warp takes 16 pixels of a tile at a time, its weights straight from device memory into matrix fragments.
//
// In the result of a product, lane l holds columns 2 (l % 4) and the next. So that it ends up with eight channels in a
// row, 16 bytes to store at once, super tokens are staged in another order within 32 channels: channel 8 i + 2 j + e in
// place 8 j + 2 i + e, whereby the products j = 0..3 give lane i the channels 8 i .. 8 i + 7.
//
// Bytes, X those of the pixels: A = 9/C X read, 1 X written, and what is added read once; the super tokens, X / (h w),
// are read 3 (run + 2) / run times, mostly from the cache.
#pragma once

#include <gpu.cuh>

#include "launch.h"
#include "region.cuh"

namespace stvit {

struct SpreadArguments {
  TokensToPixels call;
  int run, runs;    // tiles of a run, runs of a row
  int stride;       // elements of a staged super token
  Divisor pitch;    // places of a staged row: 3 modulo 8, so that eight of a 3 x 3 neighbourhood meet no bank twice
  Divisor vectors;  // eights of channels of a staged super token
  Divisor parts;    // sixteens of pixels in a tile
  Divisor width;    // pixels of a tile's row
  bool wide[2];     // whether super tokens of either sum can be read eight channels at a time
};

constexpr int SPREAD_WARPS = 4;
constexpr int SPREAD_BLOCKS = 7;       // on a multiprocessor, at least
constexpr int SPREAD_CHANNELS = 1024;  // at most
constexpr int SPREAD_TILE = 1 << 16;   // pixels at most

// What is added to the first sum: nothing; a residual; or a second sum, and means where there are any.
enum class Added { nothing, residual, gradient };

// OUT: the type of pixels and residual, T or float.
template <typename T, typename OUT, Added ADDED>
struct Spreader {
  static constexpr bool TWO = ADDED == Added::gradient;  // there is a second sum

  const SpreadArguments& a;
  const TokensToPixels& call;
  const Shape& shape;
  const int thread, warp, lane;
  T* const staged;
  int image, row, first, tiles;  // of the run

  __device__ Spreader(const SpreadArguments& arguments, unsigned block)
      : a(arguments),
        call(a.call),
        shape(a.call.shape),
        thread(threadIdx.x),
        warp(thread / 32),
        lane(thread % 32),
        staged(reinterpret_cast<T*>(gpu::shared_memory())) {
    first = int(block % a.runs) * a.run;
    row = int(block / a.runs % shape.gh);
    image = int(block / a.runs / shape.gh);
    tiles = first + a.run < shape.gw ? a.run : shape.gw - first;
  }

  // Super tokens of the three rows and tiles + 2 columns around the run, of the first and then of the second sum; the
  // last place stays zero, as do places outside the grid.
  __device__ int places() const { return 3 * int(a.pitch.d); }
  __device__ T* place(int sum, int k_row, int column) const {
    return staged + ((sum * 3 + k_row) * int(a.pitch.d) + column) * a.stride;
  }
  __device__ T* zeros() const { return staged + (TWO ? 2 : 1) * places() * a.stride; }

  __device__ void run() {
    const int vectors = int(a.vectors.d), sums = TWO ? 2 : 1, parts = int(a.parts.d);
#pragma unroll 1
    for (int i = thread; i < (sums * places() + 1) * vectors; i += 32 * SPREAD_WARPS) {
      const int at = a.vectors.quotient(i);
      stage(at, (i - at * vectors) * 8, sums);
    }
    gpu::barrier();
#pragma unroll 1
    for (int part = warp; part < tiles * parts; part += SPREAD_WARPS) {
      const int tile = a.parts.quotient(part);
      spread(tile, (part - tile * parts) * 16);
    }
  }

  // Eight channels of one place.
  __device__ void stage(int at, int channel, int sums) const {
    const int line = a.pitch.quotient(at), sum = line / 3, k_row = line - sum * 3;
    const int column = first - 1 + at - line * int(a.pitch.d), near = row + k_row - 1;
    const bool wanted = sum < sums && column <= first + tiles;
    const bool known = wanted && near >= 0 && near < shape.gh && column >= 0 && column < shape.gw;
    const View& view = sum == 0 ? call.tokens : call.tokens2;
    const T* from = static_cast<const T*>(view.data) + image * view.image + near * view.row + column * view.column;
    union {
      T values[8];
      int4 vector;
    };
    if (known && channel < shape.channels && a.wide[sum]) {
      vector = gpu::load(reinterpret_cast<const int4*>(from + channel));
    } else {
      for (int i = 0; i < 8; ++i) {
        const bool inside = known && channel + i < shape.channels;
        values[i] = inside ? gpu::load(from + (channel + i) * view.channel) : gpu::narrow<T>(0);
      }
    }
    if (known && sum == 0 && call.mass) {
      const float mass =
          gpu::load(static_cast<const float*>(call.mass) + (int64_t(image) * shape.gh + near) * shape.gw + column);
      const float factor = gpu::reciprocal(mass + float(MASS_EPSILON));
      for (int i = 0; i < 8; ++i) values[i] = gpu::narrow<T>(gpu::widen(values[i]) * factor);
    }
    T* to = staged + at * a.stride + channel / 32 * 32 + channel / 8 % 4 * 2;
    for (int j = 0; j < 4; ++j) *reinterpret_cast<uint32_t*>(to + j * 8) = gpu::pack(values[2 * j], values[2 * j + 1]);
  }

  // 16 pixels of a tile, all channels.
  __device__ void spread(int tile, int p0) const {
    Pixel pixels[2];  // p0 + lane / 4, and the one 8 further
    for (int half = 0; half < 2; ++half) pixels[half] = pixel(tile, p0 + lane / 4 + 8 * half);
    uint32_t factors[4], factors2[4];
    load_weights(factors, call.weights, pixels);
    if (TWO) load_weights(factors2, call.weights2, pixels);
    // Lane l gives the row of slot l % 16 to the matrix loads; lanes from 16 on those of the next product.
    const int slot = lane % 16;
    const T* near = slot < 9 ? place(0, slot / 3, tile + slot % 3) : zeros();
    const T* near2 = slot < 9 ? place(1, slot / 3, tile + slot % 3) : zeros();
    for (int channel = 0; channel < int(shape.channels); channel += 32) {
      float values[4][4] = {};
      multiply(values, factors, near + channel + lane / 16 * 8);
      if (TWO) {
        float second[4][4] = {};
        multiply(second, factors2, near2 + channel + lane / 16 * 8);
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < 4; ++i) values[j][i] += float(call.scale2) * second[j][i];
      }
      const int own = channel + lane % 4 * 8;
      for (int half = 0; half < 2; ++half)
        if (pixels[half].real && own < int(shape.channels)) write(values, half, pixels[half], first + tile, own);
    }
  }

  // Elements from the image to where a pixel is written, to its residual, and to the first of its weights.
  struct Pixel {
    int to, residual, weight;
    bool real;  // in the image
  };
  __device__ Pixel pixel(int tile, int p) const {
    const int line = a.width.quotient(p), y = row * shape.h + line;
    const int x = (first + tile) * shape.w + p - line * shape.w;
    const bool real = line < shape.h && y < int(shape.height) && x < int(shape.width);
    const auto at = [&](const View& view) { return real ? y * int(view.row) + x * int(view.column) : 0; };
    return {at(call.pixels), at(call.residual), real ? (y * int(shape.width) + x) * 9 : 0, real};
  }

  // A matrix fragment: row lane / 4 and 8 further, slots 2 (lane % 4) and the next, and those 8 further.
  __device__ void load_weights(uint32_t (&to)[4], const void* weights, const Pixel (&pixels)[2]) const {
    const T none = gpu::narrow<T>(0);
    for (int half = 0; half < 2; ++half) {
      const T* image_weights = static_cast<const T*>(weights) + image * (shape.height * shape.width * 9);
      const T* from = image_weights + pixels[half].weight;
      const bool real = pixels[half].real;
      const int k = lane % 4 * 2;
      to[half] = real ? gpu::pack(gpu::load(from + k), gpu::load(from + k + 1)) : gpu::pack(none, none);
      to[half + 2] = gpu::pack(real && k == 0 ? gpu::load(from + 8) : none, none);
    }
  }

  static __device__ void multiply(float (&values)[4][4], const uint32_t (&factors)[4], const T* near) {
    gpu::warp_barrier();
    for (int j = 0; j < 4; j += 2) {
      uint32_t b[4];
      gpu::load_matrices_transposed(b, gpu::shared_address(near + j * 8));
      gpu::multiply_add<T>(values[j], factors, b[0], b[1]);
      gpu::multiply_add<T>(values[j + 1], factors, b[2], b[3]);
    }
  }

  // Eight channels of a pixel.
  __device__ void write(const float (&values)[4][4], int half, const Pixel& pixel, int column, int channel) const {
    float sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = values[i / 2][2 * half + i % 2];
    if (TWO && call.means) {
      const int64_t tile = (int64_t(image) * shape.gh + row) * shape.gw + column;
      add<T>(sums, static_cast<const T*>(call.means) + tile * shape.channels + channel, 1.f / float(shape.h * shape.w));
    }
    if (ADDED == Added::residual) {
      const OUT* from = static_cast<const OUT*>(call.residual.data) + image * call.residual.image;
      add<OUT>(sums, from + pixel.residual + channel, 1.f);
    }
    union {
      OUT narrow[8];
      int4 vectors[sizeof(OUT) / 2];
    };
    for (int i = 0; i < 8; ++i) narrow[i] = gpu::narrow<OUT>(sums[i]);
    OUT* to = static_cast<OUT*>(call.pixels.data) + image * call.pixels.image + pixel.to + channel;
    for (int i = 0; i < int(sizeof(OUT) / 2); ++i) gpu::store(reinterpret_cast<int4*>(to) + i, vectors[i]);
  }

  template <typename FROM>
  static __device__ void add(float (&sums)[8], const FROM* from, float factor) {
    union {
      FROM narrow[8];
      int4 vectors[sizeof(FROM) / 2];
    };
    for (int i = 0; i < int(sizeof(FROM) / 2); ++i) vectors[i] = gpu::load(reinterpret_cast<const int4*>(from) + i);
    for (int i = 0; i < 8; ++i) sums[i] += gpu::widen(narrow[i]) * factor;
  }
};

template <typename T, typename OUT, Added ADDED>
__global__ void __launch_bounds__(32 * SPREAD_WARPS, SPREAD_BLOCKS) spread_kernel(const SpreadArguments arguments) {
  Spreader<T, OUT, ADDED>(arguments, blockIdx.x).run();
}

// Whether the kernel takes a call: 16-bit numbers in vectors of eight.
inline bool spreads(const TokensToPixels& call) {
  const bool narrow = call.type == Type::half || call.type == Type::bfloat16;
  if (!narrow || call.shape.channels % 8 || call.shape.channels > SPREAD_CHANNELS) return false;
  if (call.pixels_type != call.type && call.pixels_type != Type::single) return false;
  const int size = call.pixels_type == Type::single ? 4 : 2;
  // Offsets within an image are 32-bit; of what can be added, one thing is.
  const auto reach = [&](const View& view) { return view.row * call.shape.height + view.column * call.shape.width; };
  if (reach(call.pixels) > INT32_MAX || reach(call.residual) > INT32_MAX) return false;
  if (call.shape.height * call.shape.width * 9 > INT32_MAX || (call.residual.data && call.weights2)) return false;
  if ((call.means && !call.weights2) || int64_t(call.shape.h) * call.shape.w > SPREAD_TILE) return false;
  if (!call.pixels.vectors(size) || reinterpret_cast<intptr_t>(call.means) % 16) return false;
  return !call.residual.data || (call.residual_type == call.pixels_type && call.residual.vectors(size));
}

// Places of a staged row for a run of tiles.
inline int pitch(int run) { return run + 2 <= 3 ? 3 : 11; }

template <typename T, typename OUT>
void run_spread(const TokensToPixels& call, void* stream) {
  const Shape& shape = call.shape;
  SpreadArguments a;
  a.call = call;
  a.stride = int((shape.channels + 31) / 32 * 32 + 8);
  const int64_t token = int64_t(a.stride) * 2 * (call.weights2 ? 2 : 1);
  a.wide[0] = call.tokens.vectors(2);
  a.wide[1] = call.tokens2.vectors(2);
  a.vectors = Divisor((a.stride - 8) / 8);
  a.parts = Divisor((shape.h * shape.w + 15) / 16);
  a.width = Divisor(shape.w);
  a.run = 8;  // or fewer, so that 48 KiB hold the super tokens
  while (a.run > 1 && (3 * pitch(a.run) + 1) * token > 48 * 1024) --a.run;
  a.runs = (shape.gw + a.run - 1) / a.run;
  a.run = (shape.gw + a.runs - 1) / a.runs;
  a.pitch = Divisor(pitch(a.run));
  const int64_t places = 3 * pitch(a.run) * (call.weights2 ? 2 : 1) + 1;
  const auto run = [&](auto kernel) {
    gpu::launch(kernel, shape.batch * shape.gh * a.runs, 32 * SPREAD_WARPS, places * a.stride * 2, stream, a);
  };
  if (call.residual.data) return run(spread_kernel<T, OUT, Added::residual>);
  if constexpr (std::is_same_v<T, OUT>) {
    if (call.weights2) return run(spread_kernel<T, OUT, Added::gradient>);
    run(spread_kernel<T, OUT, Added::nothing>);
  }
}

}  // namespace stvit
