// Products of a tile of rows with a matrix that is packed once per call. A row is a pointer, so that rows of
// any number and place make a tile; what becomes of an element is decided while it is in a register.
//
// Each element is one chain of multiply-adds over k, in order, whatever the other rows of the tile: a row has
// the same bits alone and in any batch.
#pragma once

#include "common/slots.h"

namespace adaptcomp {
namespace AC_ISA {

// The distance of rows of n numbers, in whole vectors. Rows at a multiple of a page's part would fall into
// few sets of the first-level cache, and push each other out.
template <class C>
constexpr int64_t apart(int64_t n) {
  return n + 64 / static_cast<int64_t>(sizeof(C));
}

// The columns of a matrix in blocks of P vectors, each block contiguous: [k][P][lanes]. The vectors of a
// block either follow each other, or are the same units of P gates.
template <class C, int P>
class Blocks {
 public:
  static constexpr int64_t kWide = P * kLanes<C>;

  Blocks() = default;
  // The transpose of a layer's weight [gates n, k]. Block b holds units b of every gate if gates == P, or,
  // with one gate, P vectors of units. The lanes beyond the last unit compute that one again: with weights
  // of zero they would be NaN where x is infinite and the units are not, and pass that on.
  static Blocks transposed(const C* weight, int64_t gates, int64_t n, int64_t k) {
    const bool gated = gates == P && P > 1;
    const int64_t width = padded<C>(n);
    Blocks out(k, gated ? width / kLanes<C> : (width + kWide - 1) / kWide);
    for (int64_t b = 0; b < out.count_; ++b)
      for (int p = 0; p < P; ++p) {
        const int64_t unit = gated ? b * kLanes<C> : (b * P + p) * kLanes<C>;
        C* to = out.data_.get() + b * k * kWide + p * kLanes<C>;
        spread(weight + (gated ? p * n * k : 0), unit, n, k, to);
      }
    return out;
  }
  // A layer's weight [gates n, m] as the matrix from its outputs, each gate padded, to its inputs. What lies
  // beyond the matrix is zero.
  static Blocks backward(const C* weight, int64_t gates, int64_t n, int64_t m) {
    const int64_t width = padded<C>(n), columns = padded<C>(m);
    Blocks out(gates * width, (columns + kWide - 1) / kWide);
    for (int64_t b = 0; b < out.count_; ++b) {
      C* to = out.data_.get() + b * out.k_ * kWide;
      const int64_t column = b * kWide, real = least(m - column, kWide);
      if (width != n || real < kWide) zero_row(to, out.k_ * kWide);
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t u = 0; u < n; ++u)
          copy_row(to + (g * width + u) * kWide, weight + (g * n + u) * m + column, real);
    }
    return out;
  }

  int64_t inner() const { return k_; }
  int64_t count() const { return count_; }
  const C* block(int64_t b) const { return data_.get() + b * k_ * kWide; }

 private:
  Blocks(int64_t k, int64_t count) : k_(k), count_(count), data_(k * count * kWide) {}

  // to[i kWide + c] = from[min(unit + c, n - 1), i], of a matrix [n, k].
  static void spread(const C* from, int64_t unit, int64_t n, int64_t k, C* to) {
    int64_t i = 0;
    if (unit + kLanes<C> <= n)
      for (; i + kLanes<C> <= k; i += kLanes<C>)
        transpose_square(from + unit * k + i, k, to + i * kWide, kWide);
    for (; i < k; ++i)
      for (int64_t c = 0; c < kLanes<C>; ++c) to[i * kWide + c] = from[least(unit + c, n - 1) * k + i];
  }

