// Weights of a group's pixels: products with the 9 super tokens around, and the map on them. A warp takes 32 pixels at a
// time. As a matrix instruction leaves the products, a pixel's nine lie in eight lanes; by way of shared memory each lane
// gets one pixel whole. It leaves its weights for the sums, and 32 pixels' weights go to device memory together.
#pragma once

#include "maps.cuh"
#include "walk_block.cuh"

namespace stvit {

template <typename T>
__device__ void read_nine(float (&to)[9], const char* from) {
#pragma unroll
  for (int k = 0; k < 9; ++k) to[k] = gpu::widen(reinterpret_cast<const T*>(from)[k]);
}

// The weights given of a pixel: in place `in_line` of row `line` of a tile. Map::differentiate: and to its products their
// gradient, less the offsets of the nine super tokens.
template <typename T, Map MAP>
__device__ void read_given(const Block<T>& b, const Group& group, int tile, int line, int in_line, float (&weights)[9],
                           float (&products)[9]) {
  const int column = group.column + tile, before = in_line * b.WEIGHTS;
  const int row = b.weight(group.row * b.shape.h + line, column * b.shape.w);
  const int skipped = (row + b.misalignment() & 15) + before;
  char* stage = b.stage(group, tile);
  read_nine<T>(weights, b.weight_row(stage, 0, line) + skipped);
  if (MAP != Map::differentiate) return;
  float slopes[9] = {};
  if (b.call.grad) read_nine<T>(slopes, b.weight_row(stage, 1, line) + skipped);
#pragma unroll
  for (int k = 0; k < 9; ++k) products[k] += slopes[k] - *b.offset(b.place(group.row + k / 3 - 1, column + k % 3 - 1));
}

template <typename T, Map MAP>
struct Weigher {
  static constexpr bool GIVEN = MAP != Map::associate;  // the weights are given
  static constexpr bool TOKENS = MAP != Map::weighted;  // there are products

  const Block<T>& b;

