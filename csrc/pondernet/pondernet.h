// The halting step of PonderNet on a block of rows. It computes scalars only; the halting family adds up the
// weighted output.
#pragma once

#include "common/scalars.h"
#include "pondernet/rows.h"

namespace adaptcomp {

struct PonderNetStep {
  int64_t rows;
  PonderParams params;
  bool wide;           // scalar type: double, else float
  const void* logits;  // [rows]
  DType logits_dtype;
  const void* log_survival;  // [rows] log Q_{n-1}
  void* weight;              // [rows] out
  void* next;                // [rows] out: log Q_n
  void* cost;                // [rows] out: this step's term of KL(p || prior)
  uint8_t* halt;             // [rows] out: this is the row's last step
};

struct PonderNetStepBackward {
  int64_t rows;
  PonderParams params;
  bool wide;
  const void* logits;
  DType logits_dtype;
  const void* log_survival;
  const void* g_weight;  // [rows] each, in the scalar type; null: zero
  const void* g_next;
  const void* g_cost;
  void* g_logits;        // [rows] out, in the scalar type
  void* g_log_survival;  // [rows] out
};

// Computes row i of a block, in the CPU loop and in the CUDA grid.
template <class S>
AC_HD void pondernet_step_row(const PonderNetStep& a, int64_t i) {
  const PonderRow<S> row = ponder_row(load_scalar<S>(a.logits, a.logits_dtype, i),
                                      static_cast<const S*>(a.log_survival)[i], a.params);
  static_cast<S*>(a.weight)[i] = row.weight;
  static_cast<S*>(a.next)[i] = row.log_survival;
  static_cast<S*>(a.cost)[i] = row.cost;
  a.halt[i] = row.halt;
}

template <class S>
AC_HD void pondernet_step_backward_row(const PonderNetStepBackward& a, int64_t i) {
  const PonderRowGrad<S> g = ponder_row_backward(
      load_scalar<S>(a.logits, a.logits_dtype, i), static_cast<const S*>(a.log_survival)[i],
      load_or_zero<S>(a.g_weight, i), load_or_zero<S>(a.g_next, i), load_or_zero<S>(a.g_cost, i), a.params);
  static_cast<S*>(a.g_logits)[i] = g.logit;
  static_cast<S*>(a.g_log_survival)[i] = g.log_survival;
}

void pondernet_step_cpu(const PonderNetStep& args);
void pondernet_step_backward_cpu(const PonderNetStepBackward& args);
void pondernet_step_cuda(const PonderNetStep& args, int64_t device, void* stream);
void pondernet_step_backward_cuda(const PonderNetStepBackward& args, int64_t device, void* stream);

}  // namespace adaptcomp
