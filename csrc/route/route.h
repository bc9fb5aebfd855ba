// Merging the rows of a branch with the rows that did not take it, and the adjoint.
//
//   index     = [0 3]
//   rows      = [p q]        otherwise = [a b c d e]
//   merge_rows               -> [p b c q e]
//   grad      = [u v w x y]
//   split_rows               -> rows [u x], otherwise [0 v w 0 y]
//
// `index` ascends strictly, in [0, size). It may end in negative entries, with which compaction pads it. Read
// as unsigned numbers they are larger than every row. Their rows are not merged, and are zero bytes after a
// split.
//
// All tensors of a call move in one pass over the `size` rows; each row is read once and written once.
#pragma once

#include <cstdint>

namespace adaptcomp {

struct Merge {
  const void* rows;
  const void* otherwise;
  void* out;
  int64_t row_bytes;
};

struct Split {
  const void* grad;
  void* rows;  // null: not needed
  void* otherwise;
  int64_t row_bytes;
};

// The first position in index[begin..count) whose entry is at least `row`; `count` if there is none.
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline int64_t first_from(int64_t row, const int64_t* index, int64_t begin, int64_t count) {
  while (begin < count) {
    const int64_t middle = begin + (count - begin) / 2;
    if (static_cast<uint64_t>(index[middle]) < static_cast<uint64_t>(row)) {
      begin = middle + 1;
    } else {
      count = middle;
    }
  }
  return begin;
}

// Whether an index in host memory is in the order described above.
bool in_order_cpu(const int64_t* index, int64_t count, int64_t size);

// `count` is at most `size`.
void merge_rows_cpu(const Merge* merges, int64_t n_merges, const int64_t* index, int64_t count, int64_t size);
void split_rows_cpu(const Split* splits, int64_t n_splits, const int64_t* index, int64_t count, int64_t size);

// The host does not wait. `stream` is a cudaStream_t.
void merge_rows_cuda(const Merge* merges, int64_t n_merges, const int64_t* index, int64_t count, int64_t size,
                     int64_t device, void* stream);
void split_rows_cuda(const Split* splits, int64_t n_splits, const int64_t* index, int64_t count, int64_t size,
                     int64_t device, void* stream);

}  // namespace adaptcomp
