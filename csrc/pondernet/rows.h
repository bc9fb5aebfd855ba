// PonderNet (Banino et al. 2021), one row and one step, in log space.
//
//   lambda = sigmoid(z): the hazard, P(halt at n | still running);  Q_n = prod_{j<=n} (1 - lambda_j)
//   p_n = lambda_n Q_{n-1};  at the last step lambda = 1, so that the p_n sum to one
//   cost = KL(p || prior), the sum over steps of p_n (log p_n - log prior_n)
//
// A logit of minus infinity gives lambda = 0, and 0 log 0 = 0. The last step is M, or the first n with
// p_1 + ... + p_n > 1 - epsilon. Before `min_steps` the hazard is zero.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/philox.h"

namespace adaptcomp {

using std::exp, std::log1p;  // the C functions of these names take doubles only

template <class C>
AC_HD C log_sigmoid(C z) {
  return (z < 0 ? z : C(0)) - log1p(exp(z < 0 ? z : -z));
}

struct PonderParams {
  int64_t step, min_steps, max_steps;
  double log_prior;    // log of the prior probability of this step
  double log_epsilon;  // -inf: no truncation
};

template <class C>
struct PonderRow {
  C weight, log_survival, cost;
  bool halt;
};

template <class C>
AC_HD bool ponder_forced(C log_survival_after, const PonderParams& p) {
  return p.step >= p.max_steps || log_survival_after < C(p.log_epsilon);
}

template <class C>
AC_HD PonderRow<C> ponder_row(C z, C log_survival, const PonderParams& p) {
  if (p.step < p.min_steps) return {C(0), log_survival, C(0), false};
  const C after = log_survival + log_sigmoid(-z);
  const bool halt = ponder_forced(after, p);
  const C log_p = halt ? log_survival : log_survival + log_sigmoid(z);
  const C weight = exp(log_p);
  return {weight, after, weight == 0 ? C(0) : weight * (log_p - C(p.log_prior)), halt};
}

template <class C>
struct PonderRowGrad {
  C logit, log_survival;
};

template <class C>
AC_HD PonderRowGrad<C> ponder_row_backward(C z, C log_survival, C g_weight, C g_survival, C g_cost,
                                           const PonderParams& p) {
  if (p.step < p.min_steps || !is_logit(z))
    return {C(0), g_survival};  // a row that is not finite passes nothing back
  const C after = log_survival + log_sigmoid(-z);
  const bool halt = ponder_forced(after, p);
  const C log_p = halt ? log_survival : log_survival + log_sigmoid(z);
  // d(p log p)/d(log p) = p (log p + 1): there is no division by p.
  const C weight = exp(log_p);
  const C g_log_p = weight == 0 ? C(0) : weight * (g_weight + g_cost * (log_p - C(p.log_prior) + C(1)));
  const C lambda = exp(log_sigmoid(z));
  return {(halt ? C(0) : g_log_p * (C(1) - lambda)) - lambda * g_survival, g_log_p + g_survival};
}

// In evaluation mode an active row halts with probability lambda, not p_n.
template <class C>
AC_HD bool ponder_sample(C z, uint64_t seed, uint64_t sample, int64_t step) {
  const C lambda = exp(log_sigmoid(z));
  return C(uniform(seed, sample, static_cast<uint64_t>(step))) < lambda;
}

}  // namespace adaptcomp
