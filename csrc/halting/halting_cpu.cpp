// The halting step on the CPU, in one pass over the block: every tensor is read once, while the row is in
// cache.
#include "halting/halting.h"

#include <cstring>

#include "common/clones.h"
#include "common/parallel.h"
#include "halting/rows.h"

namespace adaptcomp {
namespace {

template <class T>
AC_HD void axpy_row(compute_t<T>* out, compute_t<T> weight, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) accumulate(out[i], weight, x[i]);
}
// g = [g +] weight * g_out
template <class T>
AC_HD void scale_row(T* g, bool add, compute_t<T> weight, const compute_t<T>* g_out, int64_t n) {
  if (add) {
    for (int64_t i = 0; i < n; ++i) store(g[i], load(g[i]) + weight * g_out[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(g[i], weight * g_out[i]);
  }
}
template <class T>
AC_HD void add_row(T* g, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(g[i], load(g[i]) + load(x[i]));
}
// Sixteen partial sums in a fixed order vectorise without reassociation, and the result depends on the row
// only.
template <class T>
AC_HD compute_t<T> dot_row(const compute_t<T>* a, const T* b, int64_t n) {
  compute_t<T> lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t k = 0; k < 16; ++k) lane[k] += a[i + k] * weight_slope(b[i + k]);
  for (int64_t k = 0; i + k < n; ++k) lane[k] += a[i + k] * weight_slope(b[i + k]);
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

// target_clones needs plain functions, so that each dtype has its own set.
#define AC_ROW_LOOPS(T, C)                                                                           \
  AC_CLONES bool finite_loop(const T* x, int64_t n) { return finite_row(x, n); }                     \
  AC_CLONES bool logits_loop(const T* x, int64_t n) { return logits_row(x, n); }                     \
  AC_CLONES void axpy_loop(C* out, C weight, const T* x, int64_t n) { axpy_row(out, weight, x, n); } \
  AC_CLONES void scale_loop(T* g, bool add, C weight, const C* g_out, int64_t n) {                   \
    scale_row(g, add, weight, g_out, n);                                                             \
  }                                                                                                  \
  AC_CLONES void add_loop(T* g, const T* x, int64_t n) { add_row(g, x, n); }                         \
  AC_CLONES C dot_loop(const C* a, const T* b, int64_t n) { return dot_row(a, b, n); }
AC_ROW_LOOPS(float, float)
AC_ROW_LOOPS(double, double)
AC_ROW_LOOPS(bfloat16, float)
AC_ROW_LOOPS(float16, float)
#undef AC_ROW_LOOPS

template <class T>
const T* row_of(const void* base, int64_t row, int64_t n) {
  return static_cast<const T*>(base) + row * n;
}
template <class T>
T* row_of(void* base, int64_t row, int64_t n) {
  return static_cast<T*>(base) + row * n;
}

bool finite_block_row(const Leaf& leaf, int64_t i) {
  bool finite = true;
  dispatch(leaf.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    finite = finite_loop(row_of<T>(leaf.block, i, leaf.row_elements), leaf.row_elements);
  });
  return finite;
}
// Called only for a row that is not finite, so that a row without a mask is read once.
__attribute__((noinline)) bool logits_block_row(const Leaf& leaf, int64_t i) {
  bool logits = true;
  dispatch(leaf.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    logits = logits_loop(row_of<T>(leaf.block, i, leaf.row_elements), leaf.row_elements);
  });
  return logits;
}

void copy_result_row(const Leaf& leaf, int64_t i, int64_t r) {
  const int64_t bytes = leaf.row_elements * size_of(leaf.dtype);
  std::memcpy(static_cast<char*>(leaf.result) + r * bytes, static_cast<const char*>(leaf.block) + i * bytes,
              static_cast<size_t>(bytes));
}

template <class S>
void halt_rows(const HaltStep& a, int64_t begin, int64_t end) {
  const bool weighted = is_weighted(a);
  const bool separate_readout = a.readout.block && (a.n_leaves == 0 || a.readout.block != a.leaves[0].block);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = a.row[i];
    if (r < 0) {
      a.flag[i] = kPadding;
      pass_carry<S>(a, i);
      continue;
    }
    const Decision<S> v = decide<S>(a, i, r);
    const bool masked = may_mask(v.weight);
    bool finite = v.finite && (!separate_readout || finite_block_row(a.readout, i) ||
                               (masked && logits_block_row(a.readout, i)));
    for (int64_t l = 0; l < a.n_leaves && finite; ++l)
      finite = finite_block_row(a.leaves[l], i) ||
               (masked && l == a.read_leaf && logits_block_row(a.leaves[l], i));
    const Status flag = outcome(v.halt, finite, step_of(a, i), a.min_steps, a.max_steps);
    a.flag[i] = flag;
    if (weighted && v.weight != 0) {
      dispatch(a.readout.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using C = compute_t<T>;
        const int64_t n = a.readout.row_elements;
        axpy_loop(row_of<C>(a.readout.result, r, n), static_cast<C>(v.weight),
                  row_of<T>(a.readout.block, i, n), n);
      });
    }
    for (int64_t s = 0; s < a.n_sums && flag != kNonFinite; ++s) {
      const S increment = a.sums[s].increment ? static_cast<const S*>(a.sums[s].increment)[i] : v.cost;
      static_cast<S*>(a.sums[s].total)[r] += increment;
    }
    if (flag == kRunning) continue;
    if (a.retire) a.row[i] = -1;
    a.steps[r] = step_of(a, i);
    a.status[r] = flag;
    if (!weighted && a.readout.block) copy_result_row(a.readout, i, r);
    for (int64_t l = 0; l < a.n_leaves; ++l) copy_result_row(a.leaves[l], i, r);
  }
}

