// The threads are those of OpenMP. The runtime is the one that torch loaded, so that torch.set_num_threads
// governs it.
#include "common/parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace adaptcomp {

#ifdef _OPENMP

void run_team(int64_t wanted, void (*body)(const void*, int64_t, int64_t), const void* self) {
  const int64_t threads = std::min<int64_t>(wanted, omp_get_max_threads());
  // A single thread does not enter OpenMP: after a parallel region, the first one of a forked child hangs.
  if (threads <= 1 || omp_in_parallel()) return body(self, 0, 1);
#pragma omp parallel num_threads(static_cast<int>(threads))
  body(self, omp_get_thread_num(), omp_get_num_threads());
}
int openmp_version() { return _OPENMP; }
int most_threads() { return omp_get_max_threads(); }

#else

void run_team(int64_t, void (*body)(const void*, int64_t, int64_t), const void* self) { body(self, 0, 1); }
int openmp_version() { return 0; }
int most_threads() { return 1; }

#endif

}  // namespace adaptcomp
