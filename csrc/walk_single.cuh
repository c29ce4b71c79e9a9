// Pooling, weighing and summing for float: fused multiply-adds on what shared memory holds, where matrix instructions
// would round to TF32. A product with zeros is never taken, so that what is not finite reaches its own neighbours alone.
//
// Pixels lie an odd number of 16 bytes apart: eight lanes that load 16 bytes of a pixel each meet no bank twice.
#pragma once

#include "walk_pool.cuh"
#include "walk_sum.cuh"
#include "walk_weigh.cuh"

namespace stvit {

__device__ inline void add_to(Four& sum, const Four& four) {
#pragma unroll
  for (int j = 0; j < 4; ++j) sum.values[j] += four.values[j];
}

// A warp takes up to 32 vectors of a tile, 2^pool_bits; where fewer, its lanes share the pixels.
template <>
struct Pooler<float> {
  const Block<float>& b;

  __device__ void pool(const Group& group) const {
    const int lane = b.lane(), blocks = int(b.a.pool_blocks.d), bits = b.a.pool_bits, width = 1 << bits;
#pragma unroll 1
    for (int i = b.WARPS - 1 - b.warp; i < group.tiles * blocks; i += b.WARPS) {
      const int tile = b.a.pool_blocks.quotient(i), vector = (i - tile * blocks) * width + (lane & width - 1);
      const bool real = vector < int(b.a.vectors.d);
      const int step = (32 >> bits) * b.walk.stride;
      const float* from = b.pixel(b.stage(group, tile), lane >> bits) + (real ? vector : 0) * 4;
      Four sum = {};
#pragma unroll 1
      for (int left = b.walk.pixels >> 7 - bits; left > 0; --left) {
#pragma unroll
        for (int j = 0; j < 4; ++j, from += step) add_to(sum, *reinterpret_cast<const Four*>(from));
      }
#pragma unroll 1
      for (int lanes = width; lanes < 32; lanes *= 2)
#pragma unroll
        for (float& value : sum.values) value += gpu::shuffle_xor(value, lanes);
      if (lane >= width || !real) continue;
#pragma unroll
      for (float& value : sum.values) value *= b.a.share;
      const int row = group.row, column = group.column + tile;
      *reinterpret_cast<Four*>(b.token(b.place(row, column)) + vector * 4) = sum;
      if (!b.region.owns_row(row) || !b.region.owns_column(column)) continue;
      const int64_t token = (int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column;
      gpu::store(reinterpret_cast<Four*>(static_cast<float*>(b.call.pooled) + token * b.shape.channels) + vector, sum);
    }
  }
};

// A warp takes 16 pixels, each by four lanes with a quarter of its channels. A lane takes two pixels, its own and the one
// of lane ^ 8, so that it loads the super tokens once for both.
template <Map MAP>
struct Weigher<float, MAP> {
  static constexpr bool GIVEN = MAP != Map::associate;  // the weights are given
  static constexpr bool TOKENS = MAP != Map::weighted;  // there are products

  const Block<float>& b;

  __device__ void weigh(const Group& group) const {
    const int parts = group.tiles * int(b.a.parts.d), lane = b.lane();
#pragma unroll 1
    for (int part = b.warp; part < parts; part += b.WARPS) {
      const int tile = b.a.parts.quotient(part), p0 = (part - tile * int(b.a.parts.d)) * 16;
      float products[9] = {};
      if (TOKENS) multiply(products, group, tile, p0, lane);
      weigh_pixel(products, group, tile, p0 + lane % 16, part, lane);
    }
  }

  __device__ void multiply(float (&own)[9], const Group& group, int tile, int p0, int lane) const {
    const int quarter = lane / 8 * 4, column = group.column + tile - 1;
    char* stage = b.stage(group, tile);
    const float* pixel = b.pixel(stage, p0 + lane % 16) + quarter;
    const float* other = b.pixel(stage, p0 + (lane % 16 ^ 8)) + quarter;
    const float* rows[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) rows[i] = b.token(b.place(group.row + i - 1, column)) + quarter;
    float others[9] = {};
#pragma unroll 4
    for (int i = quarter; i < int(b.shape.channels); i += 16) {
      const Four x = *reinterpret_cast<const Four*>(pixel), y = *reinterpret_cast<const Four*>(other);
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const Four token = *reinterpret_cast<const Four*>(rows[k / 3] + k % 3 * b.walk.token_stride);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          own[k] += x.values[j] * token.values[j];
          others[k] += y.values[j] * token.values[j];
        }
      }
      pixel += 16;
      other += 16;
#pragma unroll
      for (int k = 0; k < 3; ++k) rows[k] += 16;
    }
#pragma unroll
    for (int k = 0; k < 9; ++k) own[k] += gpu::shuffle_xor(others[k], 8);
#pragma unroll
    for (int k = 0; k < 9; ++k) own[k] += gpu::shuffle_xor(own[k], 16);
  }

