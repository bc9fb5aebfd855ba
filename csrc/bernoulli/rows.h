// Halting as an action (REINFORCE), one row and one step: the row halts with probability lambda = sigmoid(z),
// by a counter-based draw, and the action's log-probability is log lambda, or log(1 - lambda) if it goes on.
// A logit of minus infinity gives lambda = 0.
#pragma once

#include "common/dtype.h"
#include "pondernet/rows.h"

namespace adaptcomp {

template <class C>
struct BernoulliRow {
  C log_prob;
  bool halt;
};

template <class C>
AC_HD BernoulliRow<C> bernoulli_row(C z, uint64_t seed, uint64_t sample, int64_t step) {
  const bool halt = ponder_sample(z, seed, sample, step);
  return {log_sigmoid(halt ? z : -z), halt};
}

// The derivative of the log-probability in the logit. A row that is not finite passes nothing back.
template <class C>
AC_HD C bernoulli_slope(C z, bool halt) {
  if (!is_logit(z)) return C(0);
  return halt ? exp(log_sigmoid(-z)) : -exp(log_sigmoid(z));
}

}  // namespace adaptcomp
