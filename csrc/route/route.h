// Routing: rows that took a branch, merged with those that did not; and its adjoint.
//
//   base  = [a b c d e]      index = [0 3 4]      rows = [p q r]
//   merge_rows -> [p b c q r]                     rows and base unchanged
//   grad  = [v w x y z]      split_rows -> of base [0 w x 0 0], of rows [v y z]
//
// Each is one pass over the rows of all tensors of a call, and every byte is read once: merging reads no row of `base` that is
// replaced, splitting reads `grad` for both of its results.
#pragma once

#include <cstdint>

namespace adaptcomp {

struct MergeMove {
  const void* rows;
  const void* base;
  void* dst;
  int64_t row_bytes;
};

struct SplitMove {
  const void* grad;
  void* rows;
  void* base;
  int64_t row_bytes;
};

// index[0..count): rows of the batch, ascending; negative entries may follow and are left out, their rows of a split zero.
void merge_rows_cpu(const MergeMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch);
void split_rows_cpu(const SplitMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch);

// The CUDA forms take any order and never read back. `position` is scratch for `batch` integers, owned by the caller. `stream`
// is a cudaStream_t.
void merge_rows_cuda(const MergeMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch,
                     int64_t* position, int64_t device, void* stream);
void split_rows_cuda(const SplitMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch,
                     int64_t* position, int64_t device, void* stream);

}  // namespace adaptcomp
