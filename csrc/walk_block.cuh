// What the parts of the walk (walk.cuh) share: the call, a thread's place, and the map of shared memory.
//
//   stages    a ring of tiles: pixels [pixel][channel], then the weights given as copied, then their gradient
//   zeros     16 bytes
//   tokens    [5 rows][columns around][channel]: row i of the grid in row i % 4; row 4, and columns outside, are zeros
//   offsets   [5 rows][columns around], for Map::differentiate: <dS, S> / mass of the super tokens
//   totals    [3 rows][column][channel] float: sums of the super tokens that the walk is among; row i in row i % 3
//   masses    [4 rows][column] float, for Map::associate; row i in row i % 4
//   scratch   for every 32 pixels of a group SCRATCH bytes, first their products [neighbour][pixel] as float, then in
//             the same place their weights [slot][pixel], which are summed with, and [pixel][neighbour], to be stored
#pragma once

#include <gpu.cuh>

#include "launch.h"
#include "region.cuh"

namespace stvit {

struct WalkArguments {
  PixelsToTokens call;
  Walk walk;
  Divisor vectors;                  // 16-byte vectors of a pixel
  Divisor tile;                     // pixels of a tile
  Divisor width;                    // pixels of a tile's row
  Divisor height;                   // rows of a tile
  Divisor parts;                    // sixteens of pixels in a tile
  Divisor weight_pieces;            // 16-byte pieces of a tile row's weights
  int run;                          // pixels of a run: their weights are written 2 run bytes at a time
  int pass, pass_tiles;             // pixels that all threads copy at a time, of how many tiles
  int pass_lines, pass_columns;     // from a pixel of a tile to the one that its thread copies next,
  int pass_step, wrap_step;         // in bytes, and what it takes to wrap to the next line
  int tile_row, tile_column;        // from a tile to the one below and to the one on its right, in bytes
  int passes;                       // that a tile takes
  Divisor pool_blocks;              // blocks of channels that are pooled
  int pool_tiles;                   // tiles that the pooling warps take at a time
  float share;                      // 1 / (h w)
  bool token_vectors, out_vectors;  // whether super tokens are read, and sums written, eight channels at a time
};

constexpr int POOL_CHANNELS = 64;  // that a warp pools at a time
static_assert(WALK_CHANNELS <= POOL_CHANNELS * (WALK_WARPS - SUM_WARPS));

inline WalkArguments walk_arguments(const PixelsToTokens& call, const Walk& walk) {
  const Shape& shape = call.shape;
  const int vectors = int(shape.channels) / 8, tile = shape.h * shape.w;
  WalkArguments a;
  a.call = call;
  a.walk = walk;
  a.vectors = Divisor(vectors);
  a.tile = Divisor(tile);
  a.width = Divisor(shape.w);
  a.height = Divisor(shape.h);
  a.parts = Divisor(walk.pixels / 16);
  a.weight_pieces = Divisor(walk.weight_row / 16);
  a.run = 8;  // a run lies in one row of a tile, and begins on 2 run bytes
  while (shape.w % a.run || shape.width % a.run || reinterpret_cast<intptr_t>(call.out) % (2 * a.run)) a.run /= 2;
  const int line = int(call.pixels.row) * 2, column = int(call.pixels.column) * 2;  // of pixels, in bytes
  a.pass = 32 * WALK_WARPS / vectors;
  a.pass_tiles = a.pass / tile > 1 ? a.pass / tile : 1;
  if (a.pass > a.pass_tiles * tile) a.pass = a.pass_tiles * tile;
  a.pass_lines = a.pass / shape.w;
  a.pass_columns = a.pass % shape.w;
  a.pass_step = a.pass_lines * line + a.pass_columns * column;
  a.wrap_step = line - shape.w * column;
  a.tile_row = shape.h * line;
  a.tile_column = shape.w * column;
  a.passes = (tile + a.pass - 1) / a.pass;
  a.pool_blocks = Divisor((shape.channels + POOL_CHANNELS - 1) / POOL_CHANNELS);
  a.pool_tiles = (WALK_WARPS - SUM_WARPS) / int(a.pool_blocks.d);
  a.share = 1.f / float(tile);
  a.token_vectors = call.tokens.vectors(2);
  a.out_vectors = call.stokens.vectors(2);
  return a;
}

// Of the scratch of 32 pixels: rows, in bytes, that matrix loads and the stores before them meet in no bank twice.
constexpr int PRODUCTS_ROW = 40 * 4, WEIGHTS_ROW = 80, STORED_AT = 9 * WEIGHTS_ROW;
static_assert(9 * PRODUCTS_ROW <= SCRATCH && STORED_AT + 32 * 18 <= SCRATCH && SCRATCH % 16 == 0);

// What one instruction moves.
struct alignas(8) Two {
  float first, second;
};

template <typename T>
struct Block {
  static constexpr int THREADS = 32 * WALK_WARPS;

