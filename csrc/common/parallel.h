// OpenMP over a range of rows. The runtime is the one torch loaded, so torch.set_num_threads governs it.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace adaptcomp {

// Bytes of work under which waking a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

// Calls body(t, of) on at most `wanted` threads, t = 0 ... of - 1.
template <class Body>
void parallel_team([[maybe_unused]] int64_t wanted, const Body& body) {
#ifdef _OPENMP
  const int64_t most = omp_get_max_threads(), threads = wanted < most ? wanted : most;
  // One thread stays outside OpenMP altogether: after a parallel region a forked child would hang in its
  // first one.
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    body(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
    return;
  }
#endif
  body(int64_t{0}, int64_t{1});
}

// Calls body(begin, end) on disjoint chunks of [0, n). Each row lies in one chunk whatever the number of
// threads, and no row's arithmetic looks at another row, so the result does not depend on it.
template <class Body>
void parallel_rows(int64_t n, int64_t bytes_per_row, const Body& body) {
  if (n <= 0) return;
  parallel_team(std::min<int64_t>(n, n * bytes_per_row / kBytesPerThread),
                [&](int64_t t, int64_t of) { body(n * t / of, n * (t + 1) / of); });
}

}  // namespace adaptcomp
