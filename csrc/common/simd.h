// Vectors of the instruction set for which a file is compiled, and elementary functions on them.
//
// Files that include this header are compiled once per instruction set (CMakeLists.txt), each time in its own
// namespace AC_ISA; common/isa.h chooses one when the module is loaded. Everything here is inlined or in that
// namespace, so that the linker cannot merge functions of different instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/pool.h"

#ifndef AC_ISA
#error "compile this file once per instruction set, with AC_ISA as its namespace"
#endif
#if defined(__AVX512F__)
#define AC_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define AC_VECTOR_BYTES 32
#else
#define AC_VECTOR_BYTES 16
#endif
#define AC_INLINE inline __attribute__((always_inline))

namespace adaptcomp {
namespace AC_ISA {

template <class C>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(AC_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(AC_VECTOR_BYTES)));
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(AC_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(AC_VECTOR_BYTES)));
};
template <class C>
using vec = typename Vec<C>::type;
using vecf = vec<float>;
using vecd = vec<double>;
template <class C>
constexpr int kLanes = AC_VECTOR_BYTES / sizeof(C);

template <class C>
AC_INLINE vec<C> load_vec(const C* p) {
  vec<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
AC_INLINE void store_vec(C* p, vec<C> v) {
  std::memcpy(p, &v, sizeof v);
}
// As intrinsics: zero + x would be an addition, since it turns minus zero into zero.
AC_INLINE vecf splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return vecf{x, x, x, x};
#endif
}
AC_INLINE vecd splat(double x) {
#if defined(__AVX512F__)
  return _mm512_set1_pd(x);
#elif defined(__AVX2__)
  return _mm256_set1_pd(x);
#else
  return vecd{x, x};
#endif
}

