// The test of a block of readouts against those of the step before, for a policy that decides in Python.
#pragma once

#include "convergence/rows.h"

namespace adaptcomp {

struct ConvergenceStep {
  int64_t rows, elements;
  Criterion criterion;  // not argmax
  double tolerance;
  const void* now;   // [rows, elements]
  const void* last;  // [rows, elements]
  DType dtype;
  const int64_t* still;  // [rows], of before
  int64_t* next;         // [rows] out
};

template <class T>
AC_HD void convergence_step_row(const ConvergenceStep& a, int64_t i) {
  const int64_t at = i * a.elements;
  a.next[i] = count_still(a.still[i],
                          stands_still(static_cast<const T*>(a.now) + at, static_cast<const T*>(a.last) + at,
                                       a.elements, a.criterion, a.tolerance));
}

void convergence_step_cpu(const ConvergenceStep& args);
void convergence_step_cuda(const ConvergenceStep& args, int64_t device, void* stream);

}  // namespace adaptcomp
