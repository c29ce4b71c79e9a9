// Pixels to super tokens for 16-bit numbers: the products at the 3 x 3 pattern, the map on them, and the sums.
//
// A block of threads walks over the tiles of one region of an image, row by row, a group of tiles at a time. Groups
// arrive in shared memory by asynchronous copies; each is read from device memory once and there serves pooling,
// products and sums. A group can be weighed once the super tokens around it are known: where the walk pools them itself,
// that is a row and a group later, so shared memory holds one row of tiles and little more, not two.
//
// A step has two phases between barriers:
//   1. half of the warps pool the group that has arrived, while the others add the group weighed in the step before to
//      the sums
//   2. all start the next copy and weigh: products, map, weights into shared memory
// In 2. a warp owns pixels, 16 at a time; in 1. it owns channels, 8 at a time, of all pixels. So sums stay in the
// registers of one warp from tile to tile, in a fixed order, without atomics: 16 slots, slot s holding row s / 3 - 1 of
// the tile's neighbourhood and the super token in column c with (c + 1) % 3 = s % 3. A step to the right frees the three
// slots of the column that it leaves, which are added to three rows of sums in shared memory; a row that has been met by
// three rows of tiles is written out.
//
// Bytes, X those of the pixels and A = 9/C X those of the weights: read 1 X, and those of A that the map takes; write
// those that it makes. Regions other than whole images read the tiles around them too: plan.h, `reads`.
#pragma once

#include <gpu.cuh>

#include "launch.h"
#include "maps.cuh"
#include "region.cuh"

namespace stvit {

struct WalkArguments {
  PixelsToTokens call;
  Walk walk;
  // By: 16-byte vectors of a pixel, pixels of a tile, of its row and of its column, matrices of 16 pixels in a tile,
  // slots, 16-byte pieces of a tile row's weights, channels.
  Divisor vectors, tile, width, height, parts, slots, weight_chunks, channels;
};

template <typename T, Map MAP, bool POOLS, int BLOCKS>
struct Walker {
  static constexpr bool GIVEN = MAP != Map::associate;  // the weights are given
  static constexpr bool TOKENS = MAP != Map::weighted;  // there are products
  static constexpr int THREADS = 32 * WALK_WARPS;

  const WalkArguments& a;
  const PixelsToTokens& call;
  const Walk& walk;
  const Shape& shape;

  const int thread, warp, lane;
  const int r, q;  // place in a matrix fragment: row r and r + 8, column q and q + 1
  const Region region;

  float sums[BLOCKS][4];
  float mass[4];

  __device__ Walker(const WalkArguments& arguments, int64_t index)
      : a(arguments),
        call(a.call),
        walk(a.walk),
        shape(a.call.shape),
        thread(threadIdx.x),
        warp(thread / 32),
        lane(thread % 32),
        r(lane / 4),
        q(lane % 4 * 2),
        region(shape, walk, POOLS, index) {
    clear_sums();
  }

  // Shared memory, part by part: super tokens, sums of three rows of them, masses of those, weights of a group.
  static __device__ char* shared() { return gpu::shared_memory(); }
  __device__ T* tokens() const { return reinterpret_cast<T*>(shared() + walk.tokens_at); }
  __device__ float* totals() const { return reinterpret_cast<float*>(shared() + walk.totals_at); }
  __device__ float* masses() const { return reinterpret_cast<float*>(shared() + walk.masses_at); }
  __device__ T* weights() const { return reinterpret_cast<T*>(shared() + walk.weights_at); }

