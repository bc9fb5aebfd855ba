// Chooses the build of recurrence_tile.cpp that this machine runs.
#include "common/isa.h"
#include "recurrence/recurrence.h"

namespace adaptcomp {

AC_DECLARE_ISA(void recurrence(const Recurrence&))

void recurrence_cpu(const Recurrence& a) { AC_CALL_ISA(recurrence(a)); }

}  // namespace adaptcomp
