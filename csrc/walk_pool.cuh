// Initial super tokens: the means over the tiles of a group that has arrived, as products with ones.
//
// The warps that weigh share channels and tiles: each takes 32 channels of up to eight tiles. Of the matrix on the left row
// i is ones while the pixels of tile i are on the right, the others are zeros. Zero times infinity or NaN is NaN: where a
// sum is not finite, the tiles are taken one by one.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T>
struct Pooler {
  static constexpr int PAIRS = POOL_CHANNELS / 16;

  const Block<T>& b;

  __device__ void pool(const Group& group) const {
    const int index = b.WARPS - 1 - b.warp, share = b.a.pool_blocks.quotient(index), first = share * b.a.pool_tiles;
    const int last = smaller(first + b.a.pool_tiles, group.tiles);
    if (first >= last) return;
    const int channel0 = (index - share * int(b.a.pool_blocks.d)) * POOL_CHANNELS, channels = int(b.shape.channels);
    const int lane = b.lane(), r = lane / 4, at = channel0 + lane % 4 * 2;
    const int pixels0 = (lane % 16 * b.walk.stride + channel0 + lane / 16 * 8) * 2;
    const int row = group.row;
    int most = 8;
#pragma unroll 1
    for (int tile = first, taken; tile < last; tile += taken) {
      taken = smaller(most, last - tile);
      gpu::warp_barrier();
      float sums[PAIRS][2][4] = {};
      add(sums, pixels0 + b.stage_at(group, tile), channel0 + 16 < channels ? 32 : 0, taken, r);
      bool finite = true;
#pragma unroll
      for (int i = 0; i < 2 * PAIRS; ++i)
        if (channel0 + i * 8 < channels) finite = finite && gpu::finite(sums[i / 2][i % 2][0] + sums[i / 2][i % 2][1]);
      if (taken > 1 && gpu::any(!finite)) {
        most = 1;
        taken = 0;
        continue;
      }
      const int column = group.column + tile + r;
      if (r >= taken) continue;
      T* token = b.token(b.place(row, column)) + at;
      T* pooled = static_cast<T*>(b.call.pooled) +
                  ((int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column) * channels + at;
      const bool mine = b.region.owns_row(row) && b.region.owns_column(column);
#pragma unroll
      for (int i = 0; i < 2 * PAIRS; ++i) {
        if (channel0 + i * 8 >= channels) break;
        const float* sum = sums[i / 2][i % 2];
        const uint32_t mean = gpu::pack_narrowed<T>(sum[0] * b.a.share, sum[1] * b.a.share);
        *reinterpret_cast<uint32_t*>(token + i * 8) = mean;
        if (mine) gpu::store(reinterpret_cast<uint32_t*>(pooled + i * 8), mean);
      }
    }
  }

  // Tile i in row i. `second`: bytes to the second sixteen of channels, none where it were those of the next stage.
  __device__ void add(float (&sums)[PAIRS][2][4], int pixels, int second, int taken, int row) const {
    const uint32_t one = gpu::pack(gpu::narrow<T>(1), gpu::narrow<T>(1));
    uint32_t left[4] = {};
#pragma unroll 1
    for (int i = 0; i < taken; ++i) {
      left[0] = left[2] = row == i ? one : 0;
      gpu::Shared from = b.base + pixels;
#pragma unroll 1
      for (int sixteens = int(b.a.parts.d);; from += 32 * b.walk.stride) {
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          uint32_t channels[4];
          gpu::load_matrices_transposed(channels, from + pair * second);
          gpu::multiply_add<T>(sums[pair][0], left, channels[0], channels[1]);
          gpu::multiply_add<T>(sums[pair][1], left, channels[2], channels[3]);
        }
        if (--sixteens == 0) break;
      }
      pixels += b.walk.stage_bytes;
      if (pixels >= b.walk.ring) pixels -= b.walk.ring;
    }
  }
};

}  // namespace stvit
