// The constants of a descent on an energy; descent/rows.h has the formulas.
#pragma once

#include <cstdint>

namespace adaptcomp {

// The constants that are the same for every row.
struct DescentRule {
  int64_t max_steps;
  double tol;           // tolerance of the stopping rule; 0: the rule is off
  bool on_gradient;     // a row converges if |g| <= tol, else if |E_new - E| <= tol
  bool if_lower;        // a point is rejected if its energy is above E
  bool noisy;           // sigma eta is added
  double momentum;      // mu; 0: none
  double clip;          // upper bound on the norm of g; 0: none
  double low, high;     // bounds of the clamp; infinite: none
  double backtracking;  // factor of the step size after a rejection; 0: none
  uint64_t seed;
};

}  // namespace adaptcomp
