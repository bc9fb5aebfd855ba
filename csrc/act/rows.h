// Adaptive computation time (Graves 2016), one row and one step.
//
//   h = sigmoid(z);  N = the first n with h_1 + ... + h_n >= threshold, or M;  R = 1 - (h_1 + ... + h_{N-1})
//   weight w_n = h_n for n < N, w_N = R;  ponder cost = N + R
//
// A logit of minus infinity gives h = 0. Before `min_steps` the probability of halting, and its gradient, are
// zero by definition.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace adaptcomp {

using std::exp;  // the C function of this name takes doubles only

template <class C>
AC_HD C sigmoid(C z) {
  const C e = exp(z < 0 ? z : -z);
  return (z < 0 ? e : C(1)) / (C(1) + e);
}

struct ActParams {
  int64_t step, min_steps, max_steps;
  double threshold;
};

template <class C>
struct ActRow {
  C weight, accumulated, cost;
  bool halt;
};

template <class C>
AC_HD ActRow<C> act_row(C z, C accumulated, const ActParams& p) {
  if (p.step < p.min_steps) return {C(0), accumulated, C(0), false};
  const C h = sigmoid(z), total = accumulated + h;
  const bool halt = total >= C(p.threshold) || p.step >= p.max_steps;
  const C weight = halt ? C(1) - accumulated : h;
  return {weight, total, halt ? C(p.step) + weight : C(0), halt};
}

template <class C>
struct ActRowGrad {
  C logit, accumulated;
};

// N counts as a constant. h_N is not part of the remainder, so that its gradient is zero.
template <class C>
AC_HD ActRowGrad<C> act_row_backward(C z, C accumulated, C g_weight, C g_accumulated, C g_cost,
                                     const ActParams& p) {
  if (p.step < p.min_steps || !is_logit(z))
    return {C(0), g_accumulated};  // a row that is not finite passes nothing back
  const C h = sigmoid(z);
  const C slope = h * (C(1) - h);
  if (accumulated + h >= C(p.threshold) || p.step >= p.max_steps) {
    return {g_accumulated * slope, g_accumulated - (g_weight + g_cost)};
  }
  return {(g_accumulated + g_weight) * slope, g_accumulated};
}

}  // namespace adaptcomp
