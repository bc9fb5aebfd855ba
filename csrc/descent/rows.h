// One step of a descent on an energy for one row: whether it accepts the point that was just evaluated,
// whether it ends, and its next point. The step for energies that PyTorch evaluates and the fused descents
// share it.
//
//   m <- mu m + clip(g);   p = clamp(y + sigma eta - alpha s m)
//
// y is the row's point, E and g are the energy and its gradient at y, m is the velocity, s backtracking's
// factor of the step size alpha, and eta standard normal noise. p is evaluated next and judged: it becomes y,
// or is rejected. Step 0 judges the starting point.
#pragma once

#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "common/philox.h"
#include "descent/rule.h"
#include "status.h"

namespace adaptcomp {

// What a step has made of a row.
struct Verdict {
  bool accept;
  Status status;
};

// Judges the point of step `step`, 0 for the starting point. `finite`: whether the point and its energy are
// finite. `norm`: the norm of the gradient at the point, for `on_gradient` only. `moving`: whether the row's
// velocity was not zero.
//
// After a rejection the velocity is set to zero and the row tries again. Without noise, velocity or
// backtracking the next proposal would be the same point, and the row ends.
template <class C>
AC_HD Verdict judge(const DescentRule& rule, int64_t step, C e, C e_new, bool finite, C norm, bool moving) {
  if (!finite) return {false, kNonFinite};
  if (step == 0) return {true, kRunning};
  const bool last = step >= rule.max_steps;
  if (rule.if_lower && !(e_new <= e)) {
    const bool again = rule.noisy || moving || rule.backtracking > 0;
    return {false, !again ? kRejected : last ? kMaxSteps : kRunning};
  }
  const C change = e_new < e ? e - e_new : e_new - e;
  const bool stop = rule.tol > 0 && (rule.on_gradient ? norm : change) <= C(rule.tol);
  return {true, stop ? kHalted : last ? kMaxSteps : kRunning};
}

// The factor that clips the gradient to the norm `clip`; NaN if the norm is NaN, so that the next point is
// NaN.
template <class C>
AC_HD C clip_factor(const DescentRule& rule, C norm) {
  return rule.clip > 0 && !(norm <= C(rule.clip)) ? C(rule.clip) / norm : C(1);
}

// max(low, min(high, x)); NaN stays NaN.
template <class C>
AC_HD C clamped(const DescentRule& rule, C x) {
  if (x < C(rule.low)) return C(rule.low);
  if (x > C(rule.high)) return C(rule.high);
  return x;
}

// The random words for elements 4 block to 4 block + 3 of the noise of a sample's step.
AC_HD void normal_words(const DescentRule& rule, uint64_t sample, int64_t step, int64_t block,
                        uint32_t word[4]) {
  // The last counter word is zero in `uniform`: the noise and a policy's draws never share numbers.
  philox(rule.seed, sample, static_cast<uint32_t>(step), static_cast<uint32_t>(block + 1), word);
}

// The logarithm of u in [2^-32, 1], and sine and cosine of 2 pi `turn` / 2^32, as in fdlibm (Sun Microsystems
// 1993), within one ulp, without its special cases: host and device have the same bits, and loops vectorise.
AC_HD double log_of(double u) {
  uint64_t bits;
  std::memcpy(&bits, &u, 8);
  bits += 0x3ff0000000000000ull - 0x3fe6a09e667f3bcdull;
  const auto exponent = static_cast<double>(static_cast<int32_t>(bits >> 52) - 0x3ff);
  bits = (bits & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull;
  double m;  // from sqrt(1/2) to sqrt(2)
  std::memcpy(&m, &bits, 8);
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  const double r =
      z * (6.666666666666735130e-01 +
           z * (3.999999999940941908e-01 +
                z * (2.857142874366239149e-01 +
                     z * (2.222219843214978396e-01 +
                          z * (1.818357216161805012e-01 +
                               z * (1.531383769920937332e-01 + z * 1.479819860511658591e-01))))));
  return exponent * 6.93147180369123816490e-01 -
         ((half - (s * (half + r) + exponent * 1.90821492927058770002e-10)) - f);
}
AC_HD void sine_cosine_of(uint32_t turn, double& sine, double& cosine) {
  const uint32_t quarter = (turn + 0x20000000u) >> 30;
  const double x =
      static_cast<double>(static_cast<int32_t>(turn - (quarter << 30))) * (6.283185307179586 / 4294967296.0);
  const double z = x * x;
  const double s =
      x + x * z *
              (-1.66666666666666324348e-01 +
               z * (8.33333333332248946124e-03 +
                    z * (-1.98412698298579493134e-04 +
                         z * (2.75573137070700676789e-06 +
                              z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c =
      1.0 -
      (0.5 * z - z * z *
                     (4.16666666666666019037e-02 +
                      z * (-1.38888888888741095749e-03 +
                           z * (2.48015872894767294178e-05 +
                                z * (-2.75573143513906633035e-07 +
                                     z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))))));
  const double first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -first : first;
  sine = quarter & 2 ? -second : second;
}

// Makes two standard normal numbers of two words, by Box and Muller.
AC_HD void normal_pair(uint32_t radial, uint32_t angular, double& first, double& second) {
  using std::sqrt;
  const double u = (static_cast<double>(radial) + 1.0) * (1.0 / 4294967296.0);  // in (0, 1]
  const double radius = sqrt(-2.0 * log_of(u));
  double sine, cosine;
  sine_cosine_of(angular, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Makes elements 4 block to 4 block + 3 of the noise of a sample's step, four standard normal numbers.
template <class C>
AC_HD void normals(const DescentRule& rule, uint64_t sample, int64_t step, int64_t block, C out[4]) {
  uint32_t word[4];
  normal_words(rule, sample, step, block, word);
  for (int half = 0; half < 2; ++half) {
    double first, second;
    normal_pair(word[2 * half], word[2 * half + 1], first, second);
    out[2 * half] = C(first);
    out[2 * half + 1] = C(second);
  }
}

}  // namespace adaptcomp
