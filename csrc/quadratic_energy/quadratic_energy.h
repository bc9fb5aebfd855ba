// Fused descents on E(y) = y'Ay/2 - b'y, and their gradients. Only the symmetric part S of A matters:
// dE/dy = Sy - b.
#pragma once

#include "descent/whole.h"

namespace adaptcomp {

struct QuadraticEnergy {
  const void* matrix;  // [dim, dim]: A
  const void* linear;  // [rows, dim], or [dim] where linear_stride is 0: b
  int64_t linear_stride;
};

// The linear term's derivative is [rows, dim] in any case.
struct QuadraticEnergyGrad {
  void *matrix, *linear;
};

void quadratic_descent_cpu(const Descent& descent, const QuadraticEnergy& energy);
void quadratic_descent_backward_cpu(const DescentBackward& descent, const QuadraticEnergy& energy,
                                    const QuadraticEnergyGrad& grad);
void quadratic_descent_cuda(const Descent& descent, const QuadraticEnergy& energy,
                            const DeviceScratch& scratch, int64_t device, void* stream);
void quadratic_descent_backward_cuda(const DescentBackward& descent, const QuadraticEnergy& energy,
                                     const QuadraticEnergyGrad& grad, const DeviceScratch& scratch,
                                     int64_t device, void* stream);
// Bytes of device scratch of a descent, or of its gradient; -1 if a row does not fit in a block. It reads
// sizes only.
int64_t quadratic_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const QuadraticEnergy& energy,
                                       bool backward, int64_t device);

}  // namespace adaptcomp
