// When packing pays: the rule for renting or buying skis. See adaptcomp_ext/nn/cost_model.py, where the
// prices come from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace adaptcomp {

// Prices in microseconds: `fixed` for a packing and `move` for every row that it moves, `row` for one more
// row in a step.
struct Schedule {
  double fixed, move, row, wasted = 0;

  // The number of halted rows from which on a block of `rows` should be packed: the fewest d with
  // wasted + d * row >= fixed + (rows - d) * move.
  int64_t least(int64_t rows) const {
    const double saved = row + move;
    if (!(saved > 0)) return rows + 1;  // rows without elements: nothing to save
    const double due = std::ceil((fixed + static_cast<double>(rows) * move - wasted) / saved);
    return due > static_cast<double>(rows) ? rows + 1 : static_cast<int64_t>(std::max(1.0, due));
  }
  // A step will run with `halted` rows left in the block.
  void kept(int64_t halted) { wasted += static_cast<double>(halted) * row; }
  void packed() { wasted = 0; }
};

// Estimate of the step's arithmetic for one row of a state [rows, ..., width]: two operations per weight and
// position. Weights that are not known, -1, count as one dense layer of the state's width.
inline double flops_per_row(int64_t weights, const int64_t* sizes, int64_t dims) {
  const int64_t width = dims > 1 ? sizes[dims - 1] : 1;
  double positions = width > 0 ? 1.0 : 0.0;
  for (int64_t d = 1; d + 1 < dims; ++d) positions *= static_cast<double>(sizes[d]);
  return 2.0 * static_cast<double>(std::max(weights < 0 ? width * width : weights, width)) * positions;
}

}  // namespace adaptcomp
