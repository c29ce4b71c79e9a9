// How a call is carried out, decided from its shape alone: plain C++, so that `python -m stvit.info` can explain it on
// any machine.
#pragma once

#include <cstdint>

namespace stvit {

enum class Type { half, bfloat16, single, twofold };  // fp16, bf16, fp32, fp64
inline int size_of(Type type) { return type == Type::twofold ? 8 : type == Type::single ? 4 : 2; }

// What happens to the products P = pixel . super token of a pixel with its 9 neighbours.
enum class Map {
  associate,      // weights = softmax(scale P), stored; they are what is summed with
  weighted,       // no products; the weights given are summed with
  products,       // P is stored; the weights given are summed with
  differentiate,  // dA = grad + P - offset, dlogit = A (dA - sum A dA), stored; dlogit is summed with
};

struct Shape {
  int64_t batch, channels, height, width;
  int h, w;    // tile
  int gh, gw;  // grid
};

// Limits of a GPU: multiprocessors, and bytes of shared memory that one block can have.
struct Limits {
  int multiprocessors, shared_bytes;
};
Limits current_limits();

// What a call of pixels_to_tokens asks of its kernel.
struct Task {
  Map map;
  bool pool = false;  // associate: super tokens are not given
  bool grad = false;  // differentiate: a gradient of the weights is given
  bool vectors;       // pixels are 16- or 32-bit numbers that can be moved 16 bytes at a time
  int size;           // bytes of such a number
};

// The fast kernel of pixels_to_tokens (walk.cuh): a block of threads walks over the tiles of one region of an image,
// `group` tiles at a time. `fits` is false where it can't run and the general kernels do.
struct Walk {
  bool fits = false;
  bool pools = false;         // the walk pools too: x is read once, but for halos. Else pooling is a pass of its own
  int rows = 0, columns = 0;  // super tokens of a region; it also walks the tiles around them
  int group = 0;
  int ahead = 0;        // groups being copied to shared memory while one is worked on
  int lag = 0;          // groups that pooling is ahead of weighing
  int sum_warps = 0;    // of 16 bits: that sum; the others pool and weigh
  int64_t regions = 0;  // blocks of threads
  double reads = 0;     // how often pixels are read, halos and a pass of pooling included

  // Shared memory, in this order (walk_block.cuh): rows of pixels and super tokens are padded so that loads meet no bank
  // twice.
  int stride = 0;         // elements of a pixel
  int token_stride = 0;   // elements of a super token, and of its totals
  int pixels = 0;         // pixels of a tile, rounded up to whole matrices of 16
  int known_columns = 0;  // columns of super tokens kept: those walked over, and one more on either side
  int stages = 0;         // tiles kept
  int ring = 0;           // their bytes
  int weight_row = 0;     // bytes of a tile row's weights as copied, 16-byte aligned at both ends
  int stage_bytes = 0;    // of a tile
  int totals_row = 0;     // elements of a row of totals
  int slice_threads = 0;  // float: threads of a slice, two channels each, and one for each of 9 masses
  int slices = 0;         // float: of the block's threads
  int split = 0;          // float: of them, those that share a tile
  int zeros_at = 0, tokens_at = 0, offsets_at = 0, totals_at = 0, masses_at = 0, scratch_at = 0;
  int scratch_bytes = 0;  // of 16 bits: of each of two
  int stored_at = 0, partials_at = 0, partial_masses_at = 0;
  int64_t shared_bytes = 0;
};
Walk plan(const Task&, const Shape&, const Limits&);

constexpr int WALK_WARPS = 16;
constexpr int SUM_WARPS = 8;          // of them those that sum, at most
constexpr int SINGLE_WARPS = 8;       // for float: stages are twice as large, so steps have half the work
constexpr int SPLIT = 16;             // for float: slices that share a tile, at most
constexpr int WALK_CHANNELS = 384;    // at most
constexpr int POOLED_CHANNELS = 256;  // at most where the walk pools too: registers
constexpr int WALK_TILE = 1024;       // pixels at most
constexpr int SCRATCH = 720;          // bytes of shared memory for the products and weights of 16 pixels

// Rows of totals and of masses, by bytes of a number (walk.cuh): those that are summed, and in 16 bits one that is written.
constexpr int total_rows(int size) { return size == 2 ? 4 : 3; }
constexpr int mass_rows(int size) { return size == 2 ? 8 : 4; }

// Whether the warps that sum leave copies to the others: without products those have less to do than they.
constexpr bool sums_apart(Map map, int size) { return size == 2 && map == Map::weighted; }

// Sixteens of channels that a warp sums: the fewer warps sum, the fewer instructions.
constexpr int sum_pairs(int64_t channels) {
  return channels <= 64 ? 1 : channels <= 2 * 16 * SUM_WARPS ? 2 : WALK_CHANNELS / 16 / SUM_WARPS;
}

}  // namespace stvit
