// Whether a readout stands still from one step to the next, one row and one step: by the norm of its change,
// by the divergence of successive predictions, or by the most likely class.
//
//   relative, absolute: |now - last| <= tol |now|, or <= tol; norms are sums of squares over the row
//   kl:     KL(p || q) = sum p (log p - log q) <= tol, with p = softmax(now) and q = softmax(last)
//   argmax: the index of the first largest element, in each group of `classes` elements, is that of before
//
// Minus infinity masks a class. One that stays masked has not moved, and counts as zero in a norm; in p it is
// zero. A class that is masked in q alone makes the divergence infinite.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "confidence/rows.h"

namespace adaptcomp {

enum class Criterion : int64_t { relative = 0, absolute = 1, kl = 2, argmax = 3 };

// How far a readout has moved, from sums over its elements.
template <class C>
struct Movement {
  C change = C(0), size = C(0);  // sums of squares

  AC_HD void add(C now, C last) {
    const bool masked = is_masked(now);
    const C d = masked && is_masked(last) ? C(0) : now - last;
    change += d * d;
    size += masked ? C(0) : now * now;
  }
  // Whether the readout has not changed. A row whose sum of squares overflows does not stay.
  AC_HD bool stays(C tolerance, bool relative) const {
    if (!relative) return std::sqrt(change) <= tolerance;
    const C norm = std::sqrt(size);
    return std::sqrt(change) <= tolerance * norm && is_finite(norm);
  }
};

// Sixteen partial sums on the host, so that the loop vectorises; their order depends on the row only. Without
// masks at first: a class that stays masked makes the change NaN, and then the row is read again.
template <class T>
AC_HD Movement<compute_t<T>> movement_row(const T* now, const T* last, int64_t n) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = 16;
  C change[kLanes] = {}, size[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const C x = load(now[i + k]), d = x - load(last[i + k]);
      change[k] += d * d;
      size[k] += x * x;
    }
  }
  for (int64_t k = 0; i + k < n; ++k) {
    const C x = load(now[i + k]), d = x - load(last[i + k]);
    change[k] += d * d;
    size[k] += x * x;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) {
      change[k] += change[k + width];
      size[k] += size[k + width];
    }
  }
  Movement<C> movement{change[0], size[0]};
  if (movement.change == movement.change) return movement;
  movement = {};
  for (int64_t k = 0; k < n; ++k) movement.add(load(now[k]), load(last[k]));
  return movement;
}

// The sums of a divergence, of which the maxima are known.
template <class C>
struct Divergence {
  C now_max, last_max;
  C now_sum = C(0), last_sum = C(0), dot = C(0);

  AC_HD void add(C now, C last) {
    const C a = now - now_max, b = last - last_max, e = exp_nonpositive(a);
    now_sum += e;
    last_sum += exp_nonpositive(b);
    if (e > 0) dot += e * (a - b);
  }
  AC_HD C value() const { return dot / now_sum - log(now_sum) + log(last_sum); }
};

// In lanes, as the movement.
template <class T>
AC_HD compute_t<T> divergence_row(const T* now, const T* last, int64_t n) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = 16;
  C now_max[kLanes], last_max[kLanes], now_sum[kLanes] = {}, last_sum[kLanes] = {}, dot[kLanes] = {};
  for (int64_t k = 0; k < kLanes; ++k) now_max[k] = last_max[k] = C(-INFINITY);
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    const int64_t lanes = n - begin < kLanes ? n - begin : kLanes;
    for (int64_t k = 0; k < lanes; ++k) {
      const C a = load(now[begin + k]), b = load(last[begin + k]);
      now_max[k] = a > now_max[k] ? a : now_max[k];
      last_max[k] = b > last_max[k] ? b : last_max[k];
    }
  }
  for (int64_t k = 1; k < kLanes; ++k) {
    now_max[0] = now_max[k] > now_max[0] ? now_max[k] : now_max[0];
    last_max[0] = last_max[k] > last_max[0] ? last_max[k] : last_max[0];
  }
  Divergence<C> sums{now_max[0], last_max[0]};
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    const int64_t lanes = n - begin < kLanes ? n - begin : kLanes;
    C a[kLanes], b[kLanes], p[kLanes], q[kLanes];
    for (int64_t k = 0; k < lanes; ++k) a[k] = load(now[begin + k]) - sums.now_max;
    for (int64_t k = 0; k < lanes; ++k) b[k] = load(last[begin + k]) - sums.last_max;
    for (int64_t k = 0; k < lanes; ++k) p[k] = exp_nonpositive(a[k]);
    for (int64_t k = 0; k < lanes; ++k) q[k] = exp_nonpositive(b[k]);
    for (int64_t k = 0; k < lanes; ++k) {
      now_sum[k] += p[k];
      last_sum[k] += q[k];
      dot[k] += p[k] > 0 ? p[k] * (a[k] - b[k]) : C(0);
    }
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    sums.now_sum += now_sum[k];
    sums.last_sum += last_sum[k];
    sums.dot += dot[k];
  }
  return sums.value();
}

// The index of the first largest of a row of classes; 0 where one is NaN. The lanes of the maximum vectorise.
template <class T>
AC_HD int32_t argmax_row(const T* x, int64_t classes) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = 16;
  C largest[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) largest[k] = C(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const C value = load(x[i + k]);
      largest[k] = value > largest[k] ? value : largest[k];
    }
  }
  for (int64_t k = 0; i + k < classes; ++k) {
    const C value = load(x[i + k]);
    largest[k] = value > largest[k] ? value : largest[k];
  }
  for (int64_t k = 1; k < kLanes; ++k) largest[0] = largest[k] > largest[0] ? largest[k] : largest[0];
  for (int64_t k = 0; k < classes; ++k)
    if (load(x[k]) == largest[0]) return static_cast<int32_t>(k);
  return 0;
}

// The bytes that a row's last readout takes in the memory of a run.
AC_HD int64_t memory_bytes(Criterion criterion, int64_t elements, int64_t classes, DType dtype) {
  return criterion == Criterion::argmax ? elements / classes * static_cast<int64_t>(sizeof(int32_t))
                                        : elements * size_of(dtype);
}

// Whether the readout stands still by a criterion other than argmax.
template <class T>
AC_HD bool stands_still(const T* now, const T* last, int64_t n, Criterion criterion, double tolerance) {
  using C = compute_t<T>;
  if (criterion == Criterion::kl) return divergence_row(now, last, n) <= C(tolerance);
  return movement_row(now, last, n).stays(C(tolerance), criterion == Criterion::relative);
}

// The same for a memory of before, which is then overwritten by the readout.
template <class T>
AC_HD bool stands_still_and_remember(const T* now, void* memory, int64_t n, int64_t classes,
                                     Criterion criterion, double tolerance) {
  if (criterion == Criterion::argmax) {
    auto* last = static_cast<int32_t*>(memory);
    bool same = true;
    for (int64_t group = 0; group < n / classes; ++group) {
      const int32_t best = argmax_row(now + group * classes, classes);
      same = same && best == last[group];
      last[group] = best;
    }
    return same;
  }
  T* last = static_cast<T*>(memory);
  const bool still = stands_still(now, last, n, criterion, tolerance);
  for (int64_t k = 0; k < n; ++k) last[k] = now[k];
  return still;
}

// The number of consecutive steps without a change; `still` is that of before, -1 at the first step.
AC_HD int64_t count_still(int64_t still, bool same) { return still >= 0 && same ? still + 1 : 0; }

}  // namespace adaptcomp
