// The activations on the device, by a code that only the launch knows.
#pragma once

#include "common/scalar_math.h"
#include "mlp_energy/rows.h"

namespace adaptcomp {

template <bool kValue, bool kSecond, class C>
__device__ __forceinline__ Activated<C> activated(Activation activation, C a) {
  using M = ScalarMath<C>;
  switch (activation) {
    case Activation::softplus: return activate<Activation::softplus, kValue, kSecond, M>(a);
    case Activation::silu: return activate<Activation::silu, kValue, kSecond, M>(a);
    case Activation::tanh: return activate<Activation::tanh, kValue, kSecond, M>(a);
    default: return activate<Activation::gelu, kValue, kSecond, M>(a);
  }
}

}  // namespace adaptcomp
