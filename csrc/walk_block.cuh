// What the parts of the walk (walk.cuh) share: the call, a thread's place, and the map of shared memory.
//
//   stages    a ring of tiles: pixels [pixel][channel], then the weights given as copied, then their gradient
//   zeros     16 bytes
//   tokens    [5 rows][columns around][channel]: row i of the grid in row i % 4; row 4, and columns outside, are zeros
//   offsets   [5 rows][columns around], for Map::differentiate: <dS, S> / mass of the super tokens
//   totals    [4 rows, of float 3][column][channel] float, padded: sums of the super tokens that the walk is among, and
//             of a row that is being written; row i in row i % 4
//   masses    [8 rows, of float 4][column] float, for Map::associate; row i in row i % 8
//   scratch   twice, one is summed with while the other is filled: for every 16 pixels of a group SCRATCH bytes; two of
//             them hold first the products of 32 pixels [neighbour][pixel] as float, then in the same place each its
//             pixels' weights [neighbour][pixel], which are summed with, and [pixel][neighbour], to be stored
//             float: [pixel][neighbour] summed with, and for Map::products the same again, to be stored
//   partials  float: [unit][neighbour][channel], what a slice of the threads has summed of a tile; then their masses
#pragma once

#include <gpu.cuh>

#include "launch.h"
#include "region.cuh"
#include "vectors.cuh"

