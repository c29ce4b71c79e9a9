// The copies of the walk: tiles from device to stages of shared memory, 16 bytes at a time.
//
// A pass of the threads that copy covers some tiles, or else some rows of one: a thread keeps its 16 bytes of a pixel and its column,
// and its addresses advance by steps that the host has worked out. Where tiles lie in the image as a whole nothing
// else is asked.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T, Map MAP>
struct Copier {
  static constexpr int SIZE = sizeof(T);
  static constexpr bool APART = sums_apart(MAP, SIZE);

  // 16 bytes of weights. In bytes: from the first weight of a group to the row of a tile that they are of; from where that
  // row begins, rounded down to 16; from the tile's stage.
  struct Piece {
    int from, at, to;
  };

  const Block<T>& b;
  const char* image;          // its first pixel
  int tile0, line0, column0;  // the thread's first pixel: tile of a group, row and column in it
  int to0, from0;             // bytes from the stage, and from the tile's first pixel
  int weight_tile0;           // of weights: the thread's first tile of a group, and piece of it
  Piece piece0;
  int skipped;  // bytes from a multiple of 16 to the image's weights

  __device__ explicit Copier(const Block<T>& block)
      : b(block),
        image(reinterpret_cast<const char*>(static_cast<const T*>(b.call.pixels.data) +
                                            b.region.image * b.call.pixels.image)) {
    if (MAP == Map::weighted) image = gpu::anew(image);  // registers are left
    const int thread = b.thread - first_thread();
    const int phase = b.a.vectors.quotient(thread), vector = thread - phase * int(b.a.vectors.d);
    const int tile = b.a.pass_tiles > 1 ? b.a.tile.quotient(phase) : 0, p = phase - tile * int(b.a.tile.d);
    const int line = b.a.width.quotient(p), column = p - line * b.shape.w;
    // Kept, not to be worked out again for every group.
    tile0 = gpu::anew(phase < b.a.pass ? tile : b.walk.group);  // or nothing to copy
    line0 = gpu::anew(line);
    column0 = gpu::anew(column);
    to0 = gpu::anew(p * b.walk.stride * SIZE + vector * 16);
    from0 = gpu::anew((line * int(b.call.pixels.row) + column * int(b.call.pixels.column)) * SIZE + vector * 16);
    if (MAP == Map::associate) return;
    skipped = gpu::anew(b.misalignment());
    const int whose = b.a.tile_pieces.quotient(thread);
    const Piece piece = piece_of(thread - whose * int(b.a.tile_pieces.d));
    weight_tile0 = gpu::anew(whose < b.a.weight_tiles ? whose : b.walk.group);
    piece0 = {gpu::anew(whose * b.a.row_weights + piece.from), gpu::anew(piece.at), gpu::anew(piece.to)};
  }

  __device__ int first_thread() const { return APART ? 32 * b.walk.sum_warps : 0; }

  // Starts the copies of a group; zeros for pixels outside the image.
  __device__ void copy(const Group& group) const {
    if (APART && b.warp < b.walk.sum_warps) return;
    copy_pixels(group);
    if (MAP != Map::associate) copy_weights(group, 0, b.call.weights);
    if (MAP == Map::differentiate && b.call.grad) copy_weights(group, 1, b.call.grad);
  }

  __device__ void copy_pixels(const Group& group) const {
    if (!b.a.whole) return copy_inside(group);
    const char* from = image + (group.row * b.a.tile_row + (group.column + tile0) * b.a.tile_column + from0);
    if (b.a.passes == 1 && group.stage + group.tiles <= b.walk.stages) return copy_straight(group, from);
    copy_whole(group, from);
  }

  // Tiles of one pass each, in stages that follow one another.
  __device__ void copy_straight(const Group& group, const char* from) const {
    gpu::Shared to = b.base + ((group.stage + tile0) * b.walk.stage_bytes + to0);
    const int from_step = gpu::anew(b.a.pass_tiles * b.a.tile_column);
    const int to_step = gpu::anew(b.a.pass_tiles * b.walk.stage_bytes);
#pragma unroll 1
    for (int left = group.tiles - tile0; left > 0; left -= 2 * b.a.pass_tiles) {
      gpu::copy_async(to, from);
      if (left > b.a.pass_tiles) gpu::copy_async(to + to_step, from + from_step);
      from += 2 * from_step;
      to += 2 * to_step;
    }
  }

