// The part of an image that one block of threads of the walk works on: its super tokens, the tiles around them that it
// walks over and copies, and the groups that it takes them in. Only index arithmetic.
#pragma once

#include <gpu.cuh>

#include "plan.h"

namespace stvit {

__device__ inline int smaller(int x, int y) { return x < y ? x : y; }
__device__ inline int larger(int x, int y) { return x > y ? x : y; }

// n / d by one multiplication, exact for n d < 2^32.
struct Divisor {
  uint32_t d = 1, magic = 0;
  Divisor() = default;
  __host__ __device__ explicit Divisor(int64_t d)
      : d(uint32_t(d)), magic(d == 1 ? 0 : uint32_t(0xffffffffu / uint32_t(d) + 1)) {}
  __device__ int quotient(int n) const { return d == 1 ? n : int((uint64_t(uint32_t(n)) * magic) >> 32); }
};

// Tiles side by side in a row of the grid.
struct Group {
  int row, column, tiles;
};

struct Region {
  const Shape& shape;
  int64_t image;
  int first_row, end_row, first_column, end_column;  // super tokens that the region owns
  int loaded_row, group;                             // first row of tiles that it copies; tiles of a group
  int groups, first_walked, end_walked;              // groups that it copies; those that it walks over, not only pools
  Divisor groups_of_row;

  __device__ Region(const Shape& shape, const Walk& walk, bool pools, int64_t index) : shape(shape), group(walk.group) {
    const int regions_of_row = (shape.gw + walk.columns - 1) / walk.columns;
    const int regions = (shape.gh + walk.rows - 1) / walk.rows * regions_of_row;
    image = index / regions;
    const int place = int(index - image * regions);
    first_row = place / regions_of_row * walk.rows;
    end_row = smaller(first_row + walk.rows, shape.gh);
    first_column = place % regions_of_row * walk.columns;
    end_column = smaller(first_column + walk.columns, shape.gw);
    groups_of_row = Divisor((column_end() - column0() + group - 1) / group);
    const int per_row = int(groups_of_row.d), loaded_end = pools ? smaller(walked_end() + 1, shape.gh) : walked_end();
    loaded_row = pools ? larger(walked_row() - 1, 0) : walked_row();
    groups = (loaded_end - loaded_row) * per_row;
    first_walked = (walked_row() - loaded_row) * per_row;
    end_walked = (walked_end() - loaded_row) * per_row;
  }

  // Tiles that it walks over: those of its super tokens, and one further on every side. Not kept in registers.
  __device__ int walked_row() const { return larger(first_row - 1, 0); }
  __device__ int walked_end() const { return smaller(end_row + 1, shape.gh); }
  __device__ int column0() const { return larger(first_column - 1, 0); }
  __device__ int column_end() const { return smaller(end_column + 1, shape.gw); }

  __device__ Group at(int index) const {
    const int line = groups_of_row.quotient(index);
    const int column = column0() + (index - line * int(groups_of_row.d)) * group;
    return {loaded_row + line, column, smaller(group, column_end() - column)};
  }
  __device__ bool walked(int index) const { return index >= first_walked && index < end_walked; }
  __device__ bool owns(int row, int column) const {
    return row >= first_row && row < end_row && column >= first_column && column < end_column;
  }
};

}  // namespace stvit