// Writes the readout's gradient and returns the weight's.
template <class S>
S backward_readout(const HaltBackward& a, int64_t i, int64_t r, bool live, bool ended) {
  const int64_t n = a.readout_elements;
  S g_weight = 0;
  dispatch(a.readout_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = compute_t<T>;
    T* g = row_of<T>(a.g_readout ? a.g_readout : a.leaves[0].g_block, i, n);
    const bool add = a.g_readout == nullptr;
    if (a.weight && a.g_output && live) {
      const C* g_out = row_of<C>(a.g_output, r, n);
      if (a.readout) g_weight = S(dot_loop(g_out, row_of<T>(a.readout, i, n), n));
      scale_loop(g, add, static_cast<C>(static_cast<const S*>(a.weight)[i]), g_out, n);
    } else if (!a.weight && a.g_output && ended) {
      const T* g_out = row_of<T>(a.g_output, r, n);
      if (add) {
        add_loop(g, g_out, n);
      } else {
        std::memcpy(g, g_out, static_cast<size_t>(n) * sizeof(T));
      }
    } else if (!add) {
      std::memset(g, 0, static_cast<size_t>(n) * sizeof(T));
    }
  });
  return g_weight;
}

template <class S>
void backward_rows(const HaltBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = a.row[i];
    const int8_t flag = a.flag[i];
    const bool ended = flag == kHalted || flag == kMaxSteps;
    const int64_t place = flag == kRunning ? (a.place ? a.place[i] : i) : -1;
    for (int64_t l = 0; l < a.n_leaves; ++l) {
      const LeafGrad& leaf = a.leaves[l];
      const int64_t bytes = leaf.row_elements * size_of(leaf.dtype);
      const void* from = nullptr;
      if (ended && leaf.g_result) from = static_cast<const char*>(leaf.g_result) + r * bytes;
      if (place >= 0 && leaf.g_packed) from = static_cast<const char*>(leaf.g_packed) + place * bytes;
      char* to = static_cast<char*>(leaf.g_block) + i * bytes;
      if (from) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
      } else {
        std::memset(to, 0, static_cast<size_t>(bytes));
      }
    }
    const bool live = ended || flag == kRunning;
    for (int64_t s = 0; s < a.n_sums; ++s)
      static_cast<S*>(a.sums[s].g_increment)[i] = live ? static_cast<const S*>(a.sums[s].g_total)[r] : S(0);
    S g_weight = 0;
    if (a.readout_elements > 0) g_weight = backward_readout<S>(a, i, r, live, ended);
    if (a.g_weight) static_cast<S*>(a.g_weight)[i] = g_weight;
    if (a.logits) act_backward_row<S>(a, i, r, place, live, g_weight);
  }
}

}  // namespace

