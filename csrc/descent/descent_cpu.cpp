// The step of a descent on the CPU, in one pass: a row is judged, and its next point computed and compacted,
// while it is in cache.
#include "descent/descent.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/parallel.h"
#include "common/scalars.h"
#include "descent/rows.h"

namespace adaptcomp {
namespace {

constexpr int64_t kChunk = 32;  // elements of noise that are computed together; a multiple of four

// The norm of a row, in double, where no finite gradient overflows. Sixteen partial sums in a fixed order
// vectorise.
template <class T>
AC_HD double norm_row(const T* x, int64_t n) {
  double lane[16] = {};
  int64_t i = 0;
  const auto square = [](T v) { return static_cast<double>(load(v)) * static_cast<double>(load(v)); };
  for (; i + 16 <= n; i += 16)
    for (int64_t k = 0; k < 16; ++k) lane[k] += square(x[i + k]);
  for (int64_t k = 0; i + k < n; ++k) lane[k] += square(x[i + k]);
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  return std::sqrt(lane[0]);
}

// The constants of a row's next point.
template <class C>
struct Proposal {
  C factor, momentum, step, low, high;
};

// next = clamp(y + noise - step velocity), velocity = momentum before + factor g. `velocity`, `before` and
// `noise` may be null. Each combination has its own loop, because only such loops vectorise.
template <bool Before, bool Velocity, bool Noise, class T, class C>
AC_HD void propose_row(T* next, const T* y, const T* g, const C* before, C* velocity, const C* noise,
                       const Proposal<C>& how, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    C m = how.factor * load(g[i]);
    if constexpr (Before) m = how.momentum * before[i] + m;
    if constexpr (Velocity) velocity[i] = m;
    C x = load(y[i]);
    if constexpr (Noise) x += noise[i];
    x -= how.step * m;
    x = x < how.low ? how.low : x;  // nested conditionals would not vectorise
    x = x > how.high ? how.high : x;
    store(next[i], x);
  }
}
template <bool Before, bool Velocity, class T, class C>
AC_HD void propose_row(T* next, const T* y, const T* g, const C* before, C* velocity, const C* noise,
                       const Proposal<C>& how, int64_t n) {
  if (noise) {
    propose_row<Before, Velocity, true>(next, y, g, before, velocity, noise, how, n);
  } else {
    propose_row<Before, Velocity, false>(next, y, g, before, velocity, noise, how, n);
  }
}
template <class T, class C>
AC_HD void propose_row(T* next, const T* y, const T* g, const C* before, C* velocity, const C* noise,
                       const Proposal<C>& how, int64_t n) {
  if (before && velocity) {
    propose_row<true, true>(next, y, g, before, velocity, noise, how, n);
  } else if (before) {
    propose_row<true, false>(next, y, g, before, velocity, noise, how, n);
  } else if (velocity) {
    propose_row<false, true>(next, y, g, before, velocity, noise, how, n);
  } else {
    propose_row<false, false>(next, y, g, before, velocity, noise, how, n);
  }
}
template <class C>
AC_HD bool any_row(const C* x, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) any |= x[i] != C(0);
  return any;
}

