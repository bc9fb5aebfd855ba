// Several threads over a range of rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace adaptcomp {

// Bytes of work below which a second thread costs more time than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

// Calls body(self, t, of) for t = 0 ... of - 1 on `of` threads, at most `wanted` and at most as many as
// torch.set_num_threads allows. One file alone knows OpenMP: the others compile the same with and without it.
void run_team(int64_t wanted, void (*body)(const void* self, int64_t t, int64_t of), const void* self);

// The version of the OpenMP standard, 0 without it, and the number of threads that `run_team` may use.
int openmp_version();
int most_threads();

// Calls body(t, of) as `run_team` does.
template <class Body>
void parallel_team(int64_t wanted, const Body& body) {
  if (wanted > 1) {
    run_team(
        wanted, [](const void* self, int64_t t, int64_t of) { (*static_cast<const Body*>(self))(t, of); },
        &body);
  } else {
    body(int64_t{0}, int64_t{1});
  }
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
