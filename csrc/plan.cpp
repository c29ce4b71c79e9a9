#include "plan.h"

#include <algorithm>

namespace stvit {
namespace {

constexpr int64_t MOST = int64_t(1) << 31;  // offsets within an image are 32-bit
// Bytes that a multiprocessor has to have on their way for device memory to be busy: 3.35 TB/s for 700 ns, by 132.
constexpr int64_t IN_FLIGHT = 16 * 1024;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// Most tiles of any `count` groups one after another.
int64_t tiles_of(int64_t count, int walked, int group) {
  const int64_t groups_of_row = divide_up(walked, group);
  return count / groups_of_row * walked + count % groups_of_row * group;
}

// Rows of shared memory: matrix loads read eight pixels at once; so do lanes with a pixel each of float, 16 bytes.
void lay_rows(Walk& walk, const Task& task, const Shape& shape) {
  if (task.size == 2) {
    walk.stride = int(round_up(shape.channels, 16)) + 8;
    walk.token_stride = walk.stride;
    walk.totals_row = walk.columns * walk.stride + ((5 - walk.columns) * walk.stride & 31);
    return;
  }
  const int64_t fours = divide_up(shape.h * shape.w, 4);
  walk.stride = int(shape.channels / 4 | 1) * 4;
  walk.token_stride = int(shape.channels);
  walk.totals_row = walk.columns * walk.token_stride;
  walk.slice_threads = int(std::max<int64_t>(shape.channels / 2, 9));
  walk.slices = 32 * SINGLE_WARPS / walk.slice_threads;
  walk.split = int(std::clamp<int64_t>(walk.slices / walk.group, 1, std::min<int64_t>(fours, SPLIT)));
}

// Fills in the shared memory that `walk` takes.
void lay_out(Walk& walk, const Task& task, const Shape& shape) {
  const int walked = std::min(walk.columns + 2, shape.gw);
  lay_rows(walk, task, shape);
  walk.pixels = int(round_up(shape.h * shape.w, 16));
  walk.known_columns = walked + 2;
  walk.weight_row = int(round_up((shape.w * 9 - 1) * task.size + 16, 16));
  // While one group is weighed, the one before is summed (of float by then it is) and the next `ahead` arrive.
  const int64_t kept = walk.lag + (task.size == 2 ? 2 : 1) + walk.ahead;
  // Regions of part of a row differ in width, and so in where small groups come.
  walk.stages = int(walk.columns < shape.gw ? kept * walk.group : tiles_of(kept, walked, walk.group));
  const int given = task.map == Map::associate ? 0 : 1 + task.grad;
  walk.stage_bytes = walk.pixels * walk.stride * task.size + given * shape.h * walk.weight_row;
  int64_t at = int64_t(walk.stages) * walk.stage_bytes;
  walk.ring = int(std::min(at, MOST - 1));
  const auto take = [&](int& place, int64_t bytes) {
    place = int(at);
    at += round_up(bytes, 16);
  };
  const int64_t places = 5 * walk.known_columns;
  take(walk.zeros_at, 16);
  take(walk.tokens_at, task.map == Map::weighted ? 0 : places * walk.token_stride * task.size);
  take(walk.offsets_at, task.map == Map::differentiate ? places * 4 : 0);
  take(walk.totals_at, total_rows(task.size) * int64_t(walk.totals_row) * 4);
  take(walk.masses_at, task.map == Map::associate ? mass_rows(task.size) * walk.columns * 4 : 0);
  const int64_t pixels = int64_t(walk.group) * walk.pixels, units = int64_t(walk.group) * walk.split;
  if (task.size == 2) {
    walk.scratch_bytes = int(divide_up(pixels, 32)) * 2 * SCRATCH;
    take(walk.scratch_at, 2 * walk.scratch_bytes);
  } else {
    take(walk.scratch_at, pixels * 36);
    take(walk.stored_at, task.map == Map::products ? pixels * 36 : 0);
    take(walk.partials_at, units * 9 * shape.channels * 4);
    take(walk.partial_masses_at, task.map == Map::associate ? units * 9 * 4 : 0);
  }
  walk.shared_bytes = at;
}

// Tiles along one side that the regions of `size` super tokens read altogether, with `halo` tiles on either side.
int64_t tiles_read(int grid, int size, int halo) {
  int64_t tiles = 0;
  for (int first = 0; first < grid; first += size)
    tiles += std::min(first + size + halo, grid) - std::max(first - halo, 0);
  return tiles;
}

// The fewest groups of a row, of equal size or one tile less, that fit into shared memory with enough on its way to keep
// device memory busy: two more groups, or one that is large. Where that doesn't fit, with any one.
bool fit(Walk& walk, const Task& task, const Shape& shape, const Limits& limits) {
  const int64_t tile = round_up(shape.h * shape.w, 16);
  const int walked = std::min(walk.columns + 2, shape.gw);
  walk.sum_warps = task.size == 2 ? int(divide_up(shape.channels, 16 * sum_pairs(shape.channels))) : 0;
  const int64_t most = 32 * (WALK_WARPS - walk.sum_warps) / tile;  // a warp weighs 32 pixels
  for (const int64_t enough : {IN_FLIGHT, int64_t(0)})
    for (int groups = int(divide_up(walked, std::clamp<int64_t>(most, 1, walked))); groups <= walked; ++groups)
      for (walk.ahead = 2; walk.ahead >= 1; --walk.ahead) {
        walk.group = int(divide_up(walked, groups));
        if (walk.ahead == 1 && walk.group * tile * shape.channels * task.size < enough) break;
        // What is weighed needs the tile below on its right, which is in the next group unless a row has one.
        const int of_row = int(divide_up(walked, walk.group));
        walk.lag = walk.pools ? of_row + (of_row > 1) : 0;
        lay_out(walk, task, shape);
        if (walk.shared_bytes <= limits.shared_bytes) return true;
      }
  return false;
}

// Time in units of one read of all pixels by a full GPU.
double cost(const Walk& walk, const Limits& limits) {
  const int64_t waves = divide_up(walk.regions, limits.multiprocessors);
  return walk.reads * double(waves * limits.multiprocessors) / double(walk.regions);
}

}  // namespace

Walk plan(const Task& task, const Shape& shape, const Limits& limits) {
  Walk best;
  double least = 0;
  const bool small =
      shape.channels <= WALK_CHANNELS && int64_t(shape.h) * shape.w <= WALK_TILE &&
      int64_t(shape.gh) * shape.h * shape.width + WALK_TILE < MOST / (9 * task.size);  // bytes of weights
  const bool empty = shape.batch == 0 || shape.channels == 0 || shape.gh == 0 || shape.gw == 0;
  if (!task.vectors || shape.channels % (16 / task.size) || !small || empty) return best;
  for (int pools = task.pool && shape.channels <= POOLED_CHANNELS; pools >= 0; --pools)
    for (int rows = shape.gh;; rows = (rows + 1) / 2) {
      for (int columns = shape.gw;; columns = (columns + 1) / 2) {
        Walk walk;
        walk.fits = true;
        walk.pools = pools;
        walk.rows = rows;
        walk.columns = columns;
        walk.regions = shape.batch * divide_up(shape.gh, rows) * divide_up(shape.gw, columns);
        const int halo = pools ? 2 : 1;  // sums need the tiles around a region, their products the means around those
        const double tiles = double(tiles_read(shape.gh, rows, halo)) * double(tiles_read(shape.gw, columns, 1));
        walk.reads = tiles / (double(shape.gh) * shape.gw) + (task.pool && !pools);
        const int64_t last = walk.regions * (walk.regions / shape.batch);  // what is divided by (Divisor)
        if (last < 2 * MOST && fit(walk, task, shape, limits) && (!best.fits || cost(walk, limits) < least)) {
          best = walk;
          least = cost(walk, limits);
        }
        if (columns == 1 || pools) break;  // a walk that pools takes whole rows
      }
      if (rows == 1) break;
    }
  return best;
}

}  // namespace stvit
