// Routing on CUDA, organised like compaction: a block moves a tile of kTile words of one tensor's [size, ...]
// side, whatever the length of its rows, with kWords independent loads of each thread in flight. The tensors
// of a call are a table in the kernel's parameters and share one launch.
//
// A row's position in the index is found by bisection. Two threads bisect the complete index for the first
// and the last row of the tile; the others search between them, which for rows of at least a tile's length is
// one or two entries.
#include "common/cuda.cuh"
#include "route/route.h"

namespace adaptcomp {
namespace {

constexpr int kWords = 4;  // per thread
constexpr int kTile = kWords * kThreads;
constexpr int kMovesPerLaunch = 16;

template <class Move>
struct MoveTable {
  Move moves[kMovesPerLaunch];
  int64_t first_block[kMovesPerLaunch];
  int32_t n;
};

inline __host__ __device__ int word_bytes(const Merge& m) {
  return access_bytes(address(m.rows) | address(m.otherwise) | address(m.out) |
                      static_cast<uintptr_t>(m.row_bytes));
}
inline __host__ __device__ int word_bytes(const Split& m) {
  return access_bytes(address(m.rows) | address(m.otherwise) | address(m.grad) |
                      static_cast<uintptr_t>(m.row_bytes));
}

template <class Word>
__device__ __forceinline__ void take(const Merge& m, const int64_t* place, const int64_t* dense, Word* word) {
  const auto* __restrict__ rows = static_cast<const Word*>(m.rows);
  const auto* __restrict__ otherwise = static_cast<const Word*>(m.otherwise);
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    if (dense[k] >= 0) word[k] = place[k] >= 0 ? rows[place[k]] : otherwise[dense[k]];
  }
}
template <class Word>
__device__ __forceinline__ void take(const Split& m, const int64_t*, const int64_t* dense, Word* word) {
  const auto* __restrict__ grad = static_cast<const Word*>(m.grad);
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    if (dense[k] >= 0) word[k] = grad[dense[k]];
  }
}

template <class Word>
__device__ __forceinline__ void put(const Merge& m, const int64_t*, const int64_t* dense, const Word* word) {
  auto* __restrict__ out = static_cast<Word*>(m.out);
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    if (dense[k] >= 0) out[dense[k]] = word[k];
  }
}
template <class Word>
__device__ __forceinline__ void put(const Split& m, const int64_t* place, const int64_t* dense,
                                    const Word* word) {
  auto* __restrict__ rows = static_cast<Word*>(m.rows);
  auto* __restrict__ otherwise = static_cast<Word*>(m.otherwise);
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    if (dense[k] < 0) continue;
    otherwise[dense[k]] = place[k] >= 0 ? Word{} : word[k];
    if (rows && place[k] >= 0) rows[place[k]] = word[k];
  }
}

// Zeroes the rows of a split that have negative entries. There are at most `size` entries, so that each
// thread zeroes the word at the same position as its own word of the [size, ...] side.
template <class Word>
__device__ __forceinline__ void blank(const Merge&, const int64_t*, int64_t, int64_t, int64_t) {}
template <class Word>
__device__ __forceinline__ void blank(const Split& m, const int64_t* index, int64_t count, int64_t row,
                                      int64_t dense) {
  if (m.rows && row < count && index[row] < 0) static_cast<Word*>(m.rows)[dense] = Word{};
}

template <class Word, class Move>
__device__ __forceinline__ void move_tile(const Move& move, const int64_t* __restrict__ index, int64_t count,
                                          int64_t size, int64_t tile) {
  const int64_t per_row = move.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t total = size * per_row, begin = tile * kTile;
  const int64_t first_row = begin / per_row;  // the only 64-bit division of a thread
  const int64_t first_column = begin - first_row * per_row;

  __shared__ int64_t bounds[2];  // index positions of the tile's first row and of the row after its last
  if (threadIdx.x < 2) {
    const int64_t last = (begin + kTile < total ? begin + kTile : total) - 1;
    bounds[threadIdx.x] = first_from(threadIdx.x == 0 ? first_row : last / per_row + 1, index, 0, count);
  }
  __syncthreads();
  const int64_t low = bounds[0], high = bounds[1];

  int64_t dense[kWords], place[kWords];  // words on the [size, ...] side and among the rows; -1: none
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int offset = static_cast<int>(threadIdx.x) + k * kThreads;
    dense[k] = place[k] = -1;
    if (begin + offset >= total) continue;
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
    dense[k] = begin + offset;
    const int64_t j = first_from(row, index, low, high);
    if (j < high && index[j] == row) place[k] = j * per_row + column;
    blank<Word>(move, index, count, row, dense[k]);
  }

  Word word[kWords];
  take(move, place, dense, word);
  put(move, place, dense, word);
}

template <class Move>
__global__ void __launch_bounds__(kThreads)
    route_kernel(const __grid_constant__ MoveTable<Move> table, const int64_t* __restrict__ index,
                 int64_t count, int64_t size) {
  int m = 0;
  while (m + 1 < table.n && blockIdx.x >= table.first_block[m + 1]) ++m;
  const Move& move = table.moves[m];
  const int64_t tile = blockIdx.x - table.first_block[m];
  dispatch_word(word_bytes(move), [&](auto* word) {
    move_tile<std::remove_pointer_t<decltype(word)>>(move, index, count, size, tile);
  });
}

template <class Move>
void route(const char* name, const Move* moves, int64_t n_moves, const int64_t* index, int64_t count,
           int64_t size, void* stream) {
  for (int64_t m = 0; m < n_moves;) {
    MoveTable<Move> table{};
    int64_t blocks = 0;
    for (; m < n_moves && table.n < kMovesPerLaunch; ++m) {
      if (moves[m].row_bytes == 0) continue;
      table.moves[table.n] = moves[m];
      table.first_block[table.n++] = blocks;
      blocks += blocks_for(size * (moves[m].row_bytes / word_bytes(moves[m])), kTile);
    }
    launch(name, route_kernel<Move>, blocks, stream, table, index, count, size);
  }
}

}  // namespace

void merge_rows_cuda(const Merge* merges, int64_t n_merges, const int64_t* index, int64_t count, int64_t size,
                     int64_t device, void* stream) {
  const DeviceGuard guard(device);
  route("merge_rows", merges, n_merges, index, count, size, stream);
}

void split_rows_cuda(const Split* splits, int64_t n_splits, const int64_t* index, int64_t count, int64_t size,
                     int64_t device, void* stream) {
  const DeviceGuard guard(device);
  route("split_rows", splits, n_splits, index, count, size, stream);
}

}  // namespace adaptcomp