  // Of a group: pixels [tile][pixel][channel], then the weights given as copied, then their gradient.
  __device__ char* slot(int group) const {
    return shared() + (group - a.slots.quotient(group) * walk.slots) * walk.slot_bytes;
  }
  __device__ T* pixel(char* slot, int tile, int p) const {
    return reinterpret_cast<T*>(slot) + (tile * walk.pixels + p) * walk.stride;
  }
  __device__ char* weight_row(char* slot, int grad, int tile, int y) const {
    return slot + (walk.group * walk.pixels * walk.stride) * 2 +
           ((grad * walk.group + tile) * shape.h + y) * walk.weight_row;
  }
  // Channels of a super token; zeros outside the grid.
  __device__ T* token(int row, int column) const {
    const bool inside = row >= 0 && row < shape.gh && column >= 0 && column < shape.gw;
    const int place = inside ? (row & 3) * walk.known_columns + column - known0() : 4 * walk.known_columns;
    return tokens() + place * walk.stride;
  }
  __device__ float* total(int row, int column, int channel) const {
    return totals() + ((row % 3) * walk.columns + column - region.first_column) * (walk.stride - 8) + channel;
  }
  __device__ float* total_mass(int row, int column) const {
    return masses() + (warp * 3 + row % 3) * walk.columns + column - region.first_column;
  }
  // First of the 9 weights of a pixel in device memory.
  __device__ int64_t weight(int64_t y, int64_t x) const {
    return ((region.image * shape.height + y) * shape.width + x) * 9;
  }

  // First column of super tokens kept; groups that pooling is ahead of weighing.
  __device__ int known0() const { return larger(region.column0() - 1, 0); }
  __device__ int lag() const { return POOLS ? int(region.groups_of_row.d) + 1 : 0; }

  __device__ void run() {
    // Slots only where pixels or channels are filled up to whole matrices.
    const bool filled = shape.h * shape.w % 16 || shape.channels % 16;
    for (int i = (filled ? 0 : walk.tokens_at / 16) + thread; i < walk.shared_bytes / 16; i += THREADS)
      reinterpret_cast<int4*>(shared())[i] = int4{0, 0, 0, 0};
    gpu::barrier();
    for (int group = 0; group < walk.ahead; ++group) copy(group);
    for (int step = 0; step <= region.groups + lag(); ++step) {
      arrive();
      gpu::barrier();
      const int group = step - lag();
      if (POOLS && warp >= SUM_WARPS && step < region.groups) pool(step);
      if (warp < SUM_WARPS && region.walked(group - 1)) add(group - 1);
      if (TOKENS && !POOLS && region.walked(group)) load_tokens(group);
      gpu::barrier();
      copy(step + walk.ahead);
      if (region.walked(group)) weigh(group);
    }
  }

  // Waits for the oldest group that is being copied.
  __device__ void arrive() const {
    if (walk.ahead == 1) gpu::wait<0>();
    if (walk.ahead == 2) gpu::wait<1>();
    if (walk.ahead == 3) gpu::wait<2>();
  }

  // Starts the copies of a group; zeros for pixels outside the image.
  __device__ void copy(int index) const {
    if (index < region.groups) {
      char* to = slot(index);
      const Group group = region.at(index);
      copy_pixels(to, group);
      if (GIVEN) copy_weights(to, 0, call.weights, group);
      if (MAP == Map::differentiate && call.grad) copy_weights(to, 1, call.grad, group);
    }
    gpu::commit();
  }

  __device__ void copy_pixels(char* to, const Group& group) const {
    const View& view = call.pixels;
    const T* from = static_cast<const T*>(view.data) + region.image * view.image;
    const int y0 = group.row * shape.h, x0 = group.column * shape.w;
    const int vectors = int(a.vectors.d), count = group.tiles * int(a.tile.d) * vectors;
    for (int i = thread; i < count; i += THREADS) {
      const int place = a.vectors.quotient(i), vector = i - place * vectors;
      const int tile = a.tile.quotient(place), p = place - tile * int(a.tile.d);
      const int line = a.width.quotient(p), y = y0 + line, x = x0 + tile * shape.w + p - line * shape.w;
      const bool inside = y < int(shape.height) && x < int(shape.width);
      const T* pixel_from = inside ? from + y * view.row + x * view.column + vector * 8 : from;
      gpu::copy_async(pixel(to, tile, p) + vector * 8, pixel_from, inside ? 16 : 0);
    }
  }

