// Small matrix products on a tile of rows in a block's shared memory, and other collective operations of a
// block.
//
// Each element of a product is one chain of multiply-adds over k, in order, as in common/tiles.h. The tile
// decides which thread computes an element, but not its bits. Sums over a row are computed by one warp, in an
// order that depends on the row's length only. So a row has the same bits alone and in any batch.
//
// The products do not use tensor cores, which take float32 only as TF32, with 10 bits of fraction: a descent
// that compares energies to 1e-4 would converge at other steps than on the host.
#pragma once

#include <cmath>

#include "common/cuda.cuh"

namespace adaptcomp {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
// Rows of a thread's part of a product, which use each matrix element that it reads.
constexpr int kHeight = 4;
// Elements of one access, and columns of a thread's part.
template <class C>
constexpr int kPack = 16 / static_cast<int>(sizeof(C));

template <class C>
AC_HD int64_t padded(int64_t n) {
  return (n + kPack<C> - 1) / kPack<C> * kPack<C>;
}
// The stride of a tile's rows: padded to full accesses, plus one access, so that rows of a power of two do
// not share banks.
template <class C>
AC_HD int tile_stride(int64_t n) {
  return static_cast<int>(padded<C>(n)) + kPack<C>;
}

// Hands out consecutive pieces of memory, each aligned to 16 bytes. With a null base it measures the size.
class Carver {
 public:
  AC_HD explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  AC_HD T* take(int64_t n) {
    char* piece = base_ + used_;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(piece);
  }
  AC_HD int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Collective operations of one warp on a row. All lanes have to reach every call together.
struct Warp {
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // Calls f(i) for i < n; the writes are visible to every lane afterwards.
  template <class F>
  static __device__ __forceinline__ void each(int n, const F& f) {
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) f(i);
    __syncwarp();
  }
  // Calls f once, after the lanes' earlier accesses. The lanes see what it wrote once they have met again.
  template <class F>
  static __device__ __forceinline__ void once(const F& f) {
    __syncwarp();
    if (lane() == 0) f();
  }
  // The sum over the lanes, the same bits in each.
  template <class C>
  static __device__ __forceinline__ C total(C sum) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    return sum;
  }
  template <class C>
  static __device__ __forceinline__ C most(C x) {
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
      const C other = __shfl_xor_sync(~0u, x, d);
      x = other > x ? other : x;
    }
    return x;
  }
  template <class C>
  static __device__ __forceinline__ C dot(const C* a, const C* b, int n) {
    C sum = 0;
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) sum = std::fma(a[i], b[i], sum);
    return total(sum);
  }
  template <class C>
  static __device__ __forceinline__ bool finite(const C* x, int n) {
    bool all = true;
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) all &= is_finite(x[i]);
    return __all_sync(~0u, all);
  }
  template <class C>
  static __device__ __forceinline__ void copy(C* to, const C* from, int n) {
    each(n, [&](int i) { to[i] = from[i]; });
  }
  template <class C>
  static __device__ __forceinline__ void zero(C* to, int n) {
    each(n, [&](int i) { to[i] = C(0); });
  }
};

// Rows of n elements in shared memory, one of each kind for each slot. They share one base address, because a
// kernel with an address for each kind runs out of registers.
template <class C>
class TileRows {
 public:
  AC_HD TileRows(int64_t n, int kinds, int slots, Carver& shared)
      : stride_(tile_stride<C>(n)), slots_(slots), data_(shared.take<C>(kinds * slots * tile_stride<C>(n))) {}
  __device__ __forceinline__ C* at(int kind, int slot) const {
    return data_ + (kind * slots_ + slot) * stride_;
  }
  __device__ __forceinline__ C* all(int kind) const { return at(kind, 0); }  // rows stride() apart
  __device__ __forceinline__ int stride() const { return stride_; }

 private:
  int stride_, slots_;
  C* data_;
};

// The slots of a tile, at most 32. Those with a bit in `live` hold the batch row `row[slot]`.
struct Slots {
  int count;
  unsigned live;
  const int64_t* row;

