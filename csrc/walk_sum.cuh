// Sums over pixels, weight^T x pixels: in registers of one warp from tile to tile, in a fixed order, without atomics.
//
// A warp owns 16 PAIRS channels of all pixels, and 16 slots for them. Slot s holds row s / 3 - 1 of the tile's
// neighbourhood and the super token in column c with (c + 1) % 3 = s % 3:
//
//     tile in column   3         4         5         6
//     slots 0 1 2      3 4 2     3 4 5     6 4 5     6 7 5       super tokens of the row above, by column; slots 3 4 5
//                                                                those of the tile's row, slots 6 7 8 of the one below
//
// A step to the right frees the three slots of the column that it leaves; nothing moves between registers. What they hold
// is added to three rows of totals in shared memory, and a row that has met three rows of tiles is written out.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T, Map MAP, int PAIRS>
struct Summer {
  const Block<T>& b;
  const int channel0;  // of this warp
  float sums[PAIRS][2][4];
  float mass[4];  // of warp 0

  __device__ explicit Summer(const Block<T>& block) : b(block), channel0(block.warp * 16 * PAIRS) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mass[i] = 0;
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) sums[pair][0][i] = sums[pair][1][i] = 0;
    }
  }

  __device__ void add(const Group& group) {
    if (channel0 >= int(b.shape.channels)) return;
    const int lane = b.lane(), row = lane / 8 % 2 * 8 + lane % 8;
    // Rows of the weights that the lane gives to matrix loads, sixteen pixels after sixteen; zeros from slot 9 on.
    const bool used = row < 9;
    const char* weights = used ? b.scratch(0) + row * WEIGHTS_ROW + lane / 16 * 16 : b.zeros();
    const int odd = used ? 32 : 0, even = used ? SCRATCH - 32 : 0, parts = int(b.a.parts.d);
    const int pixels0 = (lane % 16 * b.walk.stride + channel0 + lane / 16 * 8) * 2, step = 32 * b.walk.stride;
    const T one = gpu::narrow<T>(1);
    Totals totals(b, group, lane, channel0);
    int part = 0;
    gpu::warp_barrier();
#pragma unroll 1
    for (int tile = 0; tile < group.tiles; ++tile) {
      const char* pixels = b.stage(group, tile) + pixels0;
#pragma unroll 2
      for (int left = parts; left > 0; --left, pixels += step) {
        uint32_t factors[4], channels[4];
        gpu::load_matrices(factors, weights);
        weights += ++part % 2 ? odd : even;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          gpu::load_matrices_transposed(channels, pixels + pair * 32);
          gpu::multiply_add<T>(sums[pair][0], factors, channels[0], channels[1]);
          gpu::multiply_add<T>(sums[pair][1], factors, channels[2], channels[3]);
        }
        if (MAP == Map::associate && b.warp == 0)
          gpu::multiply_add<T>(mass, factors, gpu::pack(one, one), gpu::pack(one, one));
      }
      // The walk leaves a column; at the end of a row also the two that are left.
#pragma unroll 1
      for (int left = totals.column + 2 == b.region.column_end ? 3 : 1; left > 0; --left) release(totals);
      gpu::warp_barrier();
    }
  }

  // Where a lane's slots go: slot r, and in the first four lanes also slot 8. Column by column.
  struct Totals {
    float *to, *to8, *mass, *mass8;  // totals of the super tokens in `column`
    int column, third, own_third;    // (column + 1) % 3, which is that of the slots to free, and that of slot r
    bool mine, mine8;                // whether the region owns the rows

    __device__ Totals(const Block<T>& b, const Group& group, int lane, int channel0)
        : column(group.column - 1), third(group.column % 3), own_third(lane / 4 % 3) {
      const int row = group.row + lane / 12 - 1, channel = channel0 + lane % 4 * 2;
      to = b.total(row, column) + channel;
      to8 = b.total(group.row + 1, column) + channel;
      mass = b.total_mass(row, column);
      mass8 = b.total_mass(group.row + 1, column);
      mine = b.region.owns_row(row);
      mine8 = b.region.owns_row(group.row + 1);
    }
  };

  // The slots of a column that the walk leaves go to the totals and are freed.
  __device__ void release(Totals& totals) {
    const bool mine = b.region.owns_column(totals.column), first = threadIdx.x % 4 == 0;
    if (totals.third == totals.own_third) {
      if (mine && totals.mine) add_to<0>(totals.to);
      if (MAP == Map::associate && b.warp == 0) {
        if (mine && totals.mine && first) *totals.mass += mass[0];
        mass[0] = mass[1] = 0;
      }
      clear<0>();
    }
    if (totals.third == 2) {
      const bool eighth = threadIdx.x % 32 < 4;
      if (mine && totals.mine8 && eighth) add_to<2>(totals.to8);
      if (MAP == Map::associate && b.warp == 0) {
        if (mine && totals.mine8 && eighth && first) *totals.mass8 += mass[2];
        mass[2] = mass[3] = 0;
      }
      clear<2>();
    }
    totals.to += b.walk.stride - 8;
    totals.to8 += b.walk.stride - 8;
    ++totals.mass;
    ++totals.mass8;
    ++totals.column;
    totals.third = totals.third == 2 ? 0 : totals.third + 1;
  }

  // Sums of slot r (FROM 0) or 8 (FROM 2).
  template <int FROM>
  __device__ void add_to(float* to) const {
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      if (channel0 + pair * 16 >= int(b.shape.channels)) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Two* total = reinterpret_cast<Two*>(to + pair * 16 + i * 8);
        *total = {total->first + sums[pair][i][FROM], total->second + sums[pair][i][FROM + 1]};
      }
    }
  }
  template <int FROM>
  __device__ void clear() {
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[pair][i][FROM] = sums[pair][i][FROM + 1] = 0;
  }
};

// Writes the row of super tokens that has met all its tiles, and frees its totals; by all threads, eight channels each.
template <typename T, Map MAP>
__device__ void finish(const Block<T>& b, int row) {
  const int columns = b.region.end_column - b.region.first_column;
  if (!b.region.owns_row(row) || b.warp * 32 >= columns * int(b.a.vectors.d)) return;
  const View& view = b.call.stokens;
  T* to = static_cast<T*>(view.data) + b.region.image * view.image + row * view.row;
#pragma unroll 1
  for (int i = b.thread; i < columns * int(b.a.vectors.d); i += Block<T>::THREADS) {
    const int place = b.a.vectors.quotient(i), channel = (i - place * int(b.a.vectors.d)) * 8;
    const int column = b.region.first_column + place;
    float factor = float(b.call.scale);
    if (MAP == Map::associate) {
      const float mass = *b.total_mass(row, column);
      factor = gpu::reciprocal(mass + float(MASS_EPSILON));
      const int64_t token = (int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column;
      if (channel == 0) gpu::store(static_cast<float*>(b.call.mass) + token, mass);
    }
    float* total = b.total(row, column) + channel;
    union {
      T values[8];
      int4 vector;
    };
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      values[j] = gpu::narrow<T>(total[j] * factor);
      total[j] = 0;
    }
    T* token = to + column * view.column + channel * view.channel;
    if (b.a.out_vectors) {
      gpu::store(reinterpret_cast<int4*>(token), vector);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) gpu::store(token + j * view.channel, values[j]);
    }
  }
}

// Masses are read by several threads of `finish`, so they are freed a row of tiles later.
template <typename T>
__device__ void clear_masses(const Block<T>& b, int row) {
  for (int i = b.thread; i < b.walk.columns; i += Block<T>::THREADS) *b.total_mass(row, b.region.first_column + i) = 0;
}

}  // namespace stvit
