// Compaction on CUDA. Copying rows is bound by memory, which has to be kept busy: a block moves a tile of
// kTile words of one tensor's dense side, whatever the length of its rows, and each thread has kWords
// independent loads in flight. So short rows fill their warps, and long rows spread over many blocks, with
// the same code. The tensors of a call are a table in the kernel's parameters and share one launch. A word is
// as wide as the tensor's address and row length allow.
//
// The index comes from CUB's single-pass selection. Only this file includes CUB, which compiles slowly.
#include <thrust/iterator/counting_iterator.h>
#include <cub/device/device_select.cuh>

#include "common/cuda.cuh"
#include "compaction/compaction.h"

namespace adaptcomp {
namespace {

constexpr int kWords = 4;  // per thread
constexpr int kTile = kWords * kThreads;
constexpr int kMovesPerLaunch = 16;

struct MoveTable {
  Move moves[kMovesPerLaunch];
  int64_t first_block[kMovesPerLaunch];
  int32_t n;
};

inline __host__ __device__ int word_bytes(const Move& m) {
  return access_bytes(address(m.src) | address(m.dst) | static_cast<uintptr_t>(m.row_bytes));
}

// Moves a tile of the dense side, which is dst in a gather and src in a scatter; `index` has the rows of the
// sparse side.
template <bool Gather, class Word>
__device__ __forceinline__ void move_tile(const Move& move, const int64_t* __restrict__ index, int64_t rows,
                                          int64_t tile) {
  const auto* __restrict__ src = static_cast<const Word*>(move.src);
  auto* __restrict__ dst = static_cast<Word*>(move.dst);
  const int64_t per_row = move.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t total = rows * per_row, begin = tile * kTile;
  const int64_t first_row = begin / per_row;  // the only 64-bit division of a thread
  const int64_t first_column = begin - first_row * per_row;

  int64_t sparse[kWords];  // word on the sparse side; -1: none
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int offset = static_cast<int>(threadIdx.x) + k * kThreads;
    int64_t row = first_row, column = first_column + offset;
    if (column >= per_row) {
      if (per_row >= kTile) {  // the tile ends in the next row at the latest
        ++row;
        column -= per_row;
      } else {
        const uint32_t whole = static_cast<uint32_t>(column) / static_cast<uint32_t>(per_row);
        row += whole;
        column -= whole * per_row;
      }
    }
    const int64_t other = begin + offset < total ? index[row] : -1;
    sparse[k] = other < 0 ? -1 : other * per_row + column;
  }

  Word word[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t dense = begin + threadIdx.x + k * kThreads;
    const int64_t from = Gather ? sparse[k] : (sparse[k] < 0 ? -1 : dense);
    word[k] = from < 0 ? Word{} : src[from];
  }
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t dense = begin + threadIdx.x + k * kThreads;
    if (Gather && dense < total) dst[dense] = word[k];
    if (!Gather && sparse[k] >= 0) dst[sparse[k]] = word[k];
  }
}

template <bool Gather>
__global__ void __launch_bounds__(kThreads)
    move_rows_kernel(const __grid_constant__ MoveTable table, const int64_t* __restrict__ index,
                     int64_t rows) {
  int m = 0;
  while (m + 1 < table.n && blockIdx.x >= table.first_block[m + 1]) ++m;
  const Move& move = table.moves[m];
  const int64_t tile = blockIdx.x - table.first_block[m];
  dispatch_word(word_bytes(move), [&](auto* word) {
    move_tile<Gather, std::remove_pointer_t<decltype(word)>>(move, index, rows, tile);
  });
}

template <bool Gather>
void move_rows(const char* name, const Move* moves, int64_t n_moves, const int64_t* index, int64_t rows,
               void* stream) {
  for (int64_t m = 0; m < n_moves;) {
    MoveTable table{};
    int64_t blocks = 0;
    for (; m < n_moves && table.n < kMovesPerLaunch; ++m) {
      if (moves[m].row_bytes == 0) continue;
      table.moves[table.n] = moves[m];
      table.first_block[table.n++] = blocks;
      blocks += blocks_for(rows * (moves[m].row_bytes / word_bytes(moves[m])), kTile);
    }
    launch(name, move_rows_kernel<Gather>, blocks, stream, table, index, rows);
  }
}

// Runs CUB's selection; with a null `temp` it only sets `bytes`, the size of the scratch.
cudaError_t select_kept(void* temp, size_t& bytes, const uint8_t* keep, int64_t n, int64_t* index,
                        int64_t* count, cudaStream_t stream) {
  return cub::DeviceSelect::Flagged(temp, bytes, thrust::counting_iterator<int64_t>(0), keep, index, count, n,
                                    stream);
}

}  // namespace

int64_t compact_temp_bytes(int64_t n) {
  size_t bytes = 0;
  cuda_check(select_kept(nullptr, bytes, nullptr, n, nullptr, nullptr, nullptr),
             "compact_index (size of its scratch)");
  return static_cast<int64_t>(bytes);
}

void compact_index_cuda(const uint8_t* keep, int64_t n, int64_t* index, int64_t* count, void* temp,
                        int64_t temp_bytes, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (n == 0) {
    cuda_check(cudaMemsetAsync(count, 0, sizeof(int64_t), on), "compact_index (count)");
    return;
  }
  // Bytes of 0xff make entries of -1. The selection then writes the kept rows over the first ones.
  cuda_check(cudaMemsetAsync(index, 0xff, static_cast<size_t>(n) * sizeof(int64_t), on),
             "compact_index (tail)");
  size_t bytes = static_cast<size_t>(temp_bytes);
  cuda_check(select_kept(temp, bytes, keep, n, index, count, on), "compact_index");
}

void gather_rows_cuda(const Move* moves, int64_t n_moves, const int64_t* index, int64_t rows, int64_t device,
                      void* stream) {
  const DeviceGuard guard(device);
  move_rows<true>("gather_rows", moves, n_moves, index, rows, stream);
}

void scatter_rows_cuda(const Move* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t rows,
                       int64_t device, void* stream) {
  const DeviceGuard guard(device);
  for (int64_t m = 0; m < n_moves; ++m) {
    const int64_t bytes = rows * moves[m].row_bytes;
    if (bytes == 0) continue;
    cuda_check(
        cudaMemsetAsync(moves[m].dst, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "scatter_rows (zero)");
  }
  move_rows<false>("scatter_rows", moves, n_moves, index, count, stream);
}

}  // namespace adaptcomp
