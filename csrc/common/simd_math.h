// The elementary functions on the host's vectors, in the form that a family's row arithmetic takes.
#pragma once

#include "common/simd.h"

namespace adaptcomp {
namespace AC_ISA {

template <class C>
struct VectorMath {
  using scalar = C;
  using type = vec<C>;
  static AC_INLINE type exp(type x) { return exp_vec(x); }
  static AC_INLINE type tanh(type x) { return tanh_vec(x); }
  static AC_INLINE type erf(type x) { return erf_vec(x); }
  static AC_INLINE type fma(type a, type b, type c) { return AC_ISA::fma(a, b, c); }
  static AC_INLINE type reciprocal(type x) { return AC_ISA::reciprocal(x); }
  static AC_INLINE type log1p_unit(type e, type q) { return AC_ISA::log1p_unit(e, q); }
};

}  // namespace AC_ISA
}  // namespace adaptcomp
