// The arithmetic of a unit of a gated cell, forward and backward: once for the host, where a value is a
// vector, and for the device, where it is a scalar. M has the elementary functions
// (common/simd_math.h, common/scalar_math.h). The MLP's is that of mlp_energy/rows.h.
//
// A unit is made from `given`, the input's part of its gates, `own`, the state's part, and `before`, its
// numbers in the tensors of the state. Its gradient takes g, the gradients in the unit's numbers after the
// step, and leaves those in the numbers before it that do not pass through the gates.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace adaptcomp {

template <class M>
AC_HD typename M::type sigmoid_of(typename M::type x) {
  return M::reciprocal(M::exp(-x) + typename M::scalar(1));
}
// The derivatives of sigmoid and tanh, from their values.
template <class M>
AC_HD typename M::type sigmoid_slope(typename M::type sigma) {
  return sigma * (typename M::scalar(1) - sigma);
}
template <class M>
AC_HD typename M::type tanh_slope(typename M::type t) {
  return typename M::scalar(1) - t * t;
}

template <class M>
struct GruUnit {
  using V = typename M::type;
  static constexpr int kGates = 3, kLeaves = 1;

  AC_HD GruUnit(const V (&given)[3], const V (&own)[3], const V (&)[1])
      : reset(sigmoid_of<M>(given[0] + own[0])),
        keep(sigmoid_of<M>(given[1] + own[1])),
        fresh(M::tanh(M::fma(reset, own[2], given[2]))) {}
  AC_HD void next(const V (&before)[1], V (&after)[1]) const {
    after[0] = M::fma(keep, before[0] - fresh, fresh);
  }
  V reset, keep, fresh;
};

template <class M>
struct GruUnitGrad {
  using Unit = GruUnit<M>;
  using V = typename M::type;
  using C = typename M::scalar;
  V given[3], own[3];  // the gradients in both parts of the gates

  AC_HD GruUnitGrad(const Unit& s, const V (&sum)[3], const V (&before)[1], V (&g)[1]) {
    const V fresh = g[0] * (C(1) - s.keep) * tanh_slope<M>(s.fresh);
    const V keep = g[0] * (before[0] - s.fresh) * sigmoid_slope<M>(s.keep);
    const V reset = fresh * sum[2] * sigmoid_slope<M>(s.reset);
    given[0] = own[0] = reset;
    given[1] = own[1] = keep;
    given[2] = fresh;
    own[2] = fresh * s.reset;  // the reset gate lies between the two parts
    g[0] = g[0] * s.keep;
  }
};

template <class M>
struct LstmUnit {
  using V = typename M::type;
  static constexpr int kGates = 4, kLeaves = 2;

  AC_HD LstmUnit(const V (&given)[4], const V (&own)[4], const V (&before)[2])
      : in(sigmoid_of<M>(given[0] + own[0])),
        forget(sigmoid_of<M>(given[1] + own[1])),
        fresh(M::tanh(given[2] + own[2])),
        out(sigmoid_of<M>(given[3] + own[3])),
        cell(M::fma(forget, before[1], in * fresh)),
        squashed(M::tanh(cell)) {}
  AC_HD void next(const V (&)[2], V (&after)[2]) const {
    after[0] = out * squashed;
    after[1] = cell;
  }
  V in, forget, fresh, out, cell, squashed;
};

template <class M>
struct LstmUnitGrad {
  using Unit = LstmUnit<M>;
  using V = typename M::type;
  using C = typename M::scalar;
  V given[4], own[4];

  AC_HD LstmUnitGrad(const Unit& s, const V (&)[4], const V (&before)[2], V (&g)[2]) {
    const V of_cell = M::fma(g[0] * s.out, tanh_slope<M>(s.squashed), g[1]);
    given[0] = own[0] = of_cell * s.fresh * sigmoid_slope<M>(s.in);
    given[1] = own[1] = of_cell * before[1] * sigmoid_slope<M>(s.forget);
    given[2] = own[2] = of_cell * s.in * tanh_slope<M>(s.fresh);
    given[3] = own[3] = g[0] * s.squashed * sigmoid_slope<M>(s.out);
    g[0] = V{};  // all of it goes through the gates
    g[1] = of_cell * s.forget;
  }
};

}  // namespace adaptcomp
