// Small products of a tile of rows with a matrix that is packed once per call.
//
// Each element of the product is one chain of multiply-adds over k, in order, whatever the other rows of the
// tile: a row has the same bits alone and in any batch.
#pragma once

#include "common/simd.h"

namespace adaptcomp {
namespace AC_ISA {

// Number of rows of one pass over a panel. With two vectors of columns there are 16 accumulators in the 32
// registers of AVX-512 and 12 in the 16 of AVX2, where 8, as many as the latency of the multiply-adds asks
// for, were 5 to 10 % slower. The baseline multiplies and adds in two instructions, and needs a register for
// the product.
constexpr int kBlock = AC_VECTOR_BYTES == 64 ? 8 : AC_VECTOR_BYTES == 32 ? 6 : 4;

// A matrix [k, n] in panels of two vectors of columns (the last panel may have one). A panel is contiguous,
// [k][columns], so that a product reads it from front to back. Columns beyond n are zero.
template <class C>
class Panels {
 public:
  static constexpr int64_t kWide = 2 * kLanes<C>;

  Panels() = default;
  // from[i, j] at from[i * row + j * column].
  Panels(const C* from, int64_t k, int64_t n, int64_t row, int64_t column)
      : k_(k), n_(padded<C>(n)), data_(k * n_) {
    for (int64_t j = 0; j < n_; j += kWide) {
      const int64_t width = n_ - j < kWide ? n_ - j : kWide;
      C* out = data_.get() + j * k;
      const int64_t real = n - j < width ? n - j : width;
      if (real < width) std::memset(out, 0, static_cast<size_t>(k * width) * sizeof(C));
      if (column == 1) {
        for (int64_t i = 0; i < k; ++i) copy(out + i * width, from + i * row + j, real);
      } else if (row == 1) {
        transpose(from + j * column, column, real, k, out, width);
      } else {
        for (int64_t i = 0; i < k; ++i)
          for (int64_t c = 0; c < real; ++c) out[i * width + c] = from[i * row + (j + c) * column];
      }
    }
  }
  int64_t inner() const { return k_; }
  int64_t columns() const { return n_; }  // padded
  const C* panel(int64_t column) const { return data_.get() + column * k_; }

 private:
  static AC_INLINE void copy(C* to, const C* from, int64_t n) {
    int64_t c = 0;
    for (; c + kLanes<C> <= n; c += kLanes<C>) store_vec(to + c, load_vec(from + c));
    for (; c < n; ++c) to[c] = from[c];
  }
  // out[i, c] = from[c, i], for c < n and i < k.
  static void transpose(const C* from, int64_t stride, int64_t n, int64_t k, C* out, int64_t width) {
    constexpr int64_t kSide = kLanes<C>;
    const int64_t squares = k / kSide * kSide;
    int64_t c = 0;
    for (; c + kSide <= n; c += kSide)
      for (int64_t i = 0; i < squares; i += kSide)
        transpose_square(from + c * stride + i, stride, out + i * width + c, width);
    for (int64_t i = 0; i < squares; ++i)
      for (int64_t rest = c; rest < n; ++rest) out[i * width + rest] = from[rest * stride + i];
    for (int64_t i = squares; i < k; ++i)
      for (c = 0; c < n; ++c) out[i * width + c] = from[c * stride + i];
  }

