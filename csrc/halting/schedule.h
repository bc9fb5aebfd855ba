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

}  // namespace adaptcomp
