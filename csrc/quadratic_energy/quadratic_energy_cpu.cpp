// Chooses the build of quadratic_energy_tile.cpp that this machine runs.
#include "common/isa.h"
#include "quadratic_energy/quadratic_energy.h"

namespace adaptcomp {

AC_DECLARE_ISA(void quadratic_descent(const Descent&, const QuadraticEnergy&))
AC_DECLARE_ISA(void quadratic_descent_backward(const DescentBackward&, const QuadraticEnergy&,
                                               const QuadraticEnergyGrad&))

void quadratic_descent_cpu(const Descent& descent, const QuadraticEnergy& energy) {
  AC_CALL_ISA(quadratic_descent(descent, energy));
}
void quadratic_descent_backward_cpu(const DescentBackward& descent, const QuadraticEnergy& energy,
                                    const QuadraticEnergyGrad& grad) {
  AC_CALL_ISA(quadratic_descent_backward(descent, energy, grad));
}

}  // namespace adaptcomp