  int64_t k_ = 0, n_ = 0;
  Scratch<C> data_;
};

// done[r, w] = init[r, w] + sum_i x[r, i] panel[i, w]; a null init is zero. It is not inlined, so that all
// callers share one copy.
template <class C, int R, int W>
__attribute__((noinline)) void block_product(const C* x, int64_t stride, const C* panel, int64_t k,
                                             const C* init, int64_t init_stride, vec<C>* done) {
  vec<C> sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w)
      sum[r][w] = init ? load_vec(init + r * init_stride + w * kLanes<C>) : vec<C>{};
  for (int64_t i = 0; i < k; ++i) {
    vec<C> b[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) b[w] = load_vec(panel + (i * W + w) * kLanes<C>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vec<C> a = splat(x[r * stride + i]);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sum[r][w] = fma(a, b[w], sum[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) done[r * W + w] = sum[r][w];
}

// Number of rows of scratch for `rows` rows of a tile.
constexpr int64_t whole_blocks(int64_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

// Initial values of a product: rows `stride` apart, one row for all if that is 0, zero if `data` is null.
template <class C>
struct From {
  const C* data = nullptr;
  int64_t stride = 0;
};

// Calls last(r, j, from[r, j] + sum_i in[r, i] matrix[i, j]) for every row r and vector of columns from j,
// and also for rows from `rows` up to whole_blocks(rows), whose values mean nothing. A panel is used for all
// rows before the next one is read.
template <class C, class Last>
AC_INLINE void product(const C* in, int64_t stride, int64_t rows, const Panels<C>& matrix, From<C> from,
                       const Last& last) {
  vec<C> done[kBlock * 2];
  for (int64_t column = 0; column < matrix.columns(); column += Panels<C>::kWide) {
    const bool wide = column + Panels<C>::kWide <= matrix.columns();
    for (int64_t row = 0; row < rows; row += kBlock) {
      // The remaining rows go as 2, 4 or kBlock rows, some of them unused: these are few variants, with rows
      // enough to keep the processor's pipelines full.
      const int64_t left = rows - row;
      const int height = left <= 2 ? 2 : left <= 4 ? 4 : kBlock;
      const auto block = wide ? (height == 2   ? block_product<C, 2, 2>
                                 : height == 4 ? block_product<C, 4, 2>
                                               : block_product<C, kBlock, 2>)
                              : (height == 2   ? block_product<C, 2, 1>
                                 : height == 4 ? block_product<C, 4, 1>
                                               : block_product<C, kBlock, 1>);
      const C* init = from.data ? from.data + row * from.stride + column : nullptr;
      block(in + row * stride, stride, matrix.panel(column), matrix.inner(), init, from.stride, done);
      const int shift = wide ? 1 : 0, count = height << shift;
#pragma GCC unroll 1
      for (int i = 0; i < count; ++i) last(row + (i >> shift), column + (i & shift) * kLanes<C>, done[i]);
    }
  }
}

// A pair of factors of an outer product.
template <class C>
struct Factors {
  const C* left;
  int64_t left_stride;
  const C* right;
  int64_t right_stride;
};

// sums[i, j] += sum over the pairs and the rows r of left[r, i] right[r, j], for i < n and j < m; sums is [n,
// m], m in whole vectors.
template <class C, int R, int W, int P>
__attribute__((noinline)) void outer_block(C* sums, int64_t m, const Factors<C> (&pairs)[P], int64_t rows,
                                           int64_t i, int64_t j) {
  vec<C> sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) sum[r][w] = vec<C>{};
  for (const Factors<C>& f : pairs) {
    for (int64_t row = 0; row < rows; ++row) {
      vec<C> b[W];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) b[w] = load_vec(f.right + row * f.right_stride + j + w * kLanes<C>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<C> a = splat(f.left[row * f.left_stride + i + r]);
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) sum[r][w] = fma(a, b[w], sum[r][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      C* at = sums + (i + r) * m + j + w * kLanes<C>;
      store_vec(at, load_vec(at) + sum[r][w]);
    }
}

template <class C, int P>
AC_INLINE void add_outer(C* sums, int64_t n, int64_t m, const Factors<C> (&pairs)[P], int64_t rows) {
  int64_t i = 0;
  const auto columns = [&](auto height) __attribute__((always_inline)) {
    constexpr int R = decltype(height)::value;
    int64_t j = 0;
    for (; j + 2 * kLanes<C> <= m; j += 2 * kLanes<C>) outer_block<C, R, 2>(sums, m, pairs, rows, i, j);
    if (j < m) outer_block<C, R, 1>(sums, m, pairs, rows, i, j);
  };
  for (; i + kBlock <= n; i += kBlock) columns(std::integral_constant<int, kBlock>());
  for (; i + 2 <= n; i += 2) columns(std::integral_constant<int, 2>());
  for (; i < n; ++i) columns(std::integral_constant<int, 1>());
}

// sums[j] += sum over the rows r of x[r, j].
template <class C>
AC_INLINE void add_columns(C* sums, int64_t n, const C* x, int64_t stride, int64_t rows) {
  for (int64_t j = 0; j < n; j += kLanes<C>) {
    vec<C> sum{};
    for (int64_t r = 0; r < rows; ++r) sum = sum + load_vec(x + r * stride + j);
    store_vec(sums + j, load_vec(sums + j) + sum);
  }
}

}  // namespace AC_ISA
}  // namespace adaptcomp