  // The weights of a tile's row begin at any even byte: copied are the 16-byte pieces that they touch.
  __device__ void copy_weights(char* to, int grad, const void* given, const Group& group) const {
    const char* from = static_cast<const char*>(given);
    const int chunks = int(a.weight_chunks.d);
    for (int i = thread; i < group.tiles * shape.h * chunks; i += THREADS) {
      const int place = a.weight_chunks.quotient(i), chunk = i - place * chunks;
      const int tile = a.height.quotient(place), line = place - tile * shape.h;
      const int y = group.row * shape.h + line, x = (group.column + tile) * shape.w;
      const int64_t first = weight(y, x) * 2, begin = first / 16 * 16 + chunk * 16;
      const int64_t bytes = y < int(shape.height) ? first + smaller(shape.w, int(shape.width) - x) * 18 - begin : 0;
      gpu::copy_async(weight_row(to, grad, tile, line) + chunk * 16, bytes > 0 ? from + begin : from,
                      bytes <= 0   ? 0
                      : bytes < 16 ? int(bytes)
                                   : 16);
    }
  }

  // Means over the tiles of a group, as products with ones.
  __device__ void pool(int index) const {
    const Group group = region.at(index);
    const float share = 1.f / float(shape.h * shape.w);
    const T one = gpu::narrow<T>(1);
    const uint32_t ones[4] = {gpu::pack(one, one), gpu::pack(one, one), gpu::pack(one, one), gpu::pack(one, one)};
    char* from = slot(index);
    for (int tile = 0; tile < group.tiles; ++tile)
      for (int block = 0; block < BLOCKS; ++block) {
        const int channel = (warp - SUM_WARPS + block * SUM_WARPS) * 8;
        if (channel >= shape.channels) break;
        float sum[4] = {0, 0, 0, 0};
        gpu::warp_barrier();
        for (int p = 0; p < walk.pixels; p += 16) {
          uint32_t b[2];
          gpu::load_two_matrices_transposed(b, pixel(from, tile, p + lane % 16) + channel);
          gpu::multiply_add<T>(sum, ones, b[0], b[1]);
        }
        if (r != 0) continue;
        const int column = group.column + tile;
        const uint32_t mean = gpu::pack(gpu::narrow<T>(sum[0] * share), gpu::narrow<T>(sum[1] * share));
        *reinterpret_cast<uint32_t*>(token(group.row, column) + channel + q) = mean;
        if (region.owns(group.row, column)) {
          T* pooled = static_cast<T*>(call.pooled) +
                      ((region.image * shape.gh + group.row) * shape.gw + column) * shape.channels;
          gpu::store(reinterpret_cast<uint32_t*>(pooled + channel + q), mean);
        }
      }
  }

  // Super tokens given: the row below, at the start of a row of tiles; at the start of the walk also those above.
  __device__ void load_tokens(int index) const {
    const Group group = region.at(index);
    if (group.column != region.column0()) return;
    const int row = group.row;
    for (int near = row == region.walked_row() ? row - 1 : row + 1; near <= row + 1; ++near)
      if (near >= 0 && near < shape.gh) load_token_row(near);
  }

  __device__ void load_token_row(int row) const {
    const View& view = call.tokens;
    const T* from = static_cast<const T*>(view.data) + region.image * view.image + row * view.row;
    const int columns = smaller(region.column_end() + 1, shape.gw) - known0(), channels = int(shape.channels);
#pragma unroll 1
    for (int i = thread; i < columns * channels; i += THREADS) {
      const int place = a.channels.quotient(i), column = known0() + place, channel = i - place * channels;
      T value = gpu::load(from + column * view.column + channel * view.channel);
      if (MAP == Map::differentiate) value = gpu::narrow<T>(gpu::widen(value) / (mass_of(row, column) + 1e-12f));
      token(row, column)[channel] = value;
    }
  }
  __device__ float mass_of(int row, int column) const {
    return gpu::load(static_cast<const float*>(call.mass) + (region.image * shape.gh + row) * shape.gw + column);
  }

