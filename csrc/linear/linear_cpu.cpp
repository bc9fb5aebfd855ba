// Chooses the build of linear_tile.cpp that this machine runs.
#include "common/isa.h"
#include "linear/linear.h"

namespace adaptcomp {

AC_DECLARE_ISA(void linear(const Linear&))

void linear_cpu(const Linear& a) { AC_CALL_ISA(linear(a)); }

}  // namespace adaptcomp