  __device__ void copy_whole(const Group& group, const char* from) const {
    int to = b.stage_at(group, tile0) + to0;
#pragma unroll 1
    for (int tile = tile0; tile < group.tiles; tile += b.a.pass_tiles) {
      gpu::copy_async(b.base + to, from);
      const char* next = from;
      int at = to;
#pragma unroll 1
      for (int line = line0 + b.a.pass_lines; line < b.shape.h; line += b.a.pass_lines) {
        at += b.a.pass * b.walk.stride * SIZE;
        next += b.a.pass_step;
        gpu::copy_async(b.base + at, next);
      }
      from += b.a.pass_tiles * b.a.tile_column;
      to += b.a.pass_tiles * b.walk.stage_bytes;
      if (to >= b.walk.ring) to -= b.walk.ring;
    }
  }

  // What lies outside the image is zero; or a row of a tile takes more than a pass.
  __device__ void copy_inside(const Group& group) const {
    const int rows = int(b.shape.height) - group.row * b.shape.h;
    int columns = int(b.shape.width) - (group.column + tile0) * b.shape.w;
    int first = group.row * b.a.tile_row + (group.column + tile0) * b.a.tile_column + from0;
#pragma unroll 1
    for (int tile = tile0; tile < group.tiles; tile += b.a.pass_tiles) {
      gpu::Shared to = b.base + (b.stage_at(group, tile) + to0);
      int from = first, line = line0, column = column0;
#pragma unroll 1
      for (int left = b.a.passes; line < b.shape.h;) {
        const bool inside = line < rows && column < columns;
        gpu::copy_async(to, image + (inside ? from : 0), inside ? 16 : 0);
        if (--left == 0) break;
        to += b.a.pass * b.walk.stride * SIZE;
        line += b.a.pass_lines;
        column += b.a.pass_columns;
        from += b.a.pass_step;
        if (column >= b.shape.w) {
          ++line;
          column -= b.shape.w;
          from += b.a.wrap_step;
        }
      }
      first += b.a.pass_tiles * b.a.tile_column;
      columns -= b.a.pass_tiles * b.shape.w;
    }
  }

  // The weights of a tile's row begin on any number: copied are the 16-byte pieces that they touch. Of a tile across the
  // right edge the next row of pixels comes along; nobody reads it.
  __device__ void copy_weights(const Group& group, int grad, const void* given) const {
    const int end = b.a.image_weights + skipped;
    const char* image = static_cast<const char*>(given) + b.image_weights() - skipped;
    int corner = b.weight(group.row * b.shape.h, group.column * b.shape.w) + skipped;
#pragma unroll 1
    for (int tile = weight_tile0; tile < group.tiles; tile += b.a.weight_tiles) {
      const gpu::Shared stage = b.base + (b.stage_at(group, tile) + grad * b.shape.h * b.walk.weight_row);
      Piece piece = piece0;
#pragma unroll 1
      for (int i = b.thread - first_thread();;) {
        const int first = corner + piece.from, begin = (first & ~15) + piece.at;
        const int left = smaller(first + b.a.row_weights, end) - begin;
        if (left > 0) gpu::copy_async(stage + piece.to, image + begin, smaller(left, 16));
        if ((i += b.THREADS - first_thread()) >= int(b.a.tile_pieces.d)) break;
        piece = piece_of(i);
      }
      corner += b.a.weight_tiles * b.a.row_weights;
    }
  }

  // The i-th of a tile.
  __device__ Piece piece_of(int i) const {
    const int line = b.a.row_pieces.quotient(i), at = (i - line * int(b.a.row_pieces.d)) * 16;
    return {line * b.a.line_weights, at, b.walk.pixels * b.walk.stride * SIZE + line * b.walk.weight_row + at};
  }
};

}  // namespace stvit