  // Weights of a group's pixels, [pixel][slot] in shared memory: a warp takes 16 pixels of a tile at a time.
  __device__ void weigh(int index) const {
    char* from = slot(index);
    const Group group = region.at(index);
    const int parts = int(a.parts.d);
    for (int part = warp; part < group.tiles * parts; part += WALK_WARPS) {
      const int tile = a.parts.quotient(part), first = (part - tile * parts) * 16;
      float logits[2][4] = {};  // of slots 0-7, 8-15
      if (TOKENS) multiply(logits, from, tile, first, group.row, group.column + tile);
      for (int half = 0; half < 2; ++half) {
        float products[3] = {logits[0][2 * half], logits[0][2 * half + 1], logits[1][2 * half]};
        weigh_pixel(products, from, group, tile, first + r + 8 * half);
      }
    }
  }

  // Products of 16 pixels with the super tokens of the 16 slots, of which 9 are in use.
  __device__ void multiply(float (&products)[2][4], char* slot, int tile, int first, int row, int column) const {
    const T* a_row = pixel(slot, tile, first + lane / 8 % 2 * 8 + lane % 8) + lane / 16 * 8;
    const T* b_row = slot_token(lane / 16 * 8 + lane % 8, row, column) + lane / 8 % 2 * 8;
    gpu::warp_barrier();
    for (int channel = 0; channel < shape.channels; channel += 16) {
      uint32_t pixels[4], near[4];
      gpu::load_matrices(pixels, a_row + channel);
      gpu::load_matrices(near, b_row + channel);
      gpu::multiply_add<T>(products[0], pixels, near[0], near[1]);
      gpu::multiply_add<T>(products[1], pixels, near[2], near[3]);
    }
  }

  // The neighbour k = 3 up + left that a slot holds at a tile of this column; slots from 9 on are empty.
  static __device__ int left_of(int slot, int column) {
    const int left = slot % 3 - column % 3;
    return left < 0 ? left + 3 : left;
  }
  static __device__ int neighbour(int slot, int column) { return slot / 3 * 3 + left_of(slot, column); }
  __device__ const T* slot_token(int slot, int row, int column) const {
    return slot < 9 ? token(row + slot / 3 - 1, column + left_of(slot, column) - 1) : token(-1, 0);
  }

  // Slots q, q + 1 and 8 of one pixel p of a tile; the four lanes of its row share the pixel, the first has slot 8.
  __device__ void weigh_pixel(float (&products)[3], char* from, const Group& group, int tile, int p) const {
    const int column = group.column + tile, line = a.width.quotient(p), in_line = p - line * shape.w;
    const int y = group.row * shape.h + line, x = column * shape.w + in_line;
    const bool real = p < int(a.tile.d), seen = real && y < int(shape.height) && x < int(shape.width);
    const int slots[3] = {q, q + 1, 8};
    const int count = q == 0 ? 3 : 2;

    T given[3] = {}, factor[3] = {};
    if (GIVEN && seen)
      for (int i = 0; i < count; ++i) {
        // Where the weights of the tile's row begin within the 16-byte pieces that were copied.
        const int at = (int(weight(y, x)) - in_line * 9 & 7) + in_line * 9 + neighbour(slots[i], column);
        given[i] = factor[i] = reinterpret_cast<const T*>(weight_row(from, 0, tile, line))[at];
        if (MAP == Map::differentiate && call.grad)
          products[i] += gpu::widen(reinterpret_cast<const T*>(weight_row(from, 1, tile, line))[at]);
      }
    if (MAP == Map::associate) associate(products, count, float(call.scale), factor);
    if (MAP == Map::differentiate) {
      for (int i = 0; i < count; ++i) products[i] -= offset(slots[i], group.row, column);
      differentiate(products, given, count, factor);
    }

    if (TOKENS && seen && region.owns(group.row, column))
      for (int i = 0; i < count; ++i)
        gpu::store(static_cast<T*>(call.out) + weight(y, x) + neighbour(slots[i], column),
                   MAP == Map::products ? gpu::narrow<T>(products[i]) : factor[i]);
    T* to = weights() + (tile * walk.pixels + p) * WEIGHTS_STRIDE;
    const T none = gpu::narrow<T>(0);  // for what fills the tile's pixels up to whole matrices
    *reinterpret_cast<uint32_t*>(to + q) = real ? gpu::pack(factor[0], factor[1]) : gpu::pack(none, none);
    if (q == 0) to[8] = real ? factor[2] : none;
  }

