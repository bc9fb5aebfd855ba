// Routing on the CPU, which is bound by memory. A thread finds where its rows begin in the index and walks
// along both, so that rows that stay neighbours, routed or not, are copied as one block.
#include "route/route.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace adaptcomp {
namespace {

// Calls routed(row, j, run) and others(row, run) for the runs of neighbours in [begin, end); index[j] is the
// run's first row.
template <class Routed, class Others>
void for_runs(const int64_t* index, int64_t count, int64_t begin, int64_t end, const Routed& routed,
              const Others& others) {
  int64_t j = first_from(begin, index, 0, count);
  for (int64_t row = begin; row < end;) {
    int64_t run = 0;
    while (row + run < end && j + run < count && index[j + run] == row + run) ++run;
    if (run > 0) {
      routed(row, j, run);
      row += run;
      j += run;
    }
    while (j < count && index[j] >= 0 && index[j] < row) ++j;  // skips entries that are out of order
    const int64_t next = j < count && index[j] >= 0 ? std::min(index[j], end) : end;
    if (next > row) others(row, next - row);
    row = std::max(row, next);
  }
}

size_t bytes(int64_t n) { return static_cast<size_t>(n); }

template <class Move>
int64_t moved_per_row(const Move* moves, int64_t n) {
  int64_t total = 0;
  for (int64_t m = 0; m < n; ++m) total += 2 * moves[m].row_bytes;
  return total;
}

}  // namespace

bool in_order_cpu(const int64_t* index, int64_t count, int64_t size) {
  int64_t named = 0;
  for (int64_t last = -1; named < count && index[named] > last && index[named] < size; ++named)
    last = index[named];
  return std::all_of(index + named, index + count, [](int64_t i) { return i < 0; });
}

void merge_rows_cpu(const Merge* merges, int64_t n_merges, const int64_t* index, int64_t count,
                    int64_t size) {
  parallel_rows(size, moved_per_row(merges, n_merges), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < n_merges; ++m) {
      const int64_t width = merges[m].row_bytes;
      const auto* rows = static_cast<const char*>(merges[m].rows);
      const auto* otherwise = static_cast<const char*>(merges[m].otherwise);
      auto* out = static_cast<char*>(merges[m].out);
      if (width == 0) continue;
      for_runs(
          index, count, begin, end,
          [&](int64_t row, int64_t j, int64_t run) {
            std::memcpy(out + row * width, rows + j * width, bytes(run * width));
          },
          [&](int64_t row, int64_t run) {
            std::memcpy(out + row * width, otherwise + row * width, bytes(run * width));
          });
    }
  });
}

void split_rows_cpu(const Split* splits, int64_t n_splits, const int64_t* index, int64_t count,
                    int64_t size) {
  parallel_rows(size, moved_per_row(splits, n_splits), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < n_splits; ++m) {
      const int64_t width = splits[m].row_bytes;
      const auto* grad = static_cast<const char*>(splits[m].grad);
      auto* rows = static_cast<char*>(splits[m].rows);
      auto* otherwise = static_cast<char*>(splits[m].otherwise);
      if (width == 0) continue;
      for_runs(
          index, count, begin, end,
          [&](int64_t row, int64_t j, int64_t run) {
            if (rows) std::memcpy(rows + j * width, grad + row * width, bytes(run * width));
            std::memset(otherwise + row * width, 0, bytes(run * width));
          },
          [&](int64_t row, int64_t run) {
            std::memcpy(otherwise + row * width, grad + row * width, bytes(run * width));
          });
    }
  });
  const int64_t named = first_from(size, index, 0, count);  // entries from here on are negative
  for (int64_t m = 0; m < n_splits && named < count; ++m) {
    const int64_t width = splits[m].row_bytes;
    if (splits[m].rows && width > 0)
      std::memset(static_cast<char*>(splits[m].rows) + named * width, 0, bytes((count - named) * width));
  }
}

}  // namespace adaptcomp