  __device__ __forceinline__ bool holds(int slot) const { return (live >> slot & 1) != 0; }
  // Calls f(slot) for every slot that holds a row, each in one fixed warp.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int slot = static_cast<int>(threadIdx.x) / kWarp; slot < count; slot += kWarps)
      if (holds(slot)) f(slot);
  }
};

// The slots for which `f` is true, as bits; the same in every thread of the block.
template <class F>
__device__ __forceinline__ unsigned slots_where(int count, const F& f) {
  return __ballot_sync(~0u, Warp::lane() < count && f(Warp::lane()));
}

// A matrix [inner, columns] that products read: packed in global memory, and copied to shared memory if it
// fits. Rows are `stride` apart, a number of full accesses; the columns from `columns` on are zero.
template <class C>
class Matrix {
 public:
  AC_HD Matrix(int64_t inner, int64_t columns, bool in_shared, Carver& global, Carver& shared)
      : inner_(static_cast<int>(inner)),
        columns_(static_cast<int>(columns)),
        stride_(static_cast<int>(padded<C>(columns))) {
    packed_ = global.take<C>(inner * padded<C>(columns));
    copy_ = in_shared ? shared.take<C>(inner * padded<C>(columns)) : packed_;
  }
  // Copies the matrix to shared memory, by all threads; a barrier has to follow.
  __device__ __forceinline__ void bring() {
    if (copy_ == packed_) return;
    const auto* from = reinterpret_cast<const Pack<C, kPack<C>>*>(packed_);
    auto* to = reinterpret_cast<Pack<C, kPack<C>>*>(copy_);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < inner_ * (stride_ / kPack<C>); i += kThreads)
      to[i] = from[i];
  }
  C* packed() const { return packed_; }
  AC_HD const C* data() const { return copy_; }
  AC_HD int inner() const { return inner_; }
  AC_HD int columns() const { return columns_; }
  AC_HD int stride() const { return stride_; }

 private:
  int inner_, columns_, stride_;
  C *packed_, *copy_;
};

// Computes kHeight rows and W columns of a product in one thread.
template <int W, class C, class From, class To>
__device__ __forceinline__ void product_part(const Slots& slots, const C* in, int stride,
                                             const Matrix<C>& matrix, int row, int column, const From& from,
                                             const To& to) {
  constexpr int P = kPack<C>;
  const auto wanted = [&](int r, int c) {
    return slots.holds(row + r) && (W == 1 || column + c < matrix.columns());
  };
  int x[kHeight];
  C sum[kHeight][W];
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
    x[r] = (row + r < slots.count ? row + r : row) * stride;
#pragma unroll
    for (int c = 0; c < W; ++c) sum[r][c] = wanted(r, c) ? from(row + r, column + c) : C(0);
  }
  const C* w = matrix.data() + column;
  const int whole = matrix.inner() / P * P;
  int k = 0;
#pragma unroll 1
  for (; k < whole; k += P) {
    Pack<C, W> b[P];
#pragma unroll
    for (int i = 0; i < P; ++i) b[i] = *reinterpret_cast<const Pack<C, W>*>(w + i * matrix.stride());
    w += P * matrix.stride();
#pragma unroll
    for (int r = 0; r < kHeight; ++r) {
      const auto a = *reinterpret_cast<const Pack<C, P>*>(in + x[r] + k);
#pragma unroll
      for (int i = 0; i < P; ++i)
#pragma unroll
        for (int c = 0; c < W; ++c) sum[r][c] = std::fma(a.v[i], b[i].v[c], sum[r][c]);
    }
  }
#pragma unroll 1
  for (; k < matrix.inner(); ++k) {
    const auto b = *reinterpret_cast<const Pack<C, W>*>(w);
    w += matrix.stride();
#pragma unroll
    for (int r = 0; r < kHeight; ++r)
#pragma unroll
      for (int c = 0; c < W; ++c) sum[r][c] = std::fma(in[x[r] + k], b.v[c], sum[r][c]);
  }
#pragma unroll
  for (int r = 0; r < kHeight; ++r)
