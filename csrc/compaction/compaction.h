// Compaction, which moves the active rows together, and its adjoint.
//
//   keep  = [1 0 0 1 1]      index = [0 3 4]
//   src   = [a b c d e]      gather_rows  -> [a d e]           the order is kept, src is unchanged
//   grad  = [p q r]          scatter_rows -> [p 0 0 q r]
//
// All tensors of a call move in one pass over the rows.
#pragma once

#include <cstdint>

namespace adaptcomp {

struct Move {
  const void* src;
  void* dst;
  int64_t row_bytes;
};

// index[0..count): the kept rows, ascending. Returns count. `index` has room for n.
int64_t compact_index_cpu(const uint8_t* keep, int64_t n, int64_t* index);
// dst[j] = src[index[j]] for j < count, or a row of zero bytes if index[j] is negative.
void gather_rows_cpu(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count);
// dst[0..rows) = 0, then dst[index[j]] = src[j] for j < count. The entries of `index` have to be distinct;
// negative ones are skipped.
void scatter_rows_cpu(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t rows);

// The CUDA functions never read the count back. They process `rows` rows, the caller's upper bound, and leave
// the count in `*count` on the device. From the count on, the index is -1, rows are gathered as zero bytes,
// and the scatter skips them. `temp` is the caller's scratch of compact_temp_bytes(n); `stream` is a
// cudaStream_t.
int64_t compact_temp_bytes(int64_t n);
void compact_index_cuda(const uint8_t* keep, int64_t n, int64_t* index, int64_t* count, void* temp,
                        int64_t temp_bytes, int64_t device, void* stream);
void gather_rows_cuda(const Move* moves, int64_t n_moves, const int64_t* index, int64_t rows, int64_t device,
                      void* stream);
void scatter_rows_cuda(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t rows,
                       int64_t device, void* stream);

}  // namespace adaptcomp
