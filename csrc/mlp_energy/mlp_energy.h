// Fused descents on the energy of a small network, and their gradients,
//
//   E(y, x) = w . act(a) + b_o + rho/2 |y|^2
//   a = W_1 y + c(x),  or with a second layer  a = W_2 act(W_1 y + c(x)) + b_2
//
// c, the context's part of the first layer with its bias, is an argument: it is the same in all steps of a
// row.
#pragma once

#include "descent/whole.h"
#include "mlp_energy/rows.h"

namespace adaptcomp {

struct MlpEnergy {
  int64_t hidden1, hidden2;  // hidden2: 0 for one layer
  Activation activation;
  double ridge;         // rho
  const void* weight1;  // [hidden1, dim]
  const void* context;  // [rows, hidden1], or [hidden1] where context_stride is 0
  int64_t context_stride;
  const void* weight2;   // [hidden2, hidden1]
  const void* bias2;     // [hidden2]
  const void* out;       // [hidden1 or hidden2]: w
  const void* out_bias;  // [1]
};

// Derivatives, in the shapes above, except for the context's, which is always [rows, hidden1].
struct MlpEnergyGrad {
  void *weight1, *context, *weight2, *bias2, *out;
};

void mlp_descent_cpu(const Descent& descent, const MlpEnergy& energy);
void mlp_descent_backward_cpu(const DescentBackward& descent, const MlpEnergy& energy,
                              const MlpEnergyGrad& grad);
void mlp_descent_cuda(const Descent& descent, const MlpEnergy& energy, const DeviceScratch& scratch,
                      int64_t device, void* stream);
void mlp_descent_backward_cuda(const DescentBackward& descent, const MlpEnergy& energy,
                               const MlpEnergyGrad& grad, const DeviceScratch& scratch, int64_t device,
                               void* stream);
// Bytes of device scratch of a descent, or of its gradient; -1 if a row does not fit in a block. It reads
// sizes only.
int64_t mlp_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const MlpEnergy& energy, bool backward,
                                 int64_t device);

}  // namespace adaptcomp
