// How sure a row of class logits is, in [0, 1]: the largest probability, the margin between the two largest, or one minus the
// normalised entropy. Two passes over the classes, the first for the maximum, so that nothing overflows.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace adaptcomp {

using std::exp, std::log;  // the C functions of these names take doubles only

enum class Measure : int64_t { max_prob = 0, margin = 1, entropy = 2 };

// What the two passes over a row leave.
template <class C>
struct ConfidenceSums {
  C first, second;  // the two largest logits
  C sum, weighted;  // of e = exp(x - first), and of e (x - first)
};

template <class C>
AC_HD C confidence_of(const ConfidenceSums<C>& s, int64_t classes, Measure measure) {
  if (measure == Measure::max_prob) return C(1) / s.sum;
  if (measure == Measure::margin) return (C(1) - exp(s.second - s.first)) / s.sum;
  const C entropy = log(s.sum) - s.weighted / s.sum;
  return C(1) - entropy / log(C(classes));
}

template <class T>
AC_HD compute_t<T> confidence_row(const T* logits, int64_t classes, Measure measure) {
  using C = compute_t<T>;
  C first = load(logits[0]), second = -INFINITY;
  for (int64_t c = 1; c < classes; ++c) {
    const C x = load(logits[c]);
    if (x > first) {
      second = first;
      first = x;
    } else if (x > second) {
      second = x;
    }
  }
  C sum = 0, weighted = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const C x = load(logits[c]) - first, e = exp(x);
    sum += e;
    if (e > 0) weighted += e * x;
  }
  return confidence_of(ConfidenceSums<C>{first, second, sum, weighted}, classes, measure);
}

}  // namespace adaptcomp