// a b + c, rounded once if the instruction set can. The compiler itself contracts nothing.
AC_INLINE vecf fma(vecf a, vecf b, vecf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
AC_INLINE vecd fma(vecd a, vecd b, vecd c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger and the smaller of two values; the second argument if either is NaN.
AC_INLINE vecf max_vec(vecf a, vecf b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // with _mm512_max_ps GCC 12 warns about its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
AC_INLINE vecf min_vec(vecf a, vecf b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
AC_INLINE vecd max_vec(vecd a, vecd b) { return a > b ? a : b; }
AC_INLINE vecd min_vec(vecd a, vecd b) { return a < b ? a : b; }

// 1 / x for finite x >= 1, within an ulp. A division would take as long as ten other operations.
AC_INLINE vecf reciprocal(vecf x) {
#if defined(__AVX512F__)
  const vecf y = _mm512_maskz_rcp14_ps(0xffff, x);
  return fma(fma(-x, y, splat(1.0f)), y, y);
#else
  return 1.0f / x;
#endif
}
AC_INLINE vecd reciprocal(vecd x) { return 1.0 / x; }

// The sum of the lanes, in a fixed order.
template <class C>
AC_INLINE C sum_lanes(vec<C> v) {
  C lane[kLanes<C>];
  store_vec(lane, v);
  for (int width = kLanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Whether any lane is NaN.
AC_INLINE bool any_nan(vecf v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
#else
  const float sum = sum_lanes<float>(v * 0.0f);
  return sum != sum;
#endif
}
AC_INLINE bool any_nan(vecd v) {
  const double sum = sum_lanes<double>(v * 0.0);
  return sum != sum;
}

// --- functions. In double they call the C library for each lane: large descents run in float.

template <class F>
AC_INLINE vecd each_lane(vecd x, const F& f) {
  double lane[kLanes<double>];
  store_vec(lane, x);
  for (double& v : lane) v = f(v);
  return load_vec(lane);
}

// exp within 0.9 ulp (1.2 without fma) on [-87.3, 88.3], and constant outside, which the callers cannot tell
// from 0 and infinity. NaN stays NaN.
AC_INLINE vecf exp_vec(vecf x) {
  using Bits = Vec<float>::bits;
  x = max_vec(splat(-87.3f), min_vec(splat(88.3f), x));
  const vecf magic = splat(12582912.0f);  // 1.5 2^23: adding it rounds to an integer, held in the low bits
  const vecf shifted = fma(x, splat(1.44269504088896341f), magic);
  const vecf n = shifted - magic;
  vecf r = fma(n, splat(-0.693145751953125f), x);
  r = fma(n, splat(-1.428606765330187e-6f), r);
  vecf p = splat(1.3814459089e-3f);  // (exp(r) - 1 - r) / r^2, so that the result is off by 5e-9 at most
  p = fma(p, r, splat(8.3687845618e-3f));
  p = fma(p, r, splat(4.1668392718e-2f));
  p = fma(p, r, splat(1.6666519642e-1f));
  p = fma(p, r, splat(4.9999994040e-1f));
  p = fma(fma(p, r, splat(1.0f)), r, splat(1.0f));
  Bits exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof bits);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;  // this shifts out the other bits of the magic number
  std::memcpy(&p, &bits, sizeof bits);
  return p;
}
AC_INLINE vecd exp_vec(vecd x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}

// log(1 + e) for e in [0, 1], given q = 1 / (2 + e), as 2 atanh(e q), a series in (e q)^2 <= 1/9.
AC_INLINE vecf log1p_unit(vecf e, vecf q) {
  const vecf s = e * q, t = s * s;
  vecf p = splat(2.0f / 15.0f);
  p = fma(p, t, splat(2.0f / 13.0f));
  p = fma(p, t, splat(2.0f / 11.0f));
  p = fma(p, t, splat(2.0f / 9.0f));
  p = fma(p, t, splat(2.0f / 7.0f));
  p = fma(p, t, splat(2.0f / 5.0f));
  p = fma(p, t, splat(2.0f / 3.0f));
  return fma(p * t, s, s + s);
}
AC_INLINE vecd log1p_unit(vecd e, vecd) {
  return each_lane(e, [](double v) { return std::log1p(v); });
}

// erf within 3 ulp: a rational approximation on [-4, 4] (as in Eigen), +-1 outside.
AC_INLINE vecf erf_vec(vecf x) {
  x = max_vec(splat(-4.0f), min_vec(splat(4.0f), x));
  const vecf t = x * x;
  vecf p = splat(-2.72614225801306e-10f);
  p = fma(p, t, splat(2.77068142495902e-08f));
  p = fma(p, t, splat(-2.10102402082508e-06f));
  p = fma(p, t, splat(-5.69250639462346e-05f));
  p = fma(p, t, splat(-7.34990630326855e-04f));
  p = fma(p, t, splat(-2.95459980854025e-03f));
  p = fma(p, t, splat(-1.60960333262415e-02f));
  vecf q = splat(-1.45660718464996e-05f);
  q = fma(q, t, splat(-2.13374055278905e-04f));
  q = fma(q, t, splat(-1.68282697438203e-03f));
  q = fma(q, t, splat(-7.37332916720468e-03f));
  q = fma(q, t, splat(-1.42647390514189e-02f));
  return x * p / q;
}
AC_INLINE vecd erf_vec(vecd x) {
  return each_lane(x, [](double v) { return std::erf(v); });
}

AC_INLINE vecf tanh_vec(vecf x) {
  const vecf a = x < 0.0f ? -x : x;
  const vecf t = x * x;  // near zero 1 - 2 / (1 + exp(2 a)) would cancel
  vecf p = splat(-5.70498872745e-3f);
  p = fma(p, t, splat(2.06390887954e-2f));
  p = fma(p, t, splat(-5.37397155531e-2f));
  p = fma(p, t, splat(1.33314422036e-1f));
  p = fma(p, t, splat(-3.33332819422e-1f));
  const vecf near = fma(p * t, x, x);
  const vecf far = 1.0f - 2.0f * reciprocal(exp_vec(a + a) + 1.0f);
  return a < 0.625f ? near : (x < 0.0f ? -far : far);
}
AC_INLINE vecd tanh_vec(vecd x) {
  return each_lane(x, [](double v) { return std::tanh(v); });
}

// to[i to_stride + c] = from[c stride + i], for a square of as many rows as a vector has lanes.
template <class C>
AC_INLINE void transpose_square(const C* from, int64_t stride, C* to, int64_t to_stride) {
  for (int i = 0; i < kLanes<C>; ++i)
    for (int c = 0; c < kLanes<C>; ++c) to[i * to_stride + c] = from[c * stride + i];
}
#if defined(__AVX512F__) || defined(__AVX2__)
template <>
inline void transpose_square<float>(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load_vec(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_maskz_unpacklo_ps(0xffff, a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_maskz_unpackhi_ps(0xffff, a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_maskz_shuffle_ps(0xffff, b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_maskz_shuffle_ps(0xffff, b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_maskz_shuffle_ps(0xffff, b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_maskz_shuffle_ps(0xffff, b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_maskz_shuffle_f32x4(0xffff, a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_maskz_shuffle_f32x4(0xffff, a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_maskz_shuffle_f32x4(0xffff, a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_maskz_shuffle_f32x4(0xffff, a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    store_vec(to + i * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 8], 0x88));
    store_vec(to + (i + 8) * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 8], 0xdd));
  }
#else
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load_vec(from + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store_vec<float>(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    store_vec<float>(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
#endif
}
#endif

// --- memory

// Uninitialised scratch of one call, aligned for vectors.
template <class C>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t n)
      : bytes_(n * static_cast<int64_t>(sizeof(C))), data_(static_cast<C*>(take_block(bytes_))) {}
  ~Scratch() { give_block(data_, bytes_); }
  Scratch(Scratch&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
  Scratch& operator=(Scratch&& other) noexcept {
    const Scratch mine(static_cast<Scratch&&>(*this));
    bytes_ = other.bytes_;
    data_ = other.data_;
    other.data_ = nullptr;
    return *this;
  }
  C* get() const { return data_; }

 private:
  int64_t bytes_ = 0;
  C* data_ = nullptr;
};

// The length in scratch of a row of n elements, rounded up to a number of vectors.
template <class C>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

}  // namespace AC_ISA
}  // namespace adaptcomp
