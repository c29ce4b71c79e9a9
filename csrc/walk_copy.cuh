// The copies of the walk: tiles from device to stages of shared memory, 16 bytes at a time.
//
// A thread keeps its place in a pixel, and where a pass of all threads covers whole tiles also its pixel in the tile: its
// addresses advance from pass to pass by steps that the host has worked out.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T, Map MAP>
struct Copier {
  const Block<T>& b;
  int tile0, line0, column0;  // the thread's first pixel: tile of a group, row and column in it
  int to0, from0;             // bytes from the stage, and from the tile's first pixel

  __device__ explicit Copier(const Block<T>& block) : b(block) {
    const int phase = b.a.vectors.quotient(b.thread), vector = b.thread - phase * int(b.a.vectors.d);
    const int tile = b.a.pass_tiles > 1 ? b.a.tile.quotient(phase) : 0, p = phase - tile * int(b.a.tile.d);
    const int line = b.a.width.quotient(p), column = p - line * b.shape.w;
    // Kept, not to be worked out again for every group.
    tile0 = gpu::anew(phase < b.a.pass ? tile : b.walk.group);  // or nothing to copy
    line0 = gpu::anew(line);
    column0 = gpu::anew(column);
    to0 = gpu::anew((p * b.walk.stride + vector * 8) * 2);
    from0 = gpu::anew((line * int(b.call.pixels.row) + column * int(b.call.pixels.column) + vector * 8) * 2);
  }

  // Starts the copies of a group; zeros for pixels outside the image.
  __device__ void copy(const Group& group) const {
    copy_pixels(group);
    if (MAP != Map::associate) copy_weights(group, 0, b.call.weights);
    if (MAP == Map::differentiate && b.call.grad) copy_weights(group, 1, b.call.grad);
  }

  __device__ void copy_pixels(const Group& group) const {
    const char* image =
        reinterpret_cast<const char*>(static_cast<const T*>(b.call.pixels.data) + b.region.image * b.call.pixels.image);
    const int tile_column = group.column + tile0, rows = int(b.shape.height) - group.row * b.shape.h;
    int first = group.row * b.a.tile_row + tile_column * b.a.tile_column + from0;
    int columns = int(b.shape.width) - tile_column * b.shape.w;
#pragma unroll 1
    for (int tile = tile0; tile < group.tiles; tile += b.a.pass_tiles) {
      char* to = b.stage(group, tile) + to0;
      int from = first, line = line0, column = column0;
      for (int left = b.a.passes; line < b.shape.h;) {
        const bool inside = line < rows && column < columns;
        gpu::copy_async(to, image + (inside ? from : 0), inside ? 16 : 0);
        if (--left == 0) break;
        to += b.a.pass * b.walk.stride * 2;
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

  // The weights of a tile's row begin at any even byte: copied are the 16-byte pieces that they touch.
  __device__ void copy_weights(const Group& group, int grad, const void* given) const {
    const int skipped = b.misalignment();
    const char* image = static_cast<const char*>(given) + b.image_weights() - skipped;
#pragma unroll 1
    for (int i = b.thread; i < group.tiles * b.shape.h * int(b.a.weight_pieces.d); i += Block<T>::THREADS) {
      const int place = b.a.weight_pieces.quotient(i), piece = i - place * int(b.a.weight_pieces.d);
      const int tile = b.a.height.quotient(place), line = place - tile * b.shape.h;
      const int y = group.row * b.shape.h + line, x = (group.column + tile) * b.shape.w;
      const int first = b.weight(y, x) + skipped, begin = (first & ~15) + piece * 16;
      const int end = first + smaller(b.shape.w, int(b.shape.width) - x) * 18;
      const int bytes = y < int(b.shape.height) ? larger(smaller(end - begin, 16), 0) : 0;
      gpu::copy_async(b.weight_row(b.stage(group, tile), grad, line) + piece * 16, image + (bytes ? begin : 0), bytes);
    }
  }
};

}  // namespace stvit
