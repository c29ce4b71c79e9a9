// Pixels to super tokens for 16- and 32-bit numbers: the products at the 3 x 3 pattern, the map on them, and the sums.
//
// A block of threads walks over the tiles of one region of an image, row by row, a group of tiles at a time. Groups
// arrive in stages of shared memory by asynchronous copies; each is read from device memory once and there serves
// pooling, products and sums. A group can be weighed once the super tokens around it are known: where the walk pools them
// itself, that is a row and a group later, so shared memory holds one row of tiles and little more, not two.
//
// A step, with two groups in a row and one on its way (groups by number; a row and a group is 3 groups):
//
//     all          barrier; copy i + 1
//     some warps   sum i - 4
//     the others   pool i; their barrier; weigh i - 3, write a row that is no longer added to
//
// Parts: walk_block.cuh (shared memory), walk_copy.cuh, walk_pool.cuh, walk_weigh.cuh, walk_sum.cuh (the slots); the
// last three for float: walk_single.cuh. There all warps sum and pool in a first phase, and in a second one add up what
// they summed, and weigh.
//
// Bytes, X those of the pixels and A = 9/C X those of the weights: read 1 X, and those of A that the map takes; write
// those that it makes. Regions other than whole images read the tiles around them too: plan.h, `reads`.
#pragma once

#include "walk_copy.cuh"
#include "walk_single.cuh"

namespace stvit {

template <typename T, Map MAP, bool POOLS, int PAIRS>
struct Walker {
  static constexpr bool TOKENS = MAP != Map::weighted;  // there are products

  const Block<T>& b;
  const Copier<T, MAP> copier;
  const Weigher<T, MAP> weigher;
  const Summer<T, MAP, PAIRS> summer;

  __device__ explicit Walker(const Block<T>& block) : b(block), copier(b), weigher{b}, summer(b) {}

  __device__ void run() {
    clear();
    if constexpr (Block<T>::SINGLE) {
      walk_in_phases();
    } else {
      walk_side_by_side();
    }
  }

  // Some warps sum a group while the others weigh the next one.
  __device__ void walk_side_by_side() {
    const int sums = gpu::anew(int(b.warp < b.walk.sum_warps));  // 1: this warp does, a step after it has been weighed
    const int groups = b.region.groups, lag = POOLS ? b.walk.lag : 0;
    Group coming = b.region.first(), arrived = coming, own = coming;
    for (int i = 0; i < b.walk.ahead; ++i) copy(coming, i);
#pragma unroll 1
    for (int step = 0; step <= groups + lag; ++step) {
      b.walk.ahead == 2 ? gpu::wait<1>() : gpu::wait<0>();  // for the oldest group that is being copied
      gpu::barrier();
      copy(coming, step + b.walk.ahead);
      const int index = step - lag - sums;
      const bool comes = unsigned(index) < unsigned(groups), works = comes && (!POOLS || b.region.walks(own));
      if (sums) {
        if (works) summer.add(own, b.scratch(step - 1));
      } else {
        if (POOLS && step < groups) Pooler<T>{b}.pool(arrived);
        if (TOKENS && !POOLS && works) load_tokens(own);
        if (TOKENS) gpu::barrier_of(b.weighing());
        if (works) weigher.weigh(own, b.scratch(step));
        if (works && own.column == b.region.column0) {
          finish<T, MAP>(b, own.row - 3);  // no longer added to
          if (MAP == Map::associate) clear_masses(b, own.row - 4);
        }
      }
      if (POOLS) b.region.advance(arrived);
      if (comes) b.region.advance(own);
    }
    gpu::barrier();
    if (sums) return;
    for (int row = b.region.walked_end() - 3; row < b.region.walked_end(); ++row) finish<T, MAP>(b, row);
  }

  // Of float: all sum and pool, then all add up what they have summed, and weigh.
  __device__ void walk_in_phases() {
    const int lag = POOLS ? gpu::anew(b.walk.lag) : 0, groups = b.region.groups;
    Group coming = b.region.first(), arrived = coming, weighed = coming, summed = coming;
    bool sums = false;
    for (int i = 0; i < b.walk.ahead; ++i) copy(coming, i);
#pragma unroll 1
    for (int step = 0; step <= groups + lag; ++step) {
      b.walk.ahead == 2 ? gpu::wait<1>() : gpu::wait<0>();
      gpu::barrier();
      const bool weighs = POOLS ? step >= lag && b.region.walks(weighed) : step < groups;
      if (sums) summer.add(summed);
      if (POOLS && step < groups) Pooler<T>{b}.pool(arrived);
      if (POOLS) b.region.advance(arrived);
      if (TOKENS && !POOLS && weighs) load_tokens(weighed);
      gpu::barrier();
      copy(coming, step + b.walk.ahead);
      if (sums) gather(summed, !weighs);
      if (weighs) weigher.weigh(weighed);
      summed = weighed;
      sums = weighs;
      if (step >= lag) b.region.advance(weighed);
    }
  }

