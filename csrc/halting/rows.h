// The row arithmetic of the halting step: whether a row ends, and the elementwise part of output and
// gradient.
#pragma once

#include "act/rows.h"
#include "common/scalars.h"
#include "confidence/rows.h"
#include "convergence/rows.h"
#include "halting/halting.h"
#include "pondernet/rows.h"

namespace adaptcomp {

template <class S>
AC_HD bool is_confident(const Leaf& readout, int64_t i, Measure measure, S threshold) {
  const int64_t k = readout.row_elements;
  switch (readout.dtype) {
    case DType::f32:
      return confidence_reaches(static_cast<const float*>(readout.block) + i * k, k, measure, threshold);
    case DType::f64:
      return confidence_reaches(static_cast<const double*>(readout.block) + i * k, k, measure, threshold);
    case DType::bf16:
      return confidence_reaches(static_cast<const bfloat16*>(readout.block) + i * k, k, measure, threshold);
    case DType::f16:
      return confidence_reaches(static_cast<const float16*>(readout.block) + i * k, k, measure, threshold);
    case DType::opaque: break;
  }
  return false;
}

AC_HD Criterion criterion_of(Policy policy) {
  return static_cast<Criterion>(static_cast<int64_t>(policy) - static_cast<int64_t>(Policy::relative));
}

// Whether batch row r has stood still for long enough, of which it keeps count.
AC_HD bool is_patient(const HaltStep& a, int64_t r, bool same) {
  a.still[r] = count_still(a.still[r], same);
  return a.still[r] >= a.parameter;
}

template <class T>
AC_HD bool has_converged(const HaltStep& a, const T* readout, int64_t r) {
  return is_patient(
      a, r,
      stands_still_and_remember(readout, static_cast<char*>(a.memory) + r * a.memory_row,
                                a.readout.row_elements, a.classes, criterion_of(a.policy), a.threshold));
}

AC_HD bool has_converged(const HaltStep& a, int64_t i, int64_t r) {
  const int64_t at = i * a.readout.row_elements;
  switch (a.readout.dtype) {
    case DType::f32: return has_converged(a, static_cast<const float*>(a.readout.block) + at, r);
    case DType::f64: return has_converged(a, static_cast<const double*>(a.readout.block) + at, r);
    case DType::bf16: return has_converged(a, static_cast<const bfloat16*>(a.readout.block) + at, r);
    case DType::f16: return has_converged(a, static_cast<const float16*>(a.readout.block) + at, r);
    case DType::opaque: break;
  }
  return false;
}

template <class S>
struct Decision {
  S weight, cost;
  bool halt, finite;
};

// The step that block row i has just taken.
AC_HD int64_t step_of(const HaltStep& a, int64_t i) { return a.row_step ? a.row_step[i] : a.step; }

// The policy's decision for block row i, batch row r. It reads no other row.
template <class S>
AC_HD Decision<S> decide(const HaltStep& a, int64_t i, int64_t r) {
  const int64_t step = step_of(a, i);
  Decision<S> v{S(1), S(0), false, true};
  switch (a.policy) {
    case Policy::given:
      v.halt = static_cast<const uint8_t*>(a.signal)[i] != 0;
      if (a.weight) {
        v.weight = static_cast<const S*>(a.weight)[i];
        v.finite = is_finite(v.weight);
      }
      if (a.tested) v.finite = v.finite && is_logit_scalar(a.tested, a.tested_dtype, i);
      break;
    case Policy::fixed_steps:
      v.halt = step >= (a.signal ? static_cast<const int64_t*>(a.signal)[r] : a.parameter);
      break;
    case Policy::act: {
      S* accumulated = static_cast<S*>(a.carry);
      const S spent = a.spent ? static_cast<const S*>(a.spent)[i] : accumulated[i];
      const ActRow<S> row = act_row(load_scalar<S>(a.signal, a.signal_dtype, i), spent,
                                    {step, a.min_steps, a.max_steps, a.threshold});
      accumulated[i] = row.accumulated;
      if (a.weight_out) static_cast<S*>(a.weight_out)[i] = row.weight;
      v = {row.weight, row.cost, row.accumulated >= S(a.threshold),
           is_logit_scalar(a.signal, a.signal_dtype, i)};
      break;
    }
    case Policy::ponder_sample:
      v.halt = ponder_sample(load_scalar<S>(a.signal, a.signal_dtype, i), static_cast<uint64_t>(a.parameter),
                             static_cast<uint64_t>(a.sample ? a.sample[r] : r), step);
      v.finite = is_logit_scalar(a.signal, a.signal_dtype, i);
      break;
    case Policy::confidence:
      v.halt = is_confident(a.readout, i, static_cast<Measure>(a.parameter), S(a.threshold));
      break;
    case Policy::q_halt: {
      const int64_t at = i * a.signal_columns;
      const bool two = a.signal_columns == 2;
      const auto going_on = two ? load_scalar<double>(a.signal, a.signal_dtype, at + 1) : 0.0;
      v.halt = load_scalar<double>(a.signal, a.signal_dtype, at) > going_on;
      v.finite = is_logit_scalar(a.signal, a.signal_dtype, at) &&
                 (!two || is_logit_scalar(a.signal, a.signal_dtype, at + 1));
      break;
    }
    case Policy::relative:
    case Policy::absolute:
    case Policy::kl:
    case Policy::argmax: v.halt = has_converged(a, i, r); break;
  }
  return v;
}

// Passes the carry of a padding row on unchanged; nothing reads it.
template <class S>
AC_HD void pass_carry(const HaltStep& a, int64_t i) {
  if (a.spent) static_cast<S*>(a.carry)[i] = static_cast<const S*>(a.spent)[i];
}

AC_HD Status outcome(bool halt, bool finite, int64_t step, int64_t min_steps, int64_t max_steps) {
  if (!finite) return kNonFinite;
  if (halt && step >= min_steps) return kHalted;
  return step >= max_steps ? kMaxSteps : kRunning;
}

AC_HD bool is_weighted(const HaltStep& a) { return a.policy == Policy::act || a.weight != nullptr; }

// The adjoint of ACT for a row whose weight has the gradient g_weight. `live`: the row is neither padding nor
// NONFINITE.
template <class S>
AC_HD void act_backward_row(const HaltBackward& a, int64_t i, int64_t r, int64_t place, bool live,
                            S g_weight) {
  ActRowGrad<S> g{S(0), S(0)};
  if (live) {
    const S g_next = a.g_next && place >= 0 ? static_cast<const S*>(a.g_next)[place] : S(0);
    const S g_cost = a.g_cost ? static_cast<const S*>(a.g_cost)[r] : S(0);
    g = act_row_backward(load_scalar<S>(a.logits, a.logits_dtype, i), static_cast<const S*>(a.accumulated)[i],
                         g_weight, g_next, g_cost, a.act);
  }
  static_cast<S*>(a.g_logits)[i] = g.logit;
  static_cast<S*>(a.g_accumulated)[i] = g.accumulated;
}

// Whether minus infinity is valid in a readout of this weight: a negative weight would make it plus infinity.
template <class S>
AC_HD bool may_mask(S weight) {
  return !(weight < S(0));
}

// output += weight * readout for one element, in the compute type. Not to be called for a weight of zero:
// zero times the minus infinity of a masked class would be NaN.
template <class T>
AC_HD void accumulate(compute_t<T>& output, compute_t<T> weight, T readout) {
  output += weight * load(readout);
}

// The derivative of weight * readout in the weight; zero for a masked class, which is minus infinity for any
// weight.
template <class T>
AC_HD compute_t<T> weight_slope(T readout) {
  return is_masked(readout) ? compute_t<T>(0) : load(readout);
}

}  // namespace adaptcomp