// The rows of a chunk if a step is next = clamp(y - step g) and every finite point is accepted. It is one
// function for each instruction set, because calls for each row and loop would take longer than a short row.
template <class T, class C>
AC_HD DescentCounts plain_rows(const DescentStep& a, int64_t begin, int64_t end, int64_t* index) {
  const int64_t n = a.elements;
  const C low = C(a.rule.low), high = C(a.rule.high);
  DescentCounts counts{0, 0, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = a.row[i];
    const T* point = static_cast<const T*>(a.point) + i * n;
    const T* g = static_cast<const T*>(a.gradient) + i * n;  // not read if there is none
    C& energy = static_cast<C*>(a.energy)[r];
    const C value = load_scalar<C>(a.value, a.value_dtype, i);
    const bool finite = is_finite(value) && finite_row(point, n);
    const double norm = a.rule.on_gradient && a.gradient ? norm_row(g, n) : 0.0;
    const Verdict verdict = judge<double>(a.rule, a.step, static_cast<double>(energy),
                                          static_cast<double>(value), finite, norm, false);
    counts.accepted += verdict.accept;
    counts.broken += verdict.status == kNonFinite;
    if (a.accepted) a.accepted[i] = verdict.accept;
    T* y = static_cast<T*>(a.y) + r * n;
    if (verdict.accept || a.step == 0) energy = value;
    if (verdict.status != kRunning) {
      if (verdict.accept || a.step == 0) std::memcpy(y, point, static_cast<size_t>(n) * sizeof(T));
      a.steps[r] = a.step;
      a.status[r] = verdict.status;
      continue;
    }
    const PerRow& sizes = a.step_size;
    const C step =
        sizes.data ? static_cast<const C*>(sizes.data)[sizes.each ? r : 0] : static_cast<C>(sizes.value);
    index[begin + counts.running] = i;
    T* next = static_cast<T*>(a.next) + (begin + counts.running++) * n;
    for (int64_t k = 0; k < n; ++k) {
      C x = load(point[k]) - step * load(g[k]);
      x = x < low ? low : x;
      x = x > high ? high : x;
      y[k] = point[k];
      store(next[k], x);
    }
  }
  return counts;
}
inline bool is_plain(const DescentStep& a) {
  return !a.kept && !a.velocity && !a.scale && !a.rule.noisy && a.rule.clip <= 0;
}

// target_clones needs plain functions, so that each dtype has its own set.
#define AC_ROW_LOOPS(T, C)                                                                                   \
  AC_CLONES DescentCounts plain_loop(const T*, const DescentStep& a, int64_t begin, int64_t end,             \
                                     int64_t* index) {                                                       \
    return plain_rows<T, C>(a, begin, end, index);                                                           \
  }                                                                                                          \
  AC_CLONES bool finite_loop(const T* x, int64_t n) { return finite_row(x, n); }                             \
  AC_CLONES double norm_loop(const T* x, int64_t n) { return norm_row(x, n); }                               \
  AC_CLONES void propose_loop(T* next, const T* y, const T* g, const C* before, C* velocity, const C* noise, \
                              Proposal<C> how, int64_t n) {                                                  \
    propose_row(next, y, g, before, velocity, noise, how, n);                                                \
  }
AC_ROW_LOOPS(float, float)
AC_ROW_LOOPS(double, double)
AC_ROW_LOOPS(bfloat16, float)
AC_ROW_LOOPS(float16, float)
#undef AC_ROW_LOOPS

template <class T>
T* row_of(void* base, int64_t row, int64_t n) {
  return base ? static_cast<T*>(base) + row * n : nullptr;
}
template <class T>
const T* row_of(const void* base, int64_t row, int64_t n) {
  return base ? static_cast<const T*>(base) + row * n : nullptr;
}
template <class C>
C number_of(const PerRow& numbers, int64_t r) {
  return numbers.data ? static_cast<const C*>(numbers.data)[numbers.each ? r : 0]
                      : static_cast<C>(numbers.value);
}

// The noise of kChunk elements from `begin` on: `normals` in stages, each of which vectorises.
AC_CLONES void normals_loop(const DescentRule& rule, uint64_t sample, int64_t step, int64_t begin,
                            double* out) {
  constexpr int64_t kBlocks = kChunk / 4;
  uint32_t word[4][kBlocks];
  double first[2][kBlocks], second[2][kBlocks];
  for (int64_t b = 0; b < kBlocks; ++b) {
    uint32_t four[4];
    normal_words(rule, sample, step, begin / 4 + b, four);
    for (int w = 0; w < 4; ++w) word[w][b] = four[w];
  }
  for (int half = 0; half < 2; ++half)
    for (int64_t b = 0; b < kBlocks; ++b)
      normal_pair(word[2 * half][b], word[2 * half + 1][b], first[half][b], second[half][b]);
  for (int64_t b = 0; b < kBlocks; ++b) {
    for (int half = 0; half < 2; ++half) {
      out[4 * b + 2 * half] = first[half][b];
      out[4 * b + 2 * half + 1] = second[half][b];
    }
  }
}

