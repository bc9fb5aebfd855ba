// Routing on the CPU: memory bound. Rows that stay neighbours move as one block; a thread finds its place in the index by
// bisection.
#include "route/route.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace adaptcomp {
namespace {

char* at(void* base, int64_t row, int64_t row_bytes) { return static_cast<char*>(base) + row * row_bytes; }
const char* at(const void* base, int64_t row, int64_t row_bytes) { return static_cast<const char*>(base) + row * row_bytes; }

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes) std::memcpy(to, from, static_cast<size_t>(bytes));
}
void clear(void* to, int64_t bytes) {
  if (bytes) std::memset(to, 0, static_cast<size_t>(bytes));
}

int64_t without_padding(const int64_t* index, int64_t count) {
  while (count > 0 && index[count - 1] < 0) --count;
  return count;
}

template <class Move>
int64_t bytes_per_row(const Move* moves, int64_t n_moves) {
  int64_t total = 0;
  for (int64_t m = 0; m < n_moves; ++m) total += 2 * moves[m].row_bytes;
  return total;
}

// Cuts the batch into runs: stay(begin, rows) of rows that are not in the index, taken(begin, rows, j) of rows that are, index[j]
// being the first of them.
template <class Stay, class Taken>
void runs(const int64_t* index, int64_t count, int64_t begin, int64_t end, const Stay& stay, const Taken& taken) {
  int64_t j = std::lower_bound(index, index + count, begin) - index;
  for (int64_t b = begin; b < end;) {
    const int64_t next = j < count ? std::min(index[j], end) : end;
    if (next > b) stay(b, next - b);
    b = next;
    int64_t run = 0;
    while (j + run < count && b + run < end && index[j + run] == b + run) ++run;
    if (run) taken(b, run, j);
    b += run;
    j += run;
  }
}

}  // namespace

void merge_rows_cpu(const MergeMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch) {
  count = without_padding(index, count);
  parallel_rows(batch, bytes_per_row(moves, n_moves), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < n_moves; ++m) {
      const MergeMove& move = moves[m];
      const int64_t size = move.row_bytes;
      runs(
          index, count, begin, end,
          [&](int64_t b, int64_t rows) { copy(at(move.dst, b, size), at(move.base, b, size), rows * size); },
          [&](int64_t b, int64_t rows, int64_t j) { copy(at(move.dst, b, size), at(move.rows, j, size), rows * size); });
    }
  });
}

void split_rows_cpu(const SplitMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch) {
  const int64_t padded = count;
  count = without_padding(index, count);
  for (int64_t m = 0; m < n_moves; ++m) {
    clear(at(moves[m].rows, count, moves[m].row_bytes), (padded - count) * moves[m].row_bytes);
  }
  parallel_rows(batch, bytes_per_row(moves, n_moves), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < n_moves; ++m) {
      const SplitMove& move = moves[m];
      const int64_t size = move.row_bytes;
      runs(
          index, count, begin, end,
          [&](int64_t b, int64_t rows) { copy(at(move.base, b, size), at(move.grad, b, size), rows * size); },
          [&](int64_t b, int64_t rows, int64_t j) {
            copy(at(move.rows, j, size), at(move.grad, b, size), rows * size);
            clear(at(move.base, b, size), rows * size);
          });
    }
  });
}

}  // namespace adaptcomp
