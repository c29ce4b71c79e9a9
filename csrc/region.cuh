// The part of an image that one block of threads of the walk works on: its super tokens, the tiles around them that it
// walks over and copies, and the groups that it takes them in. Only index arithmetic.
#pragma once

#include <gpu.cuh>

#include "plan.h"

namespace stvit {

__device__ inline int smaller(int x, int y) { return x < y ? x : y; }
__device__ inline int larger(int x, int y) { return x > y ? x : y; }

struct Region {
  int64_t image;
  int first_row, end_row, first_column, end_column;  // super tokens that the region owns
  int walked_row, walked_end, column0, column_end;   // tiles that it walks over: one further on every side
  int loaded_row, loaded_end;                        // rows of tiles that it copies: for pooling one further still
  int group, groups_of_row, groups;                  // tiles of a group; groups of a row and of all that is copied
  int lag;                                           // groups that pooling is ahead of weighing

  __device__ Region(const Shape& shape, const Walk& walk, bool pools, int64_t index) : group(walk.group) {
    const int regions_of_row = (shape.gw + walk.columns - 1) / walk.columns;
    const int regions = (shape.gh + walk.rows - 1) / walk.rows * regions_of_row;
    image = index / regions;
    const int place = int(index - image * regions);
    first_row = place / regions_of_row * walk.rows;
    end_row = smaller(first_row + walk.rows, shape.gh);
    first_column = place % regions_of_row * walk.columns;
    end_column = smaller(first_column + walk.columns, shape.gw);
    walked_row = larger(first_row - 1, 0);
    walked_end = smaller(end_row + 1, shape.gh);
    column0 = larger(first_column - 1, 0);
    column_end = smaller(end_column + 1, shape.gw);
    loaded_row = pools ? larger(walked_row - 1, 0) : walked_row;
    loaded_end = pools ? smaller(walked_end + 1, shape.gh) : walked_end;
    groups_of_row = (column_end - column0 + group - 1) / group;
    groups = (loaded_end - loaded_row) * groups_of_row;
    lag = pools ? groups_of_row + 1 : 0;
  }

  // Of a group: the row, the first column and the number of its tiles; whether it is walked over, not only pooled.
  __device__ int row(int at) const { return loaded_row + at / groups_of_row; }
  __device__ int column(int at) const { return column0 + at % groups_of_row * group; }
  __device__ int tiles(int at) const { return smaller(group, column_end - column(at)); }
  __device__ bool walked(int at) const {
    return at >= 0 && at < groups && row(at) >= walked_row && row(at) < walked_end;
  }
  __device__ bool owns(int row, int column) const {
    return row >= first_row && row < end_row && column >= first_column && column < end_column;
  }
};

}  // namespace stvit
