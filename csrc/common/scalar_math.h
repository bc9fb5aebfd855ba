// The elementary functions on scalars, in the form that a family's row arithmetic takes on the device.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace adaptcomp {

template <class C>
struct ScalarMath {
  using scalar = C;
  using type = C;
  static AC_HD C exp(C x) { return std::exp(x); }
  static AC_HD C tanh(C x) { return std::tanh(x); }
  static AC_HD C erf(C x) { return std::erf(x); }
  static AC_HD C fma(C a, C b, C c) { return std::fma(a, b, c); }
  static AC_HD C reciprocal(C x) { return C(1) / x; }
  static AC_HD C log1p_unit(C e, C) { return std::log1p(e); }
};

}  // namespace adaptcomp
