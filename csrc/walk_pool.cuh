// Initial super tokens: the means over the tiles of a group that has arrived, as products with ones.
//
// A warp takes 64 channels of a tile. Of the matrix on the left only row i is ones while channels 8 i .. 8 i + 7 are on
// the right, so that one sum (rows x 8 columns) ends up with 8 channels a row, and every lane with two of them.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T>
struct Pooler {
  const Block<T>& b;

  __device__ void pool(const Group& group) const {
    const int lane = b.lane(), r = lane / 4, index = b.warp - SUM_WARPS;
    const int tile0 = b.a.pool_blocks.quotient(index), block = index - tile0 * int(b.a.pool_blocks.d);
    if (tile0 >= smaller(b.a.pool_tiles, group.tiles)) return;
    const int channel0 = block * POOL_CHANNELS;
    const int sixteens = smaller((int(b.shape.channels) - channel0 + 15) / 16, POOL_CHANNELS / 16);
    const uint32_t one = gpu::pack(gpu::narrow<T>(1), gpu::narrow<T>(1));
    const int channel = channel0 + lane * 2, row = group.row;
    gpu::warp_barrier();
#pragma unroll 1
    for (int tile = tile0; tile < group.tiles; tile += b.a.pool_tiles) {
      const T* from = b.pixel(b.stage(group, tile), lane % 16) + channel0 + lane / 16 * 8;
      float sum[2][4] = {};
#pragma unroll 1
      for (int left = int(b.a.parts.d); left > 0; --left, from += 16 * b.walk.stride) {
#pragma unroll
        for (int i = 0; i < POOL_CHANNELS / 16; ++i) {
          if (i >= sixteens) break;
          uint32_t pixels[4];
          gpu::load_matrices_transposed(pixels, from + i * 16);
          const uint32_t low = r == 2 * i ? one : 0, high = r == 2 * i + 1 ? one : 0;
          gpu::multiply_add<T>(sum[0], {low, 0, low, 0}, pixels[0], pixels[1]);
          gpu::multiply_add<T>(sum[1], {high, 0, high, 0}, pixels[2], pixels[3]);
        }
      }
      if (channel < int(b.shape.channels)) {
        const int column = group.column + tile;
        const uint32_t mean = gpu::pack(gpu::narrow<T>((sum[0][0] + sum[1][0]) * b.a.share),
                                        gpu::narrow<T>((sum[0][1] + sum[1][1]) * b.a.share));
        *reinterpret_cast<uint32_t*>(b.token(b.place(row, column)) + channel) = mean;
        if (b.region.owns_row(row) && b.region.owns_column(column)) {
          T* pooled = static_cast<T*>(b.call.pooled) +
                      ((int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column) * b.shape.channels;
          gpu::store(reinterpret_cast<uint32_t*>(pooled + channel), mean);
        }
      }
      gpu::warp_barrier();
    }
  }
};

}  // namespace stvit
