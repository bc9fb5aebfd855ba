// The constants of a descent on an energy. What they mean stands in descent/rows.h.
#pragma once

#include <cstdint>

namespace adaptcomp {

// What is the same for every row.
struct DescentRule {
  int64_t max_steps;
  double tol;           // 0: no row stops by the rule
  bool on_gradient;     // stop where |g| <= tol, else where |E_new - E| <= tol
  bool if_lower;        // reject a point whose energy is not at most E
  bool noisy;           // sigma eta is added
  double momentum;      // mu; 0: none
  double clip;          // largest norm of g that is used; 0: no limit
  double low, high;     // clamp; infinite: no limit
  double backtracking;  // factor on the step size after a rejection; 0: none
  uint64_t seed;
};

}  // namespace adaptcomp