namespace stvit {

struct WalkArguments {
  PixelsToTokens call;
  Walk walk;
  Regions regions;
  Divisor vectors;                  // 16-byte vectors of a pixel
  Divisor pairs, split;             // float: twos of channels, slices that share a tile
  Divisor pool_blocks;              // of 32 channels, or for float of 2^pool_bits vectors, which a warp pools at a time
  int pool_tiles;                   // that a warp pools,
  int pool_bits;                    // for float
  int fours, part_fours;            // float: fours of pixels in a tile, and in what a slice takes of it
  Divisor tile;                     // pixels of a tile
  Divisor width;                    // pixels of a tile's row
  Divisor parts;                    // sixteens of pixels in a tile
  Divisor tile_pieces, row_pieces;  // 16-byte pieces of the weights of a tile, and of a row of it
  int weight_tiles;                 // tiles whose weights the threads copy at a time
  int image_weights;                // bytes of the weights of an image,
  int line_weights, row_weights;    // of a row of its pixels, and of a row of a tile
  int tile_scratch;                 // bytes of scratch of a tile
  int run;                          // pixels of a run: of their weights as many numbers are written at a time
  int pass, pass_tiles;             // pixels that the threads copy at a time, of how many tiles
  bool whole;                       // whether those are whole rows of tiles, and tiles lie in the image as a whole
  int pass_lines, pass_columns;     // from a pixel of a tile to the one that its thread copies next,
  int pass_step, wrap_step;         // in bytes, and what it takes to wrap to the next line
  int tile_row, tile_column;        // from a tile to the one below and to the one on its right, in bytes
  int passes;                       // that a tile takes
  float share;                      // 1 / (h w)
  bool token_vectors, out_vectors;  // whether super tokens are read, and sums written, 16 bytes at a time
};

constexpr int POOL_CHANNELS = 32;  // that a warp pools at a time
static_assert(POOLED_CHANNELS <= POOL_CHANNELS * (WALK_WARPS - SUM_WARPS));

inline WalkArguments walk_arguments(const PixelsToTokens& call, const Walk& walk) {
  const Shape& shape = call.shape;
  const int size = size_of(call.type);
  const int warps = size == 2 ? WALK_WARPS : SINGLE_WARPS;
  const int threads = 32 * (warps - (sums_apart(call.map, size) ? walk.sum_warps : 0));  // that copy
  const int vectors = int(shape.channels) * size / 16, tile = shape.h * shape.w;
  WalkArguments a;
  a.call = call;
  a.walk = walk;
  const int of_row = (shape.gw + walk.columns - 1) / walk.columns;
  a.regions = {Divisor((shape.gh + walk.rows - 1) / walk.rows * of_row), Divisor(of_row), Divisor(walk.group)};
  a.vectors = Divisor(vectors);
  a.pairs = Divisor(walk.slice_threads > 0 ? walk.slice_threads : 1);
  a.split = Divisor(size == 2 ? 1 : walk.split);
  a.pool_bits = 3;  // 8; of small tiles all at once
  while (a.pool_bits < 5 && 1 << a.pool_bits < vectors && tile << a.pool_bits < 512) ++a.pool_bits;
  const int blocks = int(size == 2 ? (shape.channels + POOL_CHANNELS - 1) / POOL_CHANNELS
                                   : (vectors + (1 << a.pool_bits) - 1) >> a.pool_bits);
  a.pool_blocks = Divisor(blocks);
  const int shares = larger((WALK_WARPS - walk.sum_warps) / blocks, 1);  // of a group's tiles
  const int sixteens = walk.pixels / 16;  // a warp takes at least four, to be worth its while
  a.pool_tiles = larger((walk.group + shares - 1) / shares, (3 + sixteens) / sixteens);
  a.fours = (tile + 3) / 4;
  a.part_fours = (a.fours + int(a.split.d) - 1) / int(a.split.d);
  a.tile = Divisor(tile);
  a.width = Divisor(shape.w);
  a.parts = Divisor(walk.pixels / 16);
  a.row_pieces = Divisor(walk.weight_row / 16);
  a.tile_pieces = Divisor(shape.h * walk.weight_row / 16);
  a.weight_tiles = larger(threads / int(a.tile_pieces.d), 1);
  a.line_weights = int(shape.width) * 9 * size;
  a.image_weights = int(shape.height) * a.line_weights;
  a.row_weights = shape.w * 9 * size;
  a.tile_scratch = size == 2 ? walk.pixels / 16 * SCRATCH : walk.pixels * 36;
  a.run = 16 / size;  // a run lies in one row of a tile, and begins on size x run bytes
  while (shape.w % a.run || shape.width % a.run || reinterpret_cast<intptr_t>(call.out) % (size * a.run)) a.run /= 2;
  const int line = int(call.pixels.row) * size, column = int(call.pixels.column) * size;  // of pixels, in bytes
  a.pass = threads / vectors;
  a.pass_tiles = a.pass / tile > 1 ? a.pass / tile : 1;
  if (a.pass > a.pass_tiles * tile) a.pass = a.pass_tiles * tile;
  if (a.pass >= shape.w && a.pass < tile) a.pass = a.pass / shape.w * shape.w;
  a.whole = a.pass >= shape.w && shape.height % shape.h == 0 && shape.width % shape.w == 0;
  a.pass_lines = a.pass / shape.w;
  a.pass_columns = a.pass % shape.w;
  a.pass_step = a.pass_lines * line + a.pass_columns * column;
  a.wrap_step = line - shape.w * column;
  a.tile_row = shape.h * line;
  a.tile_column = shape.w * column;
  a.passes = (tile + a.pass - 1) / a.pass;
  a.share = 1.f / float(tile);
  a.token_vectors = call.tokens.vectors(size);
  a.out_vectors = call.stokens.vectors(size);
  return a;
}

// Of the scratch: rows, in bytes, that matrix loads and the stores before them meet in no bank twice.
constexpr int PRODUCTS_ROW = 40 * 4, WEIGHTS_ROW = 48, STORED_AT = 9 * WEIGHTS_ROW;
static_assert(9 * PRODUCTS_ROW <= 2 * SCRATCH && STORED_AT + 16 * 18 <= SCRATCH && SCRATCH % 16 == 0);
constexpr int SLOT_TILES = 3;  // that are summed together

template <typename T>
struct Block {
  static constexpr bool SINGLE = sizeof(T) == 4;
  static constexpr int WARPS = SINGLE ? SINGLE_WARPS : WALK_WARPS, THREADS = 32 * WARPS;
  static constexpr int VECTOR = 16 / sizeof(T);  // numbers of 16 bytes
  static constexpr int WEIGHTS = 9 * sizeof(T);  // bytes of a pixel's weights
  static constexpr int TOTAL_ROWS = total_rows(sizeof(T)), MASS_ROWS = mass_rows(sizeof(T));

