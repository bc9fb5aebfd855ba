// Fused descents on the energy of a modern Hopfield network (Ramsauer et al. 2021), and their gradients,
//
//   E(y) = -1/beta log sum_j exp(beta x_j . y) + |y|^2/2,   dE/dy = y - sum_j softmax_j(beta X y) x_j
//
// so that one step of size 1 is attention over the patterns.
#pragma once

#include "descent/whole.h"

namespace adaptcomp {

struct HopfieldEnergy {
  int64_t patterns;
  const void* pattern;  // [patterns, dim]: X
  const void* beta;     // [1]
};

struct HopfieldEnergyGrad {
  void *pattern, *beta;
};

void hopfield_descent_cpu(const Descent& descent, const HopfieldEnergy& energy);
void hopfield_descent_backward_cpu(const DescentBackward& descent, const HopfieldEnergy& energy,
                                   const HopfieldEnergyGrad& grad);
void hopfield_descent_cuda(const Descent& descent, const HopfieldEnergy& energy, const DeviceScratch& scratch,
                           int64_t device, void* stream);
void hopfield_descent_backward_cuda(const DescentBackward& descent, const HopfieldEnergy& energy,
                                    const HopfieldEnergyGrad& grad, const DeviceScratch& scratch,
                                    int64_t device, void* stream);
// Bytes of device scratch of a descent, or of its gradient; -1 if a row does not fit in a block. It reads
// sizes only.
int64_t hopfield_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const HopfieldEnergy& energy,
                                      bool backward, int64_t device);

}  // namespace adaptcomp
