// The status of a row, for every loop of the package.
#pragma once

#include <cstdint>

namespace adaptcomp {

// The positive values are those of adaptcomp_ext.Status. An active row has none yet, and padding is not a
// row.
enum Status : int8_t {
  kPadding = -1,
  kRunning = 0,
  kHalted = 1,
  kMaxSteps = 2,
  kNonFinite = 3,
  kRejected = 4,
};

}  // namespace adaptcomp
