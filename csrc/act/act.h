// The halting step of ACT on a block of rows. It computes scalars only; the halting family adds up the
// weighted output.
#pragma once

#include "act/rows.h"
#include "common/scalars.h"

namespace adaptcomp {

struct ActStep {
  int64_t rows;
  ActParams params;
  bool wide;           // scalar type: double, else float
  const void* logits;  // [rows]
  DType logits_dtype;
  const void* accumulated;  // [rows] h_1 + ... + h_{n-1}
  void* weight;             // [rows] out
  void* next;               // [rows] out: accumulated, this step included
  void* cost;               // [rows] out: N + R where the row halts, else 0
  uint8_t* halt;            // [rows] out: the threshold is reached
};

struct ActStepBackward {
  int64_t rows;
  ActParams params;
  bool wide;
  const void* logits;
  DType logits_dtype;
  const void* accumulated;
  const void* g_weight;  // [rows] each, in the scalar type; null: zero
  const void* g_next;
  const void* g_cost;
  void* g_logits;       // [rows] out, in the scalar type
  void* g_accumulated;  // [rows] out
};

// Computes row i of a block, in the CPU loop and in the CUDA grid.
template <class S>
AC_HD void act_step_row(const ActStep& a, int64_t i) {
  const ActRow<S> row =
      act_row(load_scalar<S>(a.logits, a.logits_dtype, i), static_cast<const S*>(a.accumulated)[i], a.params);
  static_cast<S*>(a.weight)[i] = row.weight;
  static_cast<S*>(a.next)[i] = row.accumulated;
  static_cast<S*>(a.cost)[i] = row.cost;
  a.halt[i] = row.accumulated >= S(a.params.threshold);
}

template <class S>
AC_HD void act_step_backward_row(const ActStepBackward& a, int64_t i) {
  const ActRowGrad<S> g = act_row_backward(
      load_scalar<S>(a.logits, a.logits_dtype, i), static_cast<const S*>(a.accumulated)[i],
      load_or_zero<S>(a.g_weight, i), load_or_zero<S>(a.g_next, i), load_or_zero<S>(a.g_cost, i), a.params);
  static_cast<S*>(a.g_logits)[i] = g.logit;
  static_cast<S*>(a.g_accumulated)[i] = g.accumulated;
}

void act_step_cpu(const ActStep& args);
void act_step_backward_cpu(const ActStepBackward& args);
void act_step_cuda(const ActStep& args, int64_t device, void* stream);
void act_step_backward_cuda(const ActStepBackward& args, int64_t device, void* stream);

}  // namespace adaptcomp