  // <dS, S> / mass of the super token in a slot.
  __device__ float offset(int slot, int row, int column) const {
    const int near_row = row + slot / 3 - 1, near_column = column + left_of(slot, column) - 1;
    if (near_row < 0 || near_row >= shape.gh || near_column < 0 || near_column >= shape.gw) return 0;
    return gpu::load(static_cast<const float*>(call.offset) + (region.image * shape.gh + near_row) * shape.gw +
                     near_column);
  }

  // Adds weight^T x pixels of a group to the sums.
  __device__ void add(int index) {
    char* from = slot(index);
    const Group group = region.at(index);
    const int row = group.row, last = region.column_end() - 1;
    for (int tile = 0; tile < group.tiles; ++tile) {
      const int column = group.column + tile;
      add_tile(from, tile);
      release(row, column - 1);
      if (column == last) {
        release(row, column);
        release(row, column + 1);
        gpu::warp_barrier();
        if (row > region.first_row) finish(row - 1);
        if (row == region.walked_end() - 1) finish(row);
        gpu::warp_barrier();
      }
    }
  }

  __device__ void add_tile(char* slot, int tile) {
    const T one = gpu::narrow<T>(1);
    gpu::warp_barrier();
    for (int p = 0; p < walk.pixels; p += 16) {
      uint32_t factor[4];
      gpu::load_matrices_transposed(
          factor, weights() + (tile * walk.pixels + p + lane / 16 * 8 + lane % 8) * WEIGHTS_STRIDE + lane / 8 % 2 * 8);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        const int channel = (warp + block * SUM_WARPS) * 8;
        if (channel >= shape.channels) break;
        uint32_t b[2];
        gpu::load_two_matrices_transposed(b, pixel(slot, tile, p + lane % 16) + channel);
        gpu::multiply_add<T>(sums[block], factor, b[0], b[1]);
      }
      if (MAP == Map::associate) gpu::multiply_add<T>(mass, factor, gpu::pack(one, one), gpu::pack(one, one));
    }
  }

  __device__ void clear_sums() {
    for (int block = 0; block < BLOCKS; ++block)
      for (int i = 0; i < 4; ++i) sums[block][i] = 0;
    for (int i = 0; i < 4; ++i) mass[i] = 0;
  }