  // `scratch_at`: of the scratch that is filled. By the warps that don't sum.
  __device__ void weigh(const Group& group, int scratch_at) const {
    const int parts = group.tiles * int(b.a.parts.d), first = 2 * (b.warp - b.walk.sum_warps);
    if (first >= parts) return;
    const int lane = b.lane();
    // What the lane gives to matrix loads: rows of the 16 neighbours, of which 9 are in use, and of 16 pixels.
    const int k = lane % 16, up = k * 11 / 32;  // k / 3 up to 9
    const int near = k < 9 ? b.place(group.row + up - 1, group.column + k - 3 * up - 1) : 4 * b.walk.known_columns;
    const T* tokens = TOKENS ? b.token(near) + lane / 16 * 8 : nullptr;
    const int next = k < 9 ? b.walk.stride : 0;  // from tile to tile
    const int pixel0 = (lane / 16 * 8 + lane % 8) * b.walk.stride + lane / 8 % 2 * 8;
#pragma unroll 1
    for (int part = first; part < parts; part += 2 * (WALK_WARPS - b.walk.sum_warps)) {
      char* scratch = b.shared() + scratch_at + part * SCRATCH;
      if (TOKENS) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const int sixteen = smaller(part + half, parts - 1), tile = b.a.parts.quotient(sixteen);
          const int p0 = (sixteen - tile * int(b.a.parts.d)) * 16;
          const T* pixels = b.pixel(b.stage(group, tile), p0) + pixel0;
          multiply(scratch + half * 64, tokens + tile * next, pixels, lane);
        }
        gpu::warp_barrier();
      }
      weigh_pixel(scratch, group, part, parts);
    }
  }

  // Products of the neighbours with 16 pixels.
  __device__ void multiply(char* scratch, const T* tokens, const T* pixels, int lane) const {
    float products[2][4] = {};
    gpu::warp_barrier();
#pragma unroll 4
    for (int left = int(b.shape.channels); left > 0; left -= 16, tokens += 16, pixels += 16) {
      uint32_t near[4], eights[4];
      gpu::load_matrices(near, gpu::shared_address(tokens));
      gpu::load_matrices(eights, gpu::shared_address(pixels));
      gpu::multiply_add<T>(products[0], near, eights[0], eights[1]);
      gpu::multiply_add<T>(products[1], near, eights[2], eights[3]);
    }
    char* to = scratch + lane / 4 * PRODUCTS_ROW + lane % 4 * 8;
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<Two*>(to + i * 32) = {products[i][0], products[i][1]};
      if (lane < 4) *reinterpret_cast<Two*>(to + 8 * PRODUCTS_ROW + i * 32) = {products[i][2], products[i][3]};
    }
  }

  // One pixel of two of the `parts` sixteens of a group.
  __device__ void weigh_pixel(char* scratch, const Group& group, int first, int parts) const {
    const int lane = b.lane(), part = first + lane / 16;
    const int tile = b.a.parts.quotient(part), p = (part - tile * int(b.a.parts.d)) * 16 + lane % 16;
    const int line = b.a.width.quotient(p), in_line = p - line * b.shape.w, column = group.column + tile;
    const int y = group.row * b.shape.h + line, x = column * b.shape.w + in_line;
    const bool real = part < parts && p < int(b.a.tile.d);
    const bool seen = real && y < int(b.shape.height) && x < int(b.shape.width);

    float products[9] = {}, weights[9] = {};
    if (TOKENS)
#pragma unroll
      for (int k = 0; k < 9; ++k) products[k] = reinterpret_cast<float*>(scratch + k * PRODUCTS_ROW)[lane];
    if (GIVEN && seen) read_given<T, MAP>(b, group, tile, line, in_line, weights, products);
    if (MAP == Map::associate) associate(products, float(b.call.scale));
    if (MAP == Map::differentiate) differentiate<false>(products, weights);
    if (TOKENS) gpu::warp_barrier();  // all have read their products
    const bool made = MAP == Map::associate || MAP == Map::differentiate;
#pragma unroll
    for (int k = 0; k < 9; ++k)
      if (made && !real) products[k] = 0;
    char* own = scratch + lane / 16 * SCRATCH;
    leave(own + lane % 16 * 2, made ? products : weights);
    if (!TOKENS) return;
    char* stored = own + STORED_AT + lane % 16 * 18;
#pragma unroll
    for (int k = 0; k < 9; ++k) reinterpret_cast<T*>(stored)[k] = gpu::narrow<T>(products[k]);
    gpu::warp_barrier();
    const bool mine = seen && b.region.owns_row(group.row) && b.region.owns_column(column);
    const int at = mine ? b.weight(y, x) : -1;
    if (b.a.run > 4) return write<8>(scratch, at);  // by order, or nvcc makes a table of addresses of it
    if (b.a.run > 2) return write<4>(scratch, at);
    if (b.a.run > 1) return write<2>(scratch, at);
    write<1>(scratch, at);
  }

  // For the sums.
  static __device__ void leave(char* to, const float (&weights)[9]) {
#pragma unroll
    for (int k = 0; k < 9; ++k) *reinterpret_cast<T*>(to + k * WEIGHTS_ROW) = gpu::narrow<T>(weights[k]);
  }

  // To device memory, RUN pixels in nine pieces. `at`: where this lane's pixel goes, -1: not at all.
  template <int RUN>
  __device__ void write(const char* scratch, int at) const {
    using Piece = typename gpu::Bytes<2 * RUN>::type;
    char* image = static_cast<char*>(b.call.out) + b.image_weights();
#pragma unroll
    for (int i = b.lane(); i < (9 * 32 / RUN + 31) / 32 * 32; i += 32) {
      const int run = i / 9, piece = i - run * 9;
      const int to = gpu::shuffle(at, run * RUN % 32);
      if (to < 0 || run * RUN >= 32) continue;
      const char* from = scratch + run * RUN / 16 * SCRATCH + STORED_AT + run * RUN % 16 * 18 + piece * 2 * RUN;
      gpu::store(reinterpret_cast<Piece*>(image + to + piece * 2 * RUN), *reinterpret_cast<const Piece*>(from));
    }
  }
};

}  // namespace stvit
