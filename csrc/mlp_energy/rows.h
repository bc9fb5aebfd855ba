// The activations of the energy network with their first and second derivatives, for descents and their
// gradients. A value is a vector on the host and a scalar on the device; M has its elementary functions.
#pragma once

#include <type_traits>

#include "common/dtype.h"

namespace adaptcomp {

// The codes are those of adaptcomp_ext/ops/mlp_energy.py.
enum class Activation : int64_t { softplus = 0, silu = 1, tanh = 2, gelu = 3 };

// The values of an activation; `first` is always computed.
template <class V>
struct Activated {
  V value, first, second;
};

template <Activation A, bool kValue, bool kSecond, class M>
AC_HD Activated<typename M::type> activate(typename M::type a) {
  using V = typename M::type;
  using C = typename M::scalar;
  Activated<V> out{};
  if constexpr (A == Activation::tanh) {
    const V t = M::tanh(a);
    out.value = t;
    out.first = C(1) - t * t;
    if constexpr (kSecond) out.second = C(-2) * t * out.first;
  } else if constexpr (A == Activation::gelu) {
    const V cdf = C(0.5) + C(0.5) * M::erf(a * C(0.70710678118654752));
    const V density = C(0.39894228040143268) * M::exp(C(-0.5) * a * a);
    if constexpr (kValue) out.value = a * cdf;
    out.first = cdf + a * density;
    if constexpr (kSecond) out.second = density * (C(2) - a * a);
  } else {
    V sigma;  // the logistic function
    if constexpr (A == Activation::softplus && kValue) {
      // One exponential of -|a|, which cannot overflow, and one division give both functions.
      const V e = M::exp(a < C(0) ? a : -a);
      const V both = M::reciprocal((C(1) + e) * (C(2) + e));
      const V inverse = both * (C(2) + e);
      sigma = a < C(0) ? e * inverse : inverse;
      out.value = (a < C(0) ? V{} : a) + M::log1p_unit(e, both * (C(1) + e));
    } else {
      sigma = M::reciprocal(C(1) + M::exp(-a));
    }
    if constexpr (A == Activation::softplus) {
      out.first = sigma;
      if constexpr (kSecond) out.second = sigma * (C(1) - sigma);
    } else {
      const V rest = C(1) - sigma;
      out.value = a * sigma;
      out.first = sigma + out.value * rest;
      if constexpr (kSecond) out.second = sigma * rest * (C(2) + a * (rest - sigma));
    }
  }
  return out;
}

// Calls f with the activation as a constant.
template <class F>
inline void dispatch_activation(Activation a, const F& f) {
  switch (a) {
    case Activation::softplus: f(std::integral_constant<Activation, Activation::softplus>()); break;
    case Activation::silu: f(std::integral_constant<Activation, Activation::silu>()); break;
    case Activation::tanh: f(std::integral_constant<Activation, Activation::tanh>()); break;
    case Activation::gelu: f(std::integral_constant<Activation, Activation::gelu>()); break;
  }
}

}  // namespace adaptcomp