  // Pixel p of a tile; two lanes hold it.
  __device__ void weigh_pixel(float (&products)[9], const Group& group, int tile, int p, int part, int lane) const {
    const int line = b.a.width.quotient(p), in_line = p - line * b.shape.w, column = group.column + tile;
    const int y = group.row * b.shape.h + line, x = column * b.shape.w + in_line;
    const bool real = p < int(b.a.tile.d);
    const bool seen = real & (y < int(b.shape.height)) & (x < int(b.shape.width));

    float weights[9] = {};
    if (GIVEN && seen) read_given<float, MAP>(b, group, tile, line, in_line, weights, products);
    if (MAP == Map::associate) associate_single(products, float(b.call.scale));
    if (MAP == Map::differentiate) differentiate<true>(products, weights);
    constexpr bool MADE = MAP == Map::associate || MAP == Map::differentiate;
    const int from = part * 16, at = (from + lane) * 9;
    if (lane < 16) {
      leave(scratch(b.walk.scratch_at) + at, MADE ? products : weights, real);
      if (MAP == Map::products) leave(scratch(b.walk.stored_at) + at, products, real);
    }
    if (!TOKENS) return;
    gpu::warp_barrier();
    const char* stored = b.shared() + (MADE ? b.walk.scratch_at : b.walk.stored_at) + from * b.WEIGHTS;
    const bool mine = seen & b.region.owns_row(group.row) & b.region.owns_column(column);
    const int to = mine ? b.weight(y, x) : -1;
    if (b.a.run == 4) return write<4>(stored, to, lane);
    if (b.a.run == 2) return write<2>(stored, to, lane);
    write<1>(stored, to, lane);
  }

  __device__ float* scratch(int at) const { return reinterpret_cast<float*>(b.shared() + at); }

  static __device__ void leave(float* to, const float (&weights)[9], bool real) {
#pragma unroll
    for (int k = 0; k < 9; ++k) to[k] = real ? weights[k] : 0;
  }

  // 16 pixels to device memory, RUN of them in nine pieces. `at`: where this lane's pixel goes, -1: not at all.
  template <int RUN>
  __device__ void write(const char* from, int at, int lane) const {
    using Piece = typename gpu::Bytes<4 * RUN>::type;
    char* image = static_cast<char*>(b.call.out) + b.image_weights();
#pragma unroll
    for (int i = lane; i < (9 * 16 / RUN + 31) / 32 * 32; i += 32) {
      const int run = i / 9, piece = i - run * 9;
      const int to = gpu::shuffle(at, run * RUN % 16);
      if (to < 0 || run * RUN >= 16) continue;
      gpu::store(reinterpret_cast<Piece*>(image + to) + piece, reinterpret_cast<const Piece*>(from)[i]);
    }
  }
};

// A thread takes two channels of a slice's pixels: a tile, or a part of it. What the slices have summed is added to the
// totals in phase 2, in a fixed order. A unit is what a slice sums of a tile.
template <Map MAP, int PAIRS>
struct Summer<float, MAP, PAIRS> {
  const Block<float>& b;
  // Of the slice's first unit, in bytes of shared memory but for the stage: where the thread reads and writes.
  int tile, fours, weights, pixels, partial, partial_mass, neighbour;
  bool sums, masses;  // whether the thread has channels, or a neighbour whose weights it adds up

  __device__ explicit Summer(const Block<float>& block) : b(block) {
    const int slice = b.a.pairs.quotient(b.thread), pair = b.thread - slice * int(b.a.pairs.d);
    const int own = b.a.split.quotient(slice), first = (slice - own * b.walk.split) * b.a.part_fours;
    // Kept, not to be worked out again for every group.
    tile = gpu::anew(slice < b.walk.slices ? own : b.walk.group);  // or nothing to sum
    fours = gpu::anew(smaller(b.a.part_fours, b.a.fours - first));
    weights = gpu::anew(b.walk.scratch_at + own * b.a.tile_scratch + first * 4 * b.WEIGHTS);
    sums = pair * 2 < int(b.shape.channels);
    masses = MAP == Map::associate && pair < 9;
    pixels = gpu::anew((first * 4 * b.walk.stride + (sums ? pair * 2 : 0)) * 4);
    partial = gpu::anew(b.walk.partials_at + (slice * 9 * int(b.shape.channels) + pair * 2) * 4);
    neighbour = gpu::anew(masses ? pair : 0);
    partial_mass = gpu::anew(b.walk.partial_masses_at + (slice * 9 + pair) * 4);
  }

