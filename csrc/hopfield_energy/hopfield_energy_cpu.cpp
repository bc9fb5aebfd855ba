// Chooses the build of hopfield_energy_tile.cpp that this machine runs.
#include "common/isa.h"
#include "hopfield_energy/hopfield_energy.h"

namespace adaptcomp {

AC_DECLARE_ISA(void hopfield_descent(const Descent&, const HopfieldEnergy&))
AC_DECLARE_ISA(void hopfield_descent_backward(const DescentBackward&, const HopfieldEnergy&,
                                              const HopfieldEnergyGrad&))

void hopfield_descent_cpu(const Descent& descent, const HopfieldEnergy& energy) {
  AC_CALL_ISA(hopfield_descent(descent, energy));
}
void hopfield_descent_backward_cpu(const DescentBackward& descent, const HopfieldEnergy& energy,
                                   const HopfieldEnergyGrad& grad) {
  AC_CALL_ISA(hopfield_descent_backward(descent, energy, grad));
}

}  // namespace adaptcomp
