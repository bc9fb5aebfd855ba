// The confidence, in [0, 1], of a row of class logits: the largest probability, the margin between the two
// largest, or one minus the normalised entropy. The first of two passes over the classes finds the maximum,
// so that nothing overflows.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace adaptcomp {

using std::exp, std::log;  // the C functions of these names take doubles only

// exp(x) for x <= 0 within 2 ulp; zero where it would be subnormal. It uses Cody and Waite's reduction and
// the polynomial of Cephes' expf, without a call or a branch, so that a loop over the classes vectorises.
AC_HD float exp_nonpositive(float x) {
  const float inside = x < -88.0f ? -88.0f : x;  // keeps a NaN
  // Adding 1.5 * 2^23 rounds to an integer, held in the low bits.
  const float shifted = inside * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  const float scale = float_of((bits_of(shifted) + 127u) << 23);  // 2^n
  return x < -87.0f ? 0.0f : y * scale;
}
AC_HD double exp_nonpositive(double x) { return exp(x); }

enum class Measure : int64_t { max_prob = 0, margin = 1, entropy = 2 };

// The results of the two passes over a row.
template <class C>
struct ConfidenceSums {
  C first, second;  // the two largest logits
  C sum, weighted;  // sums of e = exp(x - first) and of e (x - first)
};

template <class C>
AC_HD C confidence_of(const ConfidenceSums<C>& s, int64_t classes, Measure measure) {
  if (measure == Measure::max_prob) return C(1) / s.sum;
  if (measure == Measure::margin) return (C(1) - exp(s.second - s.first)) / s.sum;
  const C entropy = log(s.sum) - s.weighted / s.sum;
  return C(1) - entropy / log(C(classes));
}

// The second pass, over a row whose maximum is known. On the host it runs in chunks, so that each loop
// vectorises; the sums are in the order of the classes on both.
template <bool Entropy, class T>
AC_HD void confidence_sums(ConfidenceSums<compute_t<T>>& s, const T* logits, int64_t classes) {
  using C = compute_t<T>;
#ifdef __CUDA_ARCH__
  constexpr int64_t kChunk = 1;
#else
  constexpr int64_t kChunk = 16;
#endif
  C x[kChunk], e[kChunk];
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t n = classes - begin < kChunk ? classes - begin : kChunk;
    for (int64_t c = 0; c < n; ++c) x[c] = load(logits[begin + c]) - s.first;
    for (int64_t c = 0; c < n; ++c) e[c] = exp_nonpositive(x[c]);
    for (int64_t c = 0; c < n; ++c) s.sum += e[c];
    if (Entropy) {
      for (int64_t c = 0; c < n; ++c) s.weighted += e[c] > 0 ? e[c] * x[c] : C(0);
    }
  }
}

// The first pass, which finds the two largest logits.
template <class T>
AC_HD ConfidenceSums<compute_t<T>> two_largest(const T* logits, int64_t classes) {
  using C = compute_t<T>;
  ConfidenceSums<C> s{load(logits[0]), -INFINITY, C(0), C(0)};
  for (int64_t c = 1; c < classes; ++c) {
    const C x = load(logits[c]), less = x < s.first ? x : s.first;
    s.second = less > s.second ? less : s.second;
    s.first = x > s.first ? x : s.first;
  }
  return s;
}

template <class T>
AC_HD compute_t<T> confidence_of_row(ConfidenceSums<compute_t<T>> s, const T* logits, int64_t classes,
                                     Measure measure) {
  if (measure == Measure::entropy) {
    confidence_sums<true>(s, logits, classes);
  } else {
    confidence_sums<false>(s, logits, classes);
  }
  return confidence_of(s, classes, measure);
}

template <class T>
AC_HD compute_t<T> confidence_row(const T* logits, int64_t classes, Measure measure) {
  return confidence_of_row(two_largest(logits, classes), logits, classes, measure);
}

// confidence_row(...) >= threshold. For most rows the two largest logits decide without an exponential per
// class: with the ratio q of their probabilities, the largest probability lies between 1 / (1 + (classes - 1)
// q) and 1 / (1 + q). The slack exceeds the rounding of the sum, so that the result is always that of the
// full comparison.
template <class S, class T>
AC_HD bool confidence_reaches(const T* logits, int64_t classes, Measure measure, S threshold) {
  using C = compute_t<T>;
  const ConfidenceSums<C> s = two_largest(logits, classes);
  if (measure != Measure::entropy) {
    const C q = exp_nonpositive(s.second - s.first);
    const C slack = C(classes + 16) * (sizeof(C) == 4 ? C(2.5e-7) : C(5e-16));
    const C share = measure == Measure::margin ? C(1) - q : C(1);
    if (S(share / (C(1) + q) * (C(1) + slack)) < threshold) return false;
    if (S(share / (C(1) + C(classes - 1) * q) * (C(1) - slack)) >= threshold) return true;
  }
  return S(confidence_of_row(s, logits, classes, measure)) >= threshold;
}

}  // namespace adaptcomp