  // Where a tile is shared each slice has one unit; else a whole tile, and perhaps further ones.
  __device__ void add(const Group& group) const {
    int from = weights, to = partial, mass_to = partial_mass;
#pragma unroll 1
    for (int i = tile; i < group.tiles; i += b.walk.slices) {
      Two sums[9] = {};
      float mass = 0;
      add_unit(sums, mass, b.shared() + from, b.stage(group, i) + pixels);
      if (this->sums)
#pragma unroll
        for (int k = 0; k < 9; ++k) *reinterpret_cast<Two*>(b.shared() + to + k * int(b.shape.channels) * 4) = sums[k];
      if (masses) *reinterpret_cast<float*>(b.shared() + mass_to) = mass;
      from += b.walk.slices * b.a.tile_scratch;
      to += b.walk.slices * 36 * int(b.shape.channels);
      mass_to += b.walk.slices * 36;
    }
  }

  __device__ void add_unit(Two (&sums)[9], float& mass, const char* weights, const char* pixels) const {
    const char* factor = weights + neighbour * 4;
#pragma unroll 1
    for (int left = fours; left > 0; --left) {
      Four factors[9];  // of four pixels
#pragma unroll
      for (int i = 0; i < 9; ++i) factors[i] = reinterpret_cast<const Four*>(weights)[i];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Two x = *reinterpret_cast<const Two*>(pixels + i * b.walk.stride * 4);
#pragma unroll
        for (int k = 0; k < 9; ++k) {
          const float weight = factors[(i * 9 + k) / 4].values[(i * 9 + k) % 4];
          sums[k].first += weight * x.first;
          sums[k].second += weight * x.second;
        }
        if (MAP == Map::associate) mass += *reinterpret_cast<const float*>(factor + i * b.WEIGHTS);
      }
      factor += 4 * b.WEIGHTS;
      weights += 4 * b.WEIGHTS;
      pixels += 16 * b.walk.stride;
    }
  }

  // What the slices have summed, to the totals: a thread always takes the same row of the neighbourhood and every third
  // column, in which no tile has two neighbours. From the last threads on: the first ones weigh meanwhile.
  __device__ void gather(const Group& group) const {
    const int vectors = int(b.a.vectors.d), channels = int(b.shape.channels);
#pragma unroll 1
    for (int i = b.THREADS - 1 - b.thread; i < 9 * (vectors + (MAP == Map::associate)); i += b.THREADS) {
      const bool mass = MAP == Map::associate && i >= 9 * vectors;
      const int place = mass ? i - 9 * vectors : b.a.vectors.quotient(i), line = place / 3;
      const int row = group.row + line - 1, column = group.column - 1;
      if (!b.region.owns_row(row)) continue;
      const int near = (place + 1 + 2 * group.column) % 3;  // of the first tile's columns
      if (mass) {
        gather_tiles(b.total_mass(row, column), 1, partials(b.walk.partial_masses_at) + line * 3, 1, near, group);
      } else {
        const int vector = i - place * vectors;
        Four* to = reinterpret_cast<Four*>(b.total(row, column)) + vector;
        const Four* from = reinterpret_cast<const Four*>(partials(b.walk.partials_at) + line * 3 * channels) + vector;
        gather_tiles(to, b.walk.token_stride / 4, from, vectors, near, group);
      }
    }
  }

  __device__ float* partials(int at) const { return reinterpret_cast<float*>(b.shared() + at); }

  // `step`, `from_step`: numbers from one super token, and from one neighbour, to the next.
  template <typename N>
  __device__ void gather_tiles(N* to, int step, const N* from, int from_step, int near, const Group& group) const {
#pragma unroll 1
    for (int i = 0; i < group.tiles; ++i) {
      const N* next = from + near * from_step;
      N* total = to + (i + near) * step;
      if (b.region.owns_column(group.column - 1 + i + near)) {
        N sum = *total;
        add_to(sum, *next);
#pragma unroll 4
        for (int left = b.walk.split - 1; left > 0; --left) add_to(sum, *(next += 9 * from_step));
        *total = sum;
      }
      from += b.walk.split * 9 * from_step;
      near = near > 0 ? near - 1 : 2;
    }
  }

  static __device__ void add_to(float& sum, float value) { sum += value; }
  static __device__ void add_to(Four& sum, const Four& four) { stvit::add_to(sum, four); }
};

}  // namespace stvit