  const WalkArguments& a;
  const PixelsToTokens& call;
  const Walk& walk;
  const Shape& shape;
  const int thread, warp;
  const Region region;

  __device__ Block(const WalkArguments& arguments, int index)
      : a(arguments),
        call(a.call),
        walk(a.walk),
        shape(a.call.shape),
        thread(threadIdx.x),
        warp(thread / 32),
        region(shape, walk, index) {}

  // Parts of the walk work out from the lane what they need, each time, or it would fill the registers of the others.
  __device__ int lane() const { return gpu::anew(thread) % 32; }

  static __device__ char* shared() { return gpu::shared_memory(); }
  __device__ char* stage(const Group& group, int tile) const {
    const int at = group.stage + tile;
    return shared() + (at < walk.stages ? at : at - walk.stages) * walk.stage_bytes;
  }
  __device__ T* pixel(char* stage, int p) const { return reinterpret_cast<T*>(stage) + p * walk.stride; }
  // Weights (grad 0) or their gradient (1) of row `line` of a tile, as copied.
  __device__ char* weight_row(char* stage, int grad, int line) const {
    return stage + walk.pixels * walk.stride * 2 + (grad * shape.h + line) * walk.weight_row;
  }

  __device__ const char* zeros() const { return shared() + walk.zeros_at; }
  // Place of a super token next to a tile that the region walks over: zeros outside the grid.
  __device__ int place(int row, int column) const {
    const int ring = row >= 0 && row < shape.gh ? row & 3 : 4;
    return ring * walk.known_columns + column - (region.column0 - 1);
  }
  __device__ T* token(int place) const { return reinterpret_cast<T*>(shared() + walk.tokens_at) + place * walk.stride; }
  __device__ float* offset(int place) const { return reinterpret_cast<float*>(shared() + walk.offsets_at) + place; }

  __device__ float* total(int row, int column) const {
    return reinterpret_cast<float*>(shared() + walk.totals_at) + (row + 3) % 3 * walk.totals_row +
           (column - region.first_column) * (walk.stride - 8);
  }
  __device__ float* total_mass(int row, int column) const {
    return reinterpret_cast<float*>(shared() + walk.masses_at) + (row & 3) * walk.columns + column -
           region.first_column;
  }
  __device__ char* scratch(int pixels32) const { return shared() + walk.scratch_at + pixels32 * SCRATCH; }

  // Bytes from the first weight of the image to the nine of a pixel.
  __device__ int weight(int y, int x) const { return (y * int(shape.width) + x) * 18; }
  // Bytes of an image's weights: H W 18 < 2^31 is a condition of the plan, times images it may be more.
  __device__ int64_t image_weights() const { return region.image * (shape.height * shape.width * 18); }
  // How far behind a multiple of 16 bytes the image's weights begin.
  __device__ int misalignment() const { return int(image_weights() & 15); }
};

}  // namespace stvit