  // What the copies and sums don't fill: borders, and in stages what fills pixels or channels up to whole matrices.
  __device__ void clear() const {
    const bool filled = b.shape.h * b.shape.w % 16 || b.shape.channels % 16;
#pragma unroll 1
    for (int i = (filled ? 0 : b.walk.zeros_at / 16) + b.thread; i < int(b.walk.shared_bytes / 16); i += b.THREADS)
      reinterpret_cast<int4*>(b.shared())[i] = int4{0, 0, 0, 0};
    gpu::barrier();
  }

  __device__ void copy(Group& group, int index) const {
    if (index < b.region.groups) {
      copier.copy(group);
      b.region.advance(group);
    }
    gpu::commit();
  }

  // Of float: what has been summed is added to the totals. Then the row above has met all its tiles where the group was the
  // last one of a row, and at the end that row too.
  __device__ void gather(const Group& group, bool last) const {
    if (MAP == Map::associate && group.column == b.region.column0) clear_masses(b, group.row - 2);
    summer.gather(group);
    if (group.column + group.tiles < b.region.column_end) return;
    gpu::barrier();
#pragma unroll 1
    for (int row = group.row - 1; row < group.row + last; ++row) finish<T, MAP>(b, row);
  }

  // Super tokens given: the row below, at the start of a row of tiles; at the start of the walk also those above.
  __device__ void load_tokens(const Group& group) const {
    if (group.column != b.region.column0) return;
    const int row = group.row;
    for (int near = row == b.region.walked_row() ? row - 1 : row + 1; near <= row + 1; ++near)
      if (near >= 0 && near < b.shape.gh) load_token_row(near);
  }

  // Of float divided, or a rounding that all channels share would meet an offset without it.
  static __device__ float over(float value, float mass) {
    mass += float(MASS_EPSILON);
    return Block<T>::SINGLE ? value / mass : value * gpu::reciprocal(mass);
  }

  __device__ void load_token_row(int row) const {
    const View& view = b.call.tokens;
    const T* from = static_cast<const T*>(view.data) + b.region.image * view.image + row * view.row;
    const int first = larger(b.region.column0 - 1, 0), end = smaller(b.region.column_end + 1, b.shape.gw);
#pragma unroll 1
    for (int i = b.THREADS - 1 - b.thread; i < (end - first) * int(b.a.vectors.d); i += b.weighing()) {
      constexpr int VECTOR = Block<T>::VECTOR;
      const int column = first + b.a.vectors.quotient(i);
      const int channel = (i - (column - first) * int(b.a.vectors.d)) * VECTOR;
      union {
        T values[VECTOR];
        int4 vector;
      };
      const T* token = from + column * view.column + channel * view.channel;
      if (b.a.token_vectors) {
        vector = gpu::load(reinterpret_cast<const int4*>(token));
      } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] = gpu::load(token + j * view.channel);
      }
      if (MAP == Map::differentiate) {
        const int64_t place = (int64_t(b.region.image) * b.shape.gh + row) * b.shape.gw + column;
        const float mass = gpu::load(static_cast<const float*>(b.call.mass) + place);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] = gpu::narrow<T>(over(gpu::widen(values[j]), mass));
        if (channel == 0) *b.offset(b.place(row, column)) = gpu::load(static_cast<const float*>(b.call.offset) + place);
      }
      *reinterpret_cast<int4*>(b.token(b.place(row, column)) + channel) = vector;
    }
  }
};

template <typename T, Map MAP, bool POOLS, int PAIRS>
__global__ void __launch_bounds__(Block<T>::THREADS, 1) walk_kernel(const WalkArguments arguments) {
  const Block<T> block(arguments, int(blockIdx.x), Block<T>::SINGLE || MAP == Map::weighted);  // registers are left
  Walker<T, MAP, POOLS, PAIRS>(block).run();
}

template <typename T, Map MAP, bool POOLS>
void walk_channels(const WalkArguments& a, void* stream) {
  const auto run = [&](auto kernel) {
    gpu::launch(kernel, a.walk.regions, Block<T>::THREADS, a.walk.shared_bytes, stream, a);
  };
  if constexpr (Block<T>::SINGLE) {
    run(walk_kernel<T, MAP, POOLS, 0>);
  } else {
    const int pairs = sum_pairs(a.call.shape.channels);
    if (pairs == 1) return run(walk_kernel<T, MAP, POOLS, 1>);
    if (pairs == 2) return run(walk_kernel<T, MAP, POOLS, 2>);
    if constexpr (!POOLS) run(walk_kernel<T, MAP, POOLS, sum_pairs(WALK_CHANNELS)>);
  }
}

// Runs a plan that fits. Each map is compiled in a file of its own: walk_<map>.cu.
template <Map MAP, bool POOLS = false>
void run_walk(const PixelsToTokens& call, const Walk& walk, void* stream) {
  const WalkArguments a = walk_arguments(call, walk);
  if (call.type == Type::half) walk_channels<gpu::half, MAP, POOLS>(a, stream);
  if (call.type == Type::bfloat16) walk_channels<gpu::bfloat16, MAP, POOLS>(a, stream);
  if (call.type == Type::single) walk_channels<float, MAP, POOLS>(a, stream);
}

}  // namespace stvit
