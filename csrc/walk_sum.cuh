// Sums over pixels, weight^T x pixels: in registers of one warp for up to three tiles, in a fixed order, without atomics.
//
// A warp owns 16 PAIRS channels of all pixels. Three tiles side by side have 3 x 5 neighbours, which are 15 of the 16 rows
// of a product: slot s holds row s / 5 - 1 and column s % 5 - 1 of that neighbourhood. A tile reads its nine weights into
// its own nine slots and zeros into the others:
//
//     columns      2 3 4 5 6
//     tile 3       a a a .         a: weights, .: zeros; three rows of slots
//     tile 4         a a a
//     tile 5           a a a
//
// Then all that has come together is added to three rows of totals in shared memory; a row of totals that has met three
// rows of tiles is written out.
//
// Zero times infinity or NaN is NaN: where a pixel of several tiles is not finite, they are taken one by one, and only
// their own nine slots are added. So it reaches the super tokens that it reaches in the reference.
#pragma once

#include "walk_block.cuh"

namespace stvit {

template <typename T, Map MAP, int PAIRS>
struct Summer {
  const Block<T>& b;
  const int channel0;  // of this warp
  // Of the row that the lane gives to matrix loads of weights, that of slot lane % 16: column of the slot, 5 where it isn't
  // used, and bytes from a tile's weights. Then bytes from a tile's pixels.
  int column, weights0, pixels0;

  __device__ explicit Summer(const Block<T>& block) : b(block), channel0(block.warp * 16 * PAIRS) {
    const unsigned lane = unsigned(b.lane()), slot = lane % 16, own = slot % 5;
    column = gpu::anew(slot < 15 ? own : 5);
    weights0 = gpu::anew((slot / 5 * 3 + own) * WEIGHTS_ROW + lane / 16 * 16);
    pixels0 = gpu::anew((slot * b.walk.stride + channel0 + lane / 16 * 8) * 2);
  }

  // `scratch_at`: of the scratch that holds the group's weights.
  __device__ void add(const Group& group, int scratch_at) const {
    const int pairs = gpu::anew((int(b.shape.channels) - channel0 + 15) / 16);  // that the warp has
    const int lane = b.lane(), channel = channel0 + lane % 4 * 2;
    const Slot slots[2] = {Slot(b, group, lane / 4, channel), Slot(b, group, lane / 4 + 8, channel)};
    int most = SLOT_TILES;
#pragma unroll 1
    for (int tile = 0, taken; tile < group.tiles; tile += taken) {
      taken = smaller(most, group.tiles - tile);
      gpu::warp_barrier();  // other lanes may have added to the same totals before
      float sums[PAIRS][2][4] = {}, mass[4] = {};
      multiply(sums, mass, pairs, group, scratch_at, tile, taken);
      if (taken > 1 && gpu::any(spoiled(sums, pairs, lane))) {
        most = 1;
        taken = 0;
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Slot& slot = slots[half];
        if (!slot.takes(tile, taken)) continue;
        float* total = slot.total + tile * b.walk.stride;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          if (pair >= pairs) break;
          add_to(total + pair * 16, sums[pair][0] + 2 * half);
          add_to(total + pair * 16 + 8, sums[pair][1] + 2 * half);
        }
        if (MAP == Map::associate && b.warp == 0 && lane % 4 == 0) slot.mass[tile] += mass[2 * half];
      }
    }
  }

