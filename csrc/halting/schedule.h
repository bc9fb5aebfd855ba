// The schedule of compactions, by the rule of the ski rental problem. The cost model in Python, which has the
// prices, explains it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace adaptcomp {

// Prices in microseconds: `fixed` for a compaction, `move` for every row that it moves, `row` for a row in a
// step.
struct Schedule {
  double fixed, move, row, wasted = 0;

  // The least number of halted rows with which a block of `rows` should be compacted: the least d with
  // wasted + d * row >= fixed + (rows - d) * move.
  int64_t least(int64_t rows) const {
    const double saved = row + move;
    if (!(saved > 0)) return rows + 1;  // rows without elements cost nothing
    const double due = std::ceil((fixed + static_cast<double>(rows) * move - wasted) / saved);
    return due > static_cast<double>(rows) ? rows + 1 : static_cast<int64_t>(std::max(1.0, due));
  }
  // Records a step that runs with `halted` halted rows in the block.
  void kept(int64_t halted) { wasted += static_cast<double>(halted) * row; }
  void packed() { wasted = 0; }
};

// Estimates the step's arithmetic for one row of a state [rows, ..., width]: two operations per weight and
// position. Unknown weights, -1, are taken for one dense layer of the state's width.
inline double flops_per_row(int64_t weights, const int64_t* sizes, int64_t dims) {
  const int64_t width = dims > 1 ? sizes[dims - 1] : 1;
  double positions = width > 0 ? 1.0 : 0.0;
  for (int64_t d = 1; d + 1 < dims; ++d) positions *= static_cast<double>(sizes[d]);
  return 2.0 * static_cast<double>(std::max(weights < 0 ? width * width : weights, width)) * positions;
}

}  // namespace adaptcomp