  const WalkArguments& a;
  const PixelsToTokens& call;
  const Walk& walk;
  const Shape& shape;
  const int thread, warp;
  const gpu::Shared base;  // of shared memory
  const Region region;

  // `kept`: what a region knows is held in registers.
  __device__ Block(const WalkArguments& arguments, int index, bool kept)
      : a(arguments),
        call(a.call),
        walk(a.walk),
        shape(a.call.shape),
        thread(gpu::anew(threadIdx.x)),
        warp(gpu::anew(threadIdx.x / 32)),
        base(gpu::anew(gpu::shared_address(shared()))),
        region(shape, walk, a.regions, index, kept) {}

  // Parts of the walk work out from the lane what they need, each time, or it would fill the registers of the others.
  __device__ int lane() const { return gpu::anew(thread) & 31; }

  // Threads that weigh: the last ones.
  __device__ int weighing() const { return THREADS - 32 * walk.sum_warps; }

  static __device__ char* shared() { return gpu::shared_memory(); }
  __device__ int stage_at(const Group& group, int tile) const {
    const int at = group.stage + tile;
    return (at < walk.stages ? at : at - walk.stages) * walk.stage_bytes;
  }
  __device__ char* stage(const Group& group, int tile) const { return shared() + stage_at(group, tile); }
  __device__ T* pixel(char* stage, int p) const { return reinterpret_cast<T*>(stage) + p * walk.stride; }
  // Weights (grad 0) or their gradient (1) of row `line` of a tile, as copied.
  __device__ char* weight_row(char* stage, int grad, int line) const {
    return stage + walk.pixels * walk.stride * int(sizeof(T)) + (grad * shape.h + line) * walk.weight_row;
  }

  // Place of a super token next to a tile that the region walks over: zeros outside the grid.
  __device__ int place(int row, int column) const {
    const int ring = row >= 0 && row < shape.gh ? row & 3 : 4;
    return ring * walk.known_columns + column - (region.column0 - 1);
  }
  __device__ T* token(int place) const {
    return reinterpret_cast<T*>(shared() + walk.tokens_at) + place * walk.token_stride;
  }
  __device__ float* offset(int place) const { return reinterpret_cast<float*>(shared() + walk.offsets_at) + place; }

  __device__ float* total(int row, int column) const {
    return reinterpret_cast<float*>(shared() + walk.totals_at) + (row + TOTAL_ROWS) % TOTAL_ROWS * walk.totals_row +
           (column - region.first_column) * walk.token_stride;
  }
  __device__ float* total_mass(int row, int column) const {
    return reinterpret_cast<float*>(shared() + walk.masses_at) + (row & MASS_ROWS - 1) * walk.columns + column -
           region.first_column;
  }
  // Where the scratch is that step `step` fills and the next one sums with.
  __device__ int scratch(int step) const { return walk.scratch_at + (step & 1) * walk.scratch_bytes; }

  // Bytes from the first weight of the image to the nine of a pixel.
  __device__ int weight(int y, int x) const { return (y * int(shape.width) + x) * WEIGHTS; }
  // Bytes of an image's weights: less than 2^31 is a condition of the plan, times images it may be more.
  __device__ int64_t image_weights() const { return region.image * (shape.height * shape.width * WEIGHTS); }
  // How far behind a multiple of 16 bytes the image's weights begin.
  __device__ int misalignment() const { return int(image_weights() & 15); }
};

}  // namespace stvit