  int64_t k_ = 0, count_ = 0;
  Scratch<C> data_;
};

// The most rows of a pass: with P vectors of columns their accumulators fill the registers.
template <int P>
constexpr int kTall = AC_VECTOR_BYTES == 64 ? (P <= 3 ? 8 : 6)
                                            : (P == 2   ? 6
                                               : P == 3 ? 4
                                                        : 3);
// Blocks of columns that are computed at once for few rows, to keep the processor's pipelines full.
template <int P, int R>
constexpr int kAtOnce = 12 / (P * R) < 1   ? 1
                        : 12 / (P * R) > 4 ? 4
                                           : 12 / (P * R);

// The elements of `rows` <= R rows and N blocks from b: last(r, b, sums of the P vectors). A null `start` is
// zero. It is not inlined, so that the registers are its own.
template <class C, int P, int R, int N, class Last>
__attribute__((noinline)) void block_of(const C* const* x, int64_t rows, const Blocks<C, P>& matrix,
                                        const C* start, int64_t b, const Last& last) {
  const C* in[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = x[r < rows ? r : rows - 1];
  vec<C> sum[R][N][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        sum[r][n][p] = start ? load_vec(start + ((b + n) * P + p) * kLanes<C>) : vec<C>{};
  const int64_t k = matrix.inner(), next = k * Blocks<C, P>::kWide;
  const C* w = matrix.block(b);
  for (int64_t i = 0; i < k; ++i, w += Blocks<C, P>::kWide) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      vec<C> column[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) column[p] = load_vec(w + n * next + p * kLanes<C>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<C> a = splat(in[r][i]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[r][n][p] = fma(a, column[p], sum[r][n][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) last(r, b + n, sum[r][n]);
  }
}

template <class C, int P, int R, class Last>
AC_INLINE void blocks_of(const C* const* x, int64_t rows, const Blocks<C, P>& matrix, const C* start,
                         int64_t b, int64_t end, const Last& last) {
  constexpr int N = kAtOnce<P, R>;
  if constexpr (N > 1)
    for (; b + N <= end; b += N) block_of<C, P, R, N>(x, rows, matrix, start, b, last);
  for (; b < end; ++b) block_of<C, P, R, 1>(x, rows, matrix, start, b, last);
}

// Calls f with the number of rows of a pass as a constant: `rows`, or the next that there is a build for,
// whose other rows are computed for nothing. Double precision has fewer builds.
template <class C, int P, class F>
AC_INLINE void with_height(int64_t rows, const F& f) {
  constexpr int kMost = kTall<P>;
  constexpr bool kFine = sizeof(C) == 4;
  if (rows == 1) return f(std::integral_constant<int, 1>());
  if (rows == 2) return f(std::integral_constant<int, 2>());
  if constexpr (kFine && kMost > 3)
    if (rows == 3) return f(std::integral_constant<int, 3>());
  if constexpr (kMost > 4)
    if (rows <= 4) return f(std::integral_constant<int, 4>());
  if constexpr (kFine && kMost > 6)
    if (rows <= 6) return f(std::integral_constant<int, 6>());
  f(std::integral_constant<int, kMost>());
}

// Calls last(r, b, start + x[r] matrix) for every row r and block b. A block is used for all rows before the
// next one is read, so that it stays in the first-level cache. The rows are split evenly over the passes: a
// pass of one or two rows would wait for each addition.
template <class C, int P, class Last>
AC_INLINE void product(const C* const* x, int64_t rows, const Blocks<C, P>& matrix, const C* start,
                       const Last& last) {
  if (rows <= 0) return;
  const int64_t passes = (rows + kTall<P> - 1) / kTall<P>, height = (rows + passes - 1) / passes;
  const int64_t step = passes == 1 ? matrix.count() : 1;
  for (int64_t b = 0; b < matrix.count(); b += step)
    for (int64_t r = 0; r < rows; r += height) {
      const auto shifted = [&](int64_t i, int64_t block, const vec<C>(&sum)[P])
                               __attribute__((always_inline)) { last(r + i, block, sum); };
      const int64_t now = least(height, rows - r);
      with_height<C, P>(now, [&](auto tall) __attribute__((always_inline)) {
        blocks_of<C, P, decltype(tall)::value>(x + r, now, matrix, start, b, b + step, shifted);
      });
    }
}

// The same from zero.
template <class C, int P, class Last>
AC_INLINE void product(const C* const* x, int64_t rows, const Blocks<C, P>& matrix, const Last& last) {
  const C* const zero = nullptr;
  product(x, rows, matrix, zero, last);
}

// sums[i, j] = the sum over the rows r of left[r, i] right[r][j], for i < n and j < m, and what was there
// unless that is `fresh`. sums is [n, m], with m in whole vectors.
template <class C, int R, int W>
__attribute__((noinline)) void outer_of(C* sums, bool fresh, int64_t m, const C* left, int64_t stride,
                                        const C* const* right, int64_t rows, int64_t i, int64_t j) {
  vec<C> sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w)
      sum[r][w] = fresh ? vec<C>{} : load_vec(sums + (i + r) * m + j + w * kLanes<C>);
  const C* a = left + i;
  for (int64_t row = 0; row < rows; ++row, a += stride) {
    vec<C> b[W];
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) b[w] = load_vec(right[row] + j + w * kLanes<C>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vec<C> factor = splat(a[r]);
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) sum[r][w] = fma(factor, b[w], sum[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) store_vec(sums + (i + r) * m + j + w * kLanes<C>, sum[r][w]);
}

template <class C>
AC_INLINE void outer(C* sums, bool fresh, int64_t n, int64_t m, const C* left, int64_t stride,
                     const C* const* right, int64_t rows) {
  constexpr int kTallest = AC_VECTOR_BYTES == 64 ? 8 : 4;
  const auto strip = [&](auto wide, int64_t j) __attribute__((always_inline)) {
    constexpr int W = decltype(wide)::value;
    int64_t i = 0;
    for (; i + kTallest <= n; i += kTallest)
      outer_of<C, kTallest, W>(sums, fresh, m, left, stride, right, rows, i, j);
    for (; i < n; ++i) outer_of<C, 1, W>(sums, fresh, m, left, stride, right, rows, i, j);
  };
  // A strip of the right side stays in the first-level cache. Three vectors by `kTallest` sums fill the
  // registers.
  int64_t j = 0;
  for (; j + 3 * kLanes<C> <= m; j += 3 * kLanes<C>) strip(std::integral_constant<int, 3>(), j);
  if (j + kLanes<C> < m) {
    strip(std::integral_constant<int, 2>(), j);
  } else if (j < m) {
    strip(std::integral_constant<int, 1>(), j);
  }
}

}  // namespace AC_ISA
}  // namespace adaptcomp
