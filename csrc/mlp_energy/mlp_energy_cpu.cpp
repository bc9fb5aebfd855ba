// Chooses the build of mlp_energy_tile.cpp that this machine runs.
#include "common/isa.h"
#include "mlp_energy/mlp_energy.h"

namespace adaptcomp {

AC_DECLARE_ISA(void mlp_descent(const Descent&, const MlpEnergy&))
AC_DECLARE_ISA(void mlp_descent_backward(const DescentBackward&, const MlpEnergy&, const MlpEnergyGrad&))

void mlp_descent_cpu(const Descent& descent, const MlpEnergy& energy) {
  AC_CALL_ISA(mlp_descent(descent, energy));
}
void mlp_descent_backward_cpu(const DescentBackward& descent, const MlpEnergy& energy,
                              const MlpEnergyGrad& grad) {
  AC_CALL_ISA(mlp_descent_backward(descent, energy, grad));
}

}  // namespace adaptcomp