#pragma unroll
    for (int c = 0; c < W; ++c)
      if (wanted(r, c)) to(row + r, column + c, sum[r][c]);
}

// Calls to(slot, j, from(slot, j) + sum_k in[slot, k] matrix[k, j]) for every slot that holds a row and every
// column j, by all threads. `in` lies in shared memory. A barrier has to follow before other threads read the
// results.
template <class C, class From, class To>
__device__ __forceinline__ void product(const Slots& slots, const C* in, int stride, const Matrix<C>& matrix,
                                        const From& from, const To& to) {
  // A thread takes a single column if there are threads enough: the longest chain, not the loads, bounds a
  // small product.
  const bool single = (slots.count + kHeight - 1) / kHeight * matrix.columns() <= kThreads;
  const int width = single ? 1 : kPack<C>;
  const int across = (matrix.columns() + width - 1) / width,
            parts = (slots.count + kHeight - 1) / kHeight * across;
#pragma unroll 1
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kThreads) {
    const int row = part / across * kHeight, column = part % across * width;
    if ((slots.live >> row & ((1u << kHeight) - 1)) == 0) continue;
    if (single) {
      product_part<1>(slots, in, stride, matrix, row, column, from, to);
    } else {
      product_part<kPack<C>>(slots, in, stride, matrix, row, column, from, to);
    }
  }
}

// Initial values of a product that starts from zero.
template <class C>
struct Nothing {
  __device__ __forceinline__ C operator()(int, int) const { return C(0); }
};

// Number of elements of sums [n, m] for add_outer, padded to full accesses in both directions; the padding is
// never read.
template <class C>
AC_HD int64_t outer_size(int64_t n, int64_t m) {
  return padded<C>(n) * padded<C>(m);
}

// A pair of factors of an outer product, rows of a tile.
template <class C>
struct Factors {
  const C* left;
  int left_stride;
  const C* right;
  int right_stride;
};

// sums[i, j] += sum over the pairs and the slots, in order, of left[slot, i] right[slot, j]. Each thread
// computes its own elements.
template <class C, int N>
__device__ __forceinline__ void add_outer(const Slots& slots, C* sums, int n, int m,
                                          const Factors<C> (&pairs)[N]) {
  constexpr int P = kPack<C>;
  const int across = static_cast<int>(padded<C>(m)) / P, parts = static_cast<int>(padded<C>(n)) / P * across;
#pragma unroll 1
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kThreads) {
    const int i = part / across * P, j = part % across * P;
    auto* place = reinterpret_cast<Pack<C, P>*>(sums) + i * across + j / P;
    Pack<C, P> sum[P]{};  // a chain that starts at 0, not at the large sums, keeps more digits
#pragma unroll
    for (int f = 0; f < N; ++f) {
#pragma unroll 1
      for (int slot = 0; slot < slots.count; ++slot) {
        if (!slots.holds(slot)) continue;
        const auto left =
            *reinterpret_cast<const Pack<C, P>*>(pairs[f].left + slot * pairs[f].left_stride + i);
        const auto right =
            *reinterpret_cast<const Pack<C, P>*>(pairs[f].right + slot * pairs[f].right_stride + j);
#pragma unroll
        for (int r = 0; r < P; ++r)
#pragma unroll
          for (int c = 0; c < P; ++c) sum[r].v[c] = std::fma(left.v[r], right.v[c], sum[r].v[c]);
      }
    }
#pragma unroll
    for (int r = 0; r < P; ++r) {
#pragma unroll
      for (int c = 0; c < P; ++c) sum[r].v[c] += place[r * across].v[c];
      place[r * across] = sum[r];
    }
  }
}

// sums[j] += sum over the slots, in order, of from[slot, j].
template <class C>
__device__ __forceinline__ void add_columns(const Slots& slots, C* sums, int n, const C* from, int stride) {
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) {
    C sum = 0;
#pragma unroll 1
    for (int slot = 0; slot < slots.count; ++slot)
      if (slots.holds(slot)) sum += from[slot * stride + j];
    sums[j] += sum;
  }
}

}  // namespace adaptcomp
