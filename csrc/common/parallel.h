// OpenMP over a range of rows. The runtime is the one that torch loaded, so that torch.set_num_threads
// governs it.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace adaptcomp {

// Bytes of work below which a second thread costs more time than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

// Calls body(t, of) for t = 0 ... of - 1 on `of` threads, at most `wanted`.
template <class Body>
void parallel_team([[maybe_unused]] int64_t wanted, const Body& body) {
#ifdef _OPENMP
  const int64_t most = omp_get_max_threads(), threads = wanted < most ? wanted : most;
  // A single thread does not enter OpenMP: after a parallel region, the first one of a forked child hangs.
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    body(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
    return;
  }
#endif
  body(int64_t{0}, int64_t{1});
}

// Calls body(begin, end) on disjoint chunks of [0, n). No row's arithmetic reads another row, so that the
// result does not depend on the number of threads.
template <class Body>
void parallel_rows(int64_t n, int64_t bytes_per_row, const Body& body) {
  if (n <= 0) return;
  parallel_team(std::min<int64_t>(n, n * bytes_per_row / kBytesPerThread),
                [&](int64_t t, int64_t of) { body(n * t / of, n * (t + 1) / of); });
}

}  // namespace adaptcomp
