// The part of an image that one block of threads of the walk works on: its super tokens, the tiles around them that it
// walks over and copies, and the groups that it takes them in. Only index arithmetic.
#pragma once

#include <gpu.cuh>

#include "plan.h"

namespace stvit {

__host__ __device__ inline int smaller(int x, int y) { return x < y ? x : y; }
__host__ __device__ inline int larger(int x, int y) { return x > y ? x : y; }

// n / d by one multiplication, exact for n d < 2^32.
struct Divisor {
  uint32_t d = 1, magic = 0;
  Divisor() = default;
  __host__ __device__ explicit Divisor(int64_t d)
      : d(uint32_t(d)), magic(d == 1 ? 0 : uint32_t(0xffffffffu / uint32_t(d) + 1)) {}
  __device__ int quotient(int n) const { return d == 1 ? n : int((uint64_t(uint32_t(n)) * magic) >> 32); }
};

// What numbers of regions are divided by.
struct Regions {
  Divisor of_image, of_row, group;  // regions of an image and of a row of regions, tiles of a group
};

// Tiles side by side in a row of the grid, and the stage of shared memory that the first of them is copied to.
struct Group {
  int row, column, tiles, stage;
};

struct Region {
  const Shape& shape;
  const Walk& walk;
  const Regions& regions;
  int image;
  int first_row, end_row, first_column, end_column;  // super tokens that the region owns
  int column0, column_end;  // of the tiles that it walks over: those of its super tokens, and one further on every side
  int loaded_row, groups;   // first row of tiles that it copies; groups that it copies

  // `kept`: in registers, where there are enough.
  __device__ Region(const Shape& shape, const Walk& walk, const Regions& regions, int index, bool kept)
      : shape(shape), walk(walk), regions(regions), image(regions.of_image.quotient(index)) {
    const int place = index - image * int(regions.of_image.d), row = regions.of_row.quotient(place);
    first_row = row * walk.rows;
    end_row = smaller(first_row + walk.rows, shape.gh);
    first_column = (place - row * int(regions.of_row.d)) * walk.columns;
    end_column = smaller(first_column + walk.columns, shape.gw);
    column0 = larger(first_column - 1, 0);
    column_end = smaller(end_column + 1, shape.gw);
    const int loaded_end = walk.pools ? smaller(walked_end() + 1, shape.gh) : walked_end();
    loaded_row = walk.pools ? larger(walked_row() - 1, 0) : walked_row();
    groups = gpu::anew((loaded_end - loaded_row) * groups_of_row());  // kept, not to be worked out again at every step
    if (kept)
      for (int* value : {&image, &first_row, &end_row, &first_column, &end_column, &column0, &column_end})
        *value = gpu::anew(*value);
  }

  // Rows of those tiles. Not kept in registers.
  __device__ int walked_row() const { return larger(first_row - 1, 0); }
  __device__ int walked_end() const { return smaller(end_row + 1, shape.gh); }
  __device__ int groups_of_row() const { return regions.group.quotient(column_end - column0 + walk.group - 1); }

  __device__ Group first() const { return {loaded_row, column0, smaller(walk.group, column_end - column0), 0}; }
  __device__ void advance(Group& group) const {
    group.stage += group.tiles;
    if (group.stage >= walk.stages) group.stage -= walk.stages;
    group.column += group.tiles;
    if (group.column == column_end) {
      group.column = column0;
      ++group.row;
    }
    group.tiles = smaller(walk.group, column_end - group.column);
  }
  __device__ bool walks(const Group& group) const { return group.row >= walked_row() && group.row < walked_end(); }
  __device__ bool owns_row(int row) const { return row >= first_row && row < end_row; }
  __device__ bool owns_column(int column) const { return column >= first_column && column < end_column; }
};

}  // namespace stvit