int64_t halt_step_cpu(const HaltStep& a) {
  int64_t bytes = 16 + 2 * a.readout.row_elements * size_of(a.readout.dtype);
  for (int64_t l = 0; l < a.n_leaves; ++l) bytes += a.leaves[l].row_elements * size_of(a.leaves[l].dtype);
  parallel_rows(a.rows, bytes, [&](int64_t begin, int64_t end) {
    if (a.wide) {
      halt_rows<double>(a, begin, end);
    } else {
      halt_rows<float>(a, begin, end);
    }
  });
  int64_t running = 0;
  for (int64_t i = 0; i < a.rows; ++i) running += a.flag[i] == kRunning;
  return running;
}

void fill_holes_cpu(const int8_t* flag, int64_t running, int64_t* row, const Move* moves, int64_t n_moves) {
  // The k-th ended row among the first `running` rows is replaced by the k-th active row behind them; there
  // are as many of these as of those.
  int64_t tail = running;
  auto next_from_tail = [&] {
    while (flag[tail] != kRunning) ++tail;
    return tail++;
  };
  for (int64_t m = 0; m < n_moves; ++m) {
    if (moves[m].src == moves[m].dst) continue;
    parallel_rows(running, 2 * moves[m].row_bytes, [&](int64_t begin, int64_t end) {
      const int64_t size = moves[m].row_bytes;
      std::memcpy(static_cast<char*>(moves[m].dst) + begin * size,
                  static_cast<const char*>(moves[m].src) + begin * size,
                  static_cast<size_t>((end - begin) * size));
    });
  }
  for (int64_t hole = 0; hole < running; ++hole) {
    if (flag[hole] == kRunning) continue;
    const int64_t from = next_from_tail();
    row[hole] = row[from];
    for (int64_t m = 0; m < n_moves; ++m) {
      const int64_t size = moves[m].row_bytes;
      std::memcpy(static_cast<char*>(moves[m].dst) + hole * size,
                  static_cast<const char*>(moves[m].src) + from * size, static_cast<size_t>(size));
    }
  }
}

int64_t plan_packing_cpu(const int8_t* flag, const int64_t* row, int64_t rows, int64_t* index, int64_t* place,
                         int64_t* next) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool goes_on = flag[i] == kRunning;
    index[count] = i;  // branch-free: the next row overwrites the entry of a row that has ended
    next[count] = row[i];
    place[i] = goes_on ? count : -1;
    count += goes_on;
  }
  return count;
}

void plan_packing_cpu(const PackingPlan& a) {
  int64_t count = 0;
  for (int64_t i = 0; i < a.rows; ++i) {
    a.place[i] = a.flag[i] == kRunning && count < a.size ? count : -1;
    if (a.place[i] < 0) continue;
    a.index[count] = i;
    a.next[count++] = a.row[i];
  }
  for (int64_t j = count; j < a.size; ++j) {
    a.index[j] = count > 0 ? a.index[j - count] : -1;
    a.next[j] = -1;
  }
}

void halt_backward_cpu(const HaltBackward& a) {
  int64_t bytes = 16 + 3 * a.readout_elements * size_of(a.readout_dtype);
  for (int64_t l = 0; l < a.n_leaves; ++l) bytes += 2 * a.leaves[l].row_elements * size_of(a.leaves[l].dtype);
  parallel_rows(a.rows, bytes, [&](int64_t begin, int64_t end) {
    if (a.wide) {
      backward_rows<double>(a, begin, end);
    } else {
      backward_rows<float>(a, begin, end);
    }
  });
}

}  // namespace adaptcomp