// sigma times the noise of the n <= kChunk elements from `begin` on.
template <class C>
void noise_chunk(const DescentRule& rule, C sigma, uint64_t sample, int64_t step, int64_t begin, int64_t n,
                 C* out) {
  double noise[kChunk];
  normals_loop(rule, sample, step, begin, noise);
  for (int64_t i = 0; i < n; ++i) out[i] = sigma * static_cast<C>(noise[i]);
}

template <class T>
class StepRows {
  using C = compute_t<T>;

 public:
  explicit StepRows(const DescentStep& args) : a_(args), n_(args.elements) {}

  // Runs the rows of a chunk, and compacts points and index of the active ones to the chunk's beginning.
  DescentCounts operator()(int64_t begin, int64_t end, int64_t* index) const {
    DescentCounts counts{0, 0, 0};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = a_.row[i];
      const Verdict verdict = judge_row(i, r);
      counts.accepted += verdict.accept;
      counts.broken += verdict.status == kNonFinite;
      if (a_.accepted) a_.accepted[i] = verdict.accept;
      if (verdict.status != kRunning) {
        a_.steps[r] = a_.step;
        a_.status[r] = verdict.status;
        continue;
      }
      index[begin + counts.running] = i;
      propose(i, r, verdict.accept, begin + counts.running++);
    }
    return counts;
  }

 private:
  Verdict judge_row(int64_t i, int64_t r) const {
    const T* point = row_of<T>(a_.point, i, n_);
    C& energy = static_cast<C*>(a_.energy)[r];
    const C value = load_scalar<C>(a_.value, a_.value_dtype, i);
    const bool finite = is_finite(value) && finite_loop(point, n_);
    const double norm =
        a_.rule.on_gradient && a_.gradient ? norm_loop(row_of<T>(a_.gradient, i, n_), n_) : 0.0;
    const bool moving = a_.moving && a_.moving[r];
    const Verdict verdict = judge<double>(a_.rule, a_.step, static_cast<double>(energy),
                                          static_cast<double>(value), finite, norm, moving);
    if (verdict.accept || a_.step == 0) {
      energy = value;
      std::memcpy(row_of<T>(a_.y, r, n_), point, static_cast<size_t>(n_) * sizeof(T));
      if (a_.kept && a_.gradient)
        std::memcpy(row_of<T>(a_.kept, r, n_), row_of<T>(a_.gradient, i, n_),
                    static_cast<size_t>(n_) * sizeof(T));
    }
    return verdict;
  }

  void propose(int64_t i, int64_t r, bool accepted, int64_t to) const {
    const DescentRule& rule = a_.rule;
    const T* y = accepted ? row_of<T>(a_.point, i, n_) : row_of<T>(a_.y, r, n_);
    const T* g = accepted ? row_of<T>(a_.gradient, i, n_) : row_of<T>(a_.kept, r, n_);
    C step = number_of<C>(a_.step_size, r);
    if (a_.scale) {
      C& scale = static_cast<C*>(a_.scale)[r];
      if (!accepted) scale *= C(rule.backtracking);
      step *= scale;
    }
    C* velocity = row_of<C>(a_.velocity, r, n_);
    const C* before = accepted && a_.step > 0 ? velocity : nullptr;
    if (velocity) a_.moving[r] = before && any_row(before, n_);
    const double factor = rule.clip > 0 ? clip_factor<double>(rule, norm_loop(g, n_)) : 1.0;
    const Proposal<C> how{C(factor), C(rule.momentum), step, C(rule.low), C(rule.high)};
    T* next = row_of<T>(a_.next, to, n_);
    if (!rule.noisy) {
      propose_loop(next, y, g, before, velocity, nullptr, how, n_);
      return;
    }
    const C sigma = number_of<C>(a_.sigma, r);
    const auto sample = static_cast<uint64_t>(a_.sample ? a_.sample[r] : r);
    for (int64_t at = 0; at < n_; at += kChunk) {
      const int64_t some = std::min(kChunk, n_ - at);
      C noise[kChunk];
      noise_chunk(rule, sigma, sample, a_.step + 1, at, some, noise);
      propose_loop(next + at, y + at, g + at, before ? before + at : nullptr,
                   velocity ? velocity + at : nullptr, noise, how, some);
    }
  }

  const DescentStep& a_;
  int64_t n_;
};