  // The slots of some tiles side by side.
  __device__ void multiply(float (&sums)[PAIRS][2][4], float (&mass)[4], int pairs, const Group& group, int scratch_at,
                           int tile, int taken) const {
    int at[PAIRS] = {};  // bytes to its pairs of channels: to none of the next stage
    for (int pair = 1; pair < PAIRS; ++pair) at[pair] = gpu::anew(smaller(pair, pairs - 1) * 32);
    const uint32_t ones = gpu::pack(gpu::narrow<T>(1), gpu::narrow<T>(1));
    int left_of_ring = b.walk.stages - group.stage - tile;  // tiles
    int weights = scratch_at + tile * b.a.tile_scratch + weights0;
    gpu::Shared pixels = b.base + (b.stage_at(group, tile) + pixels0);
#pragma unroll 1
    for (int i = 0; i < taken; ++i) {
      const bool used = unsigned(column - i) < 3;  // the slot's super token is a neighbour of the tile
      gpu::Shared row = b.base + (used ? weights : b.walk.zeros_at), from = pixels;
      const int step = used ? SCRATCH : 0;
#pragma unroll 1
      for (int left = int(b.a.parts.d);;) {
        uint32_t factors[4], channels[4];
        gpu::load_matrices(factors, row);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          gpu::load_matrices_transposed(channels, from + at[pair]);
          gpu::multiply_add<T>(sums[pair][0], factors, channels[0], channels[1]);
          gpu::multiply_add<T>(sums[pair][1], factors, channels[2], channels[3]);
        }
        if (MAP == Map::associate) gpu::multiply_add<T>(mass, factors, ones, ones);  // warp 0's are used
        if (--left == 0) break;
        row += step;
        from += 32 * b.walk.stride;
      }
      weights += b.a.tile_scratch - WEIGHTS_ROW;
      pixels = --left_of_ring == 0 ? b.base + pixels0 : pixels + b.walk.stage_bytes;
    }
  }

  // Slot 15 has no weights: its sums are zero unless a pixel is not finite.
  static __device__ bool spoiled(const float (&sums)[PAIRS][2][4], int pairs, int lane) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PAIRS * 4; ++i)
      if (i / 4 < pairs) sum += sums[i / 4][i / 2 % 2][2 + i % 2];
    return lane >= 28 && !(sum == 0);
  }

  // Where a slot's sums go, counted from the first tile of the group.
  struct Slot {
    float *total, *mass;
    int column, known, columns;  // 0 to 4, 5: not to be added; column of the region; those that it owns

    __device__ Slot(const Block<T>& b, const Group& group, int slot, int channel) {
      const int line = unsigned(slot) / 5, row = group.row + line - 1;
      column = slot - 5 * line;
      known = group.column - 1 + column - b.region.first_column;
      columns = b.region.end_column - b.region.first_column;
      total = b.total(row, group.column - 1 + column) + channel;
      mass = b.total_mass(row, group.column - 1 + column);
      if (slot == 15 || !b.region.owns_row(row)) column = 5;
    }
    __device__ bool takes(int tile, int taken) const {
      return column < taken + 2 && unsigned(known + tile) < unsigned(columns);
    }
  };

  static __device__ void add_to(float* to, const float* sums) {
    Two* total = reinterpret_cast<Two*>(to);
    *total = {total->first + sums[0], total->second + sums[1]};
  }
};

// Writes the row of super tokens that has met all its tiles, and frees its totals; by the threads that weigh, 16 bytes
// each, from the last one on: the first ones weigh meanwhile.
template <typename T, Map MAP>
__device__ void finish(const Block<T>& b, int row) {
  constexpr int VECTOR = Block<T>::VECTOR;
  const int columns = b.region.end_column - b.region.first_column;
  if (!b.region.owns_row(row)) return;
  const View& view = b.call.stokens;
  T* to = static_cast<T*>(view.data) + b.region.image * view.image + row * view.row;
#pragma unroll 1
  for (int i = Block<T>::THREADS - 1 - b.thread; i < columns * int(b.a.vectors.d); i += b.weighing()) {
    const int place = b.a.vectors.quotient(i), channel = (i - place * int(b.a.vectors.d)) * VECTOR;
    const int column = b.region.first_column + place;
    float factor = float(b.call.scale);
    if (MAP == Map::associate) {
      const float mass = *b.total_mass(row, column);
      factor = gpu::reciprocal(mass + float(MASS_EPSILON));
      const int64_t token = (int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column;
      if (channel == 0) gpu::store(static_cast<float*>(b.call.mass) + token, mass);
    }
    Four* total = reinterpret_cast<Four*>(b.total(row, column) + channel);
    union {
      uint32_t pairs[4];
      T values[VECTOR];
      int4 vector;
    };
#pragma unroll
    for (int four = 0; four < VECTOR / 4; ++four) {
      const Four sums = total[four];
      if constexpr (Block<T>::SINGLE) {
        for (int j = 0; j < 4; ++j) values[j] = sums.values[j] * factor;
      } else {
        pairs[2 * four] = gpu::pack_narrowed<T>(sums.values[0] * factor, sums.values[1] * factor);
        pairs[2 * four + 1] = gpu::pack_narrowed<T>(sums.values[2] * factor, sums.values[3] * factor);
      }
      total[four] = Four{};
    }
    T* token = to + column * view.column + channel * view.channel;
    if (b.a.out_vectors) {
      gpu::store(reinterpret_cast<int4*>(token), vector);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) gpu::store(token + j * view.channel, values[j]);
    }
  }
}

// Masses are read by several threads of `finish`, so they are freed a row of tiles later.
template <typename T>
__device__ void clear_masses(const Block<T>& b, int row) {
  for (int i = Block<T>::THREADS - 1 - b.thread; i < b.walk.columns; i += b.weighing())
    *b.total_mass(row, b.region.first_column + i) = 0;
}

}  // namespace stvit
