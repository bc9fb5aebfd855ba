// The dtypes of tensors, and how each is read and written.
//
// 16-bit types are stored as integers and computed in float, so that host and device share one definition
// without CUDA's headers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define AC_HD __host__ __device__ __forceinline__
#else
#define AC_HD inline __attribute__((always_inline))
#endif

namespace adaptcomp {

// The codes are those of adaptcomp_ext/ops/_backend.py.
enum class DType : int64_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, opaque = 4 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

AC_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}
AC_HD uint64_t bits_of(double x) {
#ifdef __CUDA_ARCH__
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t u;
  std::memcpy(&u, &x, 8);
  return u;
#endif
}
AC_HD float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

// `Compute<T>`: the type in which values of T are accumulated, never narrower than float.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

AC_HD float load(float x) { return x; }
AC_HD double load(double x) { return x; }
AC_HD float load(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
AC_HD float load(float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  // Subnormals are converted as integers: a processor that flushes subnormal floats to zero would lose them.
  const uint32_t small =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * float_of(0x33800000u));  // 2^-24
  const uint32_t rebiased = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t body = magnitude < 0x0400u ? small : rebiased;
  return float_of(sign | body);
}

AC_HD void store(float& out, float x) { out = x; }
AC_HD void store(double& out, double x) { out = x; }
AC_HD void store(bfloat16& out, float x) {
  const uint32_t u = bits_of(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}
AC_HD void store(float16& out, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t body;
  if (magnitude > 0x7f800000u) {
    body = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or beyond
    body = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the last bits and rounds to even
    body = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    body = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | body);
}

// The bits of |x| plus one in the exponent: the top bit is set only if x is inf or NaN, whose exponent field
// is full. With the `or` over a row these are three integer operations, which vectorise where floating-point
// comparisons do not.
AC_HD uint32_t finite_carry(float x) { return (bits_of(x) & 0x7fffffffu) + 0x00800000u; }
AC_HD uint16_t finite_carry(bfloat16 x) { return static_cast<uint16_t>((x.bits & 0x7fffu) + 0x0080u); }
AC_HD uint16_t finite_carry(float16 x) { return static_cast<uint16_t>((x.bits & 0x7fffu) + 0x0400u); }
AC_HD uint64_t finite_carry(double x) { return (bits_of(x) & 0x7fffffffffffffffull) + 0x0010000000000000ull; }
template <class U>
AC_HD bool top_bit(U bits) {
  return (bits >> (8 * sizeof(U) - 1)) != 0;
}

// Whether x is neither inf nor NaN.
template <class T>
AC_HD bool is_finite(T x) {
  return !top_bit(finite_carry(x));
}

// Whether all n elements of a row are finite.
template <class T>
AC_HD bool finite_row(const T* x, int64_t n) {
  using Bits = decltype(finite_carry(T()));
  Bits carry = 0;
  for (int64_t i = 0; i < n; ++i) carry |= finite_carry(x[i]);
  return !top_bit(carry);
}

// Whether x is minus infinity, which masks a class.
AC_HD bool is_masked(float x) { return bits_of(x) == 0xff800000u; }
AC_HD bool is_masked(double x) { return bits_of(x) == 0xfff0000000000000ull; }
AC_HD bool is_masked(bfloat16 x) { return x.bits == 0xff80u; }
AC_HD bool is_masked(float16 x) { return x.bits == 0xfc00u; }

// Whether x is a valid logit: finite or minus infinity.
template <class T>
AC_HD bool is_logit(T x) {
  return is_finite(x) || is_masked(x);
}

// Whether all n elements of a row are valid logits, and at least one class is not masked.
template <class T>
AC_HD bool logits_row(const T* x, int64_t n) {
  using Bits = decltype(finite_carry(T()));
  const Bits none = 0;
  Bits bad = 0, every = static_cast<Bits>(~none);
  for (int64_t i = 0; i < n; ++i) {
    const Bits carry = finite_carry(x[i]);
    bad |= is_masked(x[i]) ? none : carry;
    every &= carry;
  }
  return !top_bit(bad) && !(n > 0 && top_bit(every));
}

AC_HD int64_t size_of(DType t) {
  return t == DType::f32 ? 4 : t == DType::f64 ? 8 : t == DType::opaque ? 1 : 2;
}

// Calls f with a null pointer of the C++ type that `t` names, so that one generic lambda serves every dtype.
template <class F>
inline void dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f32: f(static_cast<float*>(nullptr)); break;
    case DType::f64: f(static_cast<double*>(nullptr)); break;
    case DType::bf16: f(static_cast<bfloat16*>(nullptr)); break;
    case DType::f16: f(static_cast<float16*>(nullptr)); break;
    case DType::opaque: break;
  }
}

}  // namespace adaptcomp