// The active rows of a chunk, compacted to its beginning.
struct Chunk {
  int64_t begin;
  DescentCounts counts;
};

}  // namespace

DescentCounts descent_step_cpu(const DescentStep& a, int64_t* index) {
  std::vector<Chunk> chunks;
  std::mutex mutex;
  const int64_t row_bytes = a.elements * size_of(a.dtype);
  parallel_rows(a.rows, 16 + 4 * row_bytes, [&](int64_t begin, int64_t end) {
    Chunk chunk{begin, {0, 0, 0}};
    dispatch(a.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      chunk.counts = is_plain(a) ? plain_loop(type, a, begin, end, index) : StepRows<T>(a)(begin, end, index);
    });
    const std::lock_guard<std::mutex> lock(mutex);
    chunks.push_back(chunk);
  });
  std::sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) { return a.begin < b.begin; });
  DescentCounts total{0, 0, 0};
  for (const Chunk& chunk : chunks) {
    const int64_t running = chunk.counts.running;
    if (chunk.begin != total.running && running > 0) {
      std::memmove(index + total.running, index + chunk.begin,
                   static_cast<size_t>(running) * sizeof(int64_t));
      auto* next = static_cast<char*>(a.next);
      std::memmove(next + total.running * row_bytes, next + chunk.begin * row_bytes,
                   static_cast<size_t>(running * row_bytes));
    }
    total.running += running;
    total.accepted += chunk.counts.accepted;
    total.broken += chunk.counts.broken;
  }
  if (total.running < a.rows)
    for (int64_t j = 0; j < total.running; ++j) a.row[j] = a.row[index[j]];
  return total;
}

void descent_update_cpu(const DescentUpdate& a) {
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = compute_t<T>;
    const int64_t n = a.elements;
    parallel_rows(a.rows, 4 * n * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* g = row_of<T>(a.gradient, i, n);
        const double factor = a.rule.clip > 0 ? clip_factor<double>(a.rule, norm_loop(g, n)) : 1.0;
        const Proposal<C> how{C(factor), C(a.rule.momentum), number_of<C>(a.step_size, i), C(a.rule.low),
                              C(a.rule.high)};
        propose_loop(row_of<T>(a.next, i, n), row_of<T>(a.y, i, n), g, row_of<C>(a.velocity, i, n),
                     row_of<C>(a.next_velocity, i, n), row_of<C>(a.noise, i, n), how, n);
      }
    });
  });
}

void descent_normals_cpu(const DescentNormals& a) {
  const auto fill = [&](auto* out) {
    using C = std::remove_pointer_t<decltype(out)>;
    parallel_rows(a.rows, 32 * a.elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t at = 0; at < a.elements; at += kChunk)
          noise_chunk(a.rule, C(1), static_cast<uint64_t>(a.sample[i]), a.step, at,
                      std::min(kChunk, a.elements - at), out + i * a.elements + at);
      }
    });
  };
  if (a.wide) {
    fill(static_cast<double*>(a.out));
  } else {
    fill(static_cast<float*>(a.out));
  }
}

}  // namespace adaptcomp
