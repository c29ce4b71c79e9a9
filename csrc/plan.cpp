#include "plan.h"

#include <algorithm>

namespace stvit {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// Fills in the shared memory that `walk` takes.
void lay_out(Walk& walk, const Task& task, const Shape& shape) {
  const int64_t channels = round_up(shape.channels, 16);
  const int walked = std::min(walk.columns + 2, shape.gw);
  const int groups_of_row = int(divide_up(walked, walk.group));
  walk.stride = int(channels) + 8;
  walk.pixels = int(round_up(shape.h * shape.w, 16));
  walk.known_columns = std::min(walk.columns + 4, shape.gw);
  // While one group is weighed, the next `ahead` arrive; pooling runs a row and a group before.
  walk.slots = 1 + walk.ahead + (walk.pools ? groups_of_row + 1 : 0);
  walk.weight_row = int(round_up(shape.w * 18 + 14, 16));
  const int given = task.map == Map::associate ? 0 : 1 + task.grad;
  const int64_t slot = int64_t(walk.group) * (walk.pixels * walk.stride * 2 + given * shape.h * walk.weight_row);
  const int64_t tokens = task.map == Map::weighted ? 0 : (4 * int64_t(walk.known_columns) + 1) * walk.stride * 2;
  const int64_t totals = 3 * walk.columns * channels * 4;
  const int64_t masses = task.map == Map::associate ? round_up(SUM_WARPS * 3 * walk.columns * 4, 16) : 0;
  const int64_t weights = int64_t(walk.group) * walk.pixels * WEIGHTS_STRIDE * 2;
  walk.shared_bytes = walk.slots * slot + tokens + totals + masses + weights;
  walk.slot_bytes = int(slot);
  walk.tokens_at = int(walk.slots * slot);
  walk.totals_at = int(walk.tokens_at + tokens);
  walk.masses_at = int(walk.totals_at + totals);
  walk.weights_at = int(walk.masses_at + masses);
}

// Tiles along one side that the regions of `size` super tokens read altogether, with `halo` tiles on either side.
int64_t tiles_read(int grid, int size, int halo) {
  int64_t tiles = 0;
  for (int first = 0; first < grid; first += size)
    tiles += std::min(first + size + halo, grid) - std::max(first - halo, 0);
  return tiles;
}

// The largest group that fits into shared memory with two more on their way, so that copies run while one is worked on;
// then the deepest prefetch. With one on its way where two don't fit.
bool fit(Walk& walk, const Task& task, const Shape& shape, const Limits& limits) {
  const int tile = int(round_up(shape.h * shape.w, 16));
  // A group of 256 pixels is 16 for each warp.
  const int most = std::clamp(16 * WALK_WARPS / tile, 1, std::min(walk.columns + 2, shape.gw));
  for (const int least : {2, 1})
    for (walk.group = most; walk.group >= 1; --walk.group)
      for (walk.ahead = 3; walk.ahead >= least; --walk.ahead) {
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
  const bool small = shape.channels <= WALK_CHANNELS && int64_t(shape.h) * shape.w <= WALK_TILE;
  const bool empty = shape.batch == 0 || shape.channels == 0 || shape.gh == 0 || shape.gw == 0;
  if (!task.vectors || shape.channels % 8 || !small || empty) return best;
  for (int pools = task.pool; pools >= 0; --pools)
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
        if (fit(walk, task, shape, limits) && (!best.fits || cost(walk, limits) < least)) {
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
