// One step of a descent on an energy, one row: whether the point that was just evaluated is taken, whether the row ends there,
// and the next point. Shared by the fused step for energies that PyTorch evaluates and by the kernels that run a whole descent.
//
//   m <- mu m + clip(g);   p = clamp(y + sigma eta - alpha s m)
//
// y is the row's point, E and g the energy and its gradient there, m the velocity, s the factor that backtracking has left of the
// step size alpha, eta standard normal noise. p is evaluated next and judged: it becomes y, or is rejected. Step 0 judges the
// starting point itself.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/philox.h"
#include "descent/rule.h"

namespace adaptcomp {

// Why a row ended: the codes of adaptcomp_ext.Status. 0: it goes on.
enum DescentStatus : int8_t { kGoesOn = 0, kHalted = 1, kMaxSteps = 2, kNonfinite = 3, kRejected = 4 };

struct Verdict {
  bool accept;
  int8_t status;
};

// Judges the point of step `step`, 0 for the starting point. `finite`: the point and its energy are. `norm`: of the gradient at
// the point, used by the rule on the gradient only. `moving`: a velocity other than zero took part in the step.
//
// After a rejection the velocity is dropped and the row tries again, unless nothing would be different then: without noise,
// velocity or backtracking the same point would be proposed for ever, and the row ends.
template <class C>
AC_HD Verdict judge(const DescentRule& rule, int64_t step, C e, C e_new, bool finite, C norm, bool moving) {
  if (!finite) return {false, kNonfinite};
  if (step == 0) return {true, kGoesOn};
  const bool last = step >= rule.max_steps;
  if (rule.if_lower && !(e_new <= e)) {
    const bool again = rule.noisy || moving || rule.backtracking > 0;
    return {false, !again ? kRejected : last ? kMaxSteps : kGoesOn};
  }
  const C change = e_new < e ? e - e_new : e_new - e;
  const bool stop = rule.tol > 0 && (rule.on_gradient ? norm : change) <= C(rule.tol);
  return {true, stop ? kHalted : last ? kMaxSteps : kGoesOn};
}

// What the gradient is multiplied with to be at most `clip` long; NaN where the norm is NaN, so that the next point shows it.
template <class C>
AC_HD C clip_factor(const DescentRule& rule, C norm) {
  return rule.clip > 0 && !(norm <= C(rule.clip)) ? C(rule.clip) / norm : C(1);
}

// max(low, min(high, x)), NaN kept.
template <class C>
AC_HD C clamped(const DescentRule& rule, C x) {
  if (x < C(rule.low)) return C(rule.low);
  if (x > C(rule.high)) return C(rule.high);
  return x;
}

// Four standard normal numbers: elements 4 block to 4 block + 3 of the noise of a sample's step, by Box and Muller.
template <class C>
AC_HD void normals(const DescentRule& rule, uint64_t sample, int64_t step, int64_t block, C out[4]) {
  uint32_t word[4];
  // The last counter word is zero in `uniform`: the noise and a policy's draws never share numbers.
  philox(rule.seed, sample, static_cast<uint32_t>(step), static_cast<uint32_t>(block + 1), word);
  for (int half = 0; half < 2; ++half) {
    using std::cos;
    using std::log;
    using std::sin;
    using std::sqrt;
    // In (0, 1] and [0, 1): the logarithm is finite. Double throughout: a float's cosine differs between host and device.
    const double u = (static_cast<double>(word[2 * half]) + 1.0) * (1.0 / 4294967296.0);
    const double angle = static_cast<double>(word[2 * half + 1]) * (6.283185307179586 / 4294967296.0);
    const double radius = sqrt(-2.0 * log(u));
    out[2 * half] = C(radius * cos(angle));
    out[2 * half + 1] = C(radius * sin(angle));
  }
}

}  // namespace adaptcomp
