// Compaction on the CPU. It is bound by memory: complete rows are copied, and nothing else is read or
// written.
#include "compaction/compaction.h"

#include <cstring>

#include "common/parallel.h"

namespace adaptcomp {
namespace {

int64_t bytes_per_row(const Move* moves, int64_t n_moves) {
  int64_t total = 0;
  for (int64_t m = 0; m < n_moves; ++m) total += 2 * moves[m].row_bytes;
  return total;
}

char* at(void* base, int64_t row, int64_t row_bytes) { return static_cast<char*>(base) + row * row_bytes; }
const char* at(const void* base, int64_t row, int64_t row_bytes) {
  return static_cast<const char*>(base) + row * row_bytes;
}

}  // namespace

int64_t compact_index_cpu(const uint8_t* keep, int64_t n, int64_t* index) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    index[count] = i;  // branch-free: the next row overwrites the entry of a row that is not kept
    count += keep[i] != 0;
  }
  return count;
}

void gather_rows_cpu(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count) {
  parallel_rows(count, bytes_per_row(moves, n_moves), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < n_moves; ++m) {
      const int64_t size = moves[m].row_bytes;
      for (int64_t j = begin; j < end;) {
        if (index[j] < 0) {
          std::memset(at(moves[m].dst, j++, size), 0, static_cast<size_t>(size));
          continue;
        }
        int64_t run = 1;  // rows that stay neighbours are copied as one block
        while (j + run < end && index[j + run] == index[j] + run) ++run;
        std::memcpy(at(moves[m].dst, j, size), at(moves[m].src, index[j], size),
                    static_cast<size_t>(run * size));
        j += run;
      }
    }
  });
}

void scatter_rows_cpu(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t rows) {
  for (int64_t m = 0; m < n_moves; ++m) {
    const int64_t size = moves[m].row_bytes;
    parallel_rows(rows, size, [&](int64_t begin, int64_t end) {
      std::memset(at(moves[m].dst, begin, size), 0, static_cast<size_t>((end - begin) * size));
    });
    parallel_rows(count, 2 * size, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        if (index[j] < 0) continue;
        std::memcpy(at(moves[m].dst, index[j], size), at(moves[m].src, j, size), static_cast<size_t>(size));
      }
    });
  }
}

}  // namespace adaptcomp