  // The walk leaves the super tokens of `column` around a tile of `row`: their slots go to the totals and are freed.
  __device__ void release(int row, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = r + 8 * half;
      if (slot > 8 || slot % 3 != (column + 1) % 3) continue;
      const int near = row + slot / 3 - 1;
      const bool mine = region.owns(near, column);
      const int first = warp * 8 + q, step = SUM_WARPS * 8;
      float* to = total(near, column, first);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        if (mine && first + block * step < int(shape.channels)) {
          to[block * step] += sums[block][2 * half];
          to[block * step + 1] += sums[block][2 * half + 1];
        }
        sums[block][2 * half] = sums[block][2 * half + 1] = 0;
      }
      if (MAP == Map::associate) {
        if (mine && q == 0) *total_mass(near, column) += mass[2 * half];
        mass[2 * half] = mass[2 * half + 1] = 0;
      }
    }
  }

  // Writes a row of super tokens that has met all its tiles, and frees its totals. A warp writes its own channels.
  __device__ void finish(int row) {
    if (row < region.first_row || row >= region.end_row) return;
    const View& view = call.stokens;
    T* to = static_cast<T*>(view.data) + region.image * view.image + row * view.row;
#pragma unroll 1
    for (int column = region.first_column + r; column < region.end_column; column += 8) {
      const float weight = MAP == Map::associate ? *total_mass(row, column) : 1.f;
#pragma unroll 1  // rarely run: registers count for more than speed
      for (int block = 0; block < BLOCKS; ++block) {
        const int channel = (warp + block * SUM_WARPS) * 8 + q;
        if (channel >= shape.channels) break;
        for (int i = 0; i < 2; ++i) {
          float* sum = total(row, column, channel + i);
          const float value = MAP == Map::associate ? *sum / (weight + 1e-12f) : *sum * float(call.scale);
          gpu::store(to + column * view.column + (channel + i) * view.channel, gpu::narrow<T>(value));
          *sum = 0;
        }
      }
      if (MAP == Map::associate && warp == 0 && q == 0)
        gpu::store(static_cast<float*>(call.mass) + (region.image * shape.gh + row) * shape.gw + column, weight);
    }
    gpu::warp_barrier();
    if (MAP == Map::associate && q == 0)
      for (int column = region.first_column + r; column < region.end_column; column += 8) *total_mass(row, column) = 0;
  }
};

template <typename T, Map MAP, bool POOLS, int BLOCKS>
__global__ void __launch_bounds__(32 * WALK_WARPS, 1) walk_kernel(const WalkArguments arguments) {
  Walker<T, MAP, POOLS, BLOCKS>(arguments, blockIdx.x).run();
}

template <typename T, Map MAP, bool POOLS>
void walk_channels(const WalkArguments& a, void* stream) {
  const int64_t blocks = (a.call.shape.channels + 8 * SUM_WARPS - 1) / (8 * SUM_WARPS);
  const auto run = [&](auto kernel) {
    gpu::launch(kernel, a.walk.regions, 32 * WALK_WARPS, a.walk.shared_bytes, stream, a);
  };
  if (blocks <= 1) return run(walk_kernel<T, MAP, POOLS, 1>);
  if (blocks == 2) return run(walk_kernel<T, MAP, POOLS, 2>);
  if (blocks == 3) return run(walk_kernel<T, MAP, POOLS, 3>);
  if (blocks == 4) return run(walk_kernel<T, MAP, POOLS, 4>);
  run(walk_kernel<T, MAP, POOLS, WALK_CHANNELS / 8 / SUM_WARPS>);
}

// Runs a plan that fits, on 16-bit numbers. Each map is compiled in a file of its own: walk_<map>.cu.
template <Map MAP, bool POOLS = false>
void run_walk(const PixelsToTokens& call, const Walk& walk, void* stream) {
  WalkArguments a;
  a.call = call;
  a.walk = walk;
  const Shape& shape = call.shape;
  a.vectors = Divisor(shape.channels / 8);
  a.tile = Divisor(shape.h * shape.w);
  a.width = Divisor(shape.w);
  a.height = Divisor(shape.h);
  a.parts = Divisor(walk.pixels / 16);
  a.slots = Divisor(walk.slots);
  a.channels = Divisor(shape.channels);
  a.weight_chunks = Divisor(walk.weight_row / 16);
  if (call.type == Type::half) walk_channels<gpu::half, MAP, POOLS>(a, stream);
  if (call.type == Type::bfloat16) walk_channels<gpu::bfloat16, MAP, POOLS>(a, stream);
}

}  // namespace stvit
