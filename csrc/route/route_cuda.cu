// Routing on CUDA. A row of the batch belongs to one group of threads, which looks up where the row comes from, or goes to, and
// moves it in accesses as wide as addresses and length allow. The index is inverted first, into the caller's scratch: a bisection
// in every group would wait for memory again and again. The tensors of a call share one launch.
#include "common/cuda.cuh"
#include "route/route.h"

namespace adaptcomp {
namespace {

constexpr int kMovesPerLaunch = 16;

template <class Move>
struct Table {
  Move moves[kMovesPerLaunch];
  int32_t n;
};

__device__ __forceinline__ char* at(void* base, int64_t row, int64_t row_bytes) {
  return static_cast<char*>(base) + row * row_bytes;
}
__device__ __forceinline__ const char* at(const void* base, int64_t row, int64_t row_bytes) {
  return static_cast<const char*>(base) + row * row_bytes;
}

__global__ void __launch_bounds__(kThreads)
    invert_kernel(const int64_t* __restrict__ index, int64_t count, int64_t* __restrict__ position) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < count && index[j] >= 0) position[index[j]] = j;
}

template <int G>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ Table<MergeMove> table, const int64_t* __restrict__ position, int64_t batch) {
  const int64_t b = Group<G>::row();
  if (b >= batch) return;
  const int64_t j = position[b];
  for (int m = 0; m < table.n; ++m) {
    const MergeMove& move = table.moves[m];
    const int64_t size = move.row_bytes;
    move_row<G>(at(move.dst, b, size), j < 0 ? at(move.base, b, size) : at(move.rows, j, size), size, Group<G>::lane());
  }
}

template <int G>
__global__ void __launch_bounds__(kThreads)
    split_kernel(const __grid_constant__ Table<SplitMove> table, const int64_t* __restrict__ position, int64_t batch) {
  const int64_t b = Group<G>::row();
  if (b >= batch) return;
  const int64_t j = position[b];
  for (int m = 0; m < table.n; ++m) {
    const SplitMove& move = table.moves[m];
    const int64_t size = move.row_bytes;
    const char* grad = at(move.grad, b, size);
    move_row<G>(at(move.base, b, size), j < 0 ? grad : nullptr, size, Group<G>::lane());
    if (j >= 0) move_row<G>(at(move.rows, j, size), grad, size, Group<G>::lane());
  }
}

void invert(const int64_t* index, int64_t count, int64_t batch, int64_t* position, void* stream) {
  if (batch == 0) return;
  // Every byte set is -1.
  cuda_check(cudaMemsetAsync(position, 0xff, static_cast<size_t>(batch) * sizeof(int64_t), static_cast<cudaStream_t>(stream)),
             "route (positions)");
  launch("route (positions)", invert_kernel, blocks_for(count, kThreads), stream, index, count, position);
}

// Calls f with tables of at most kMovesPerLaunch moves and the bytes of the longest row in each.
template <class Move, class F>
void tables(const Move* moves, int64_t n_moves, const F& f) {
  for (int64_t m = 0; m < n_moves;) {
    Table<Move> table{};
    int64_t longest = 0;
    for (; m < n_moves && table.n < kMovesPerLaunch; ++m) {
      if (moves[m].row_bytes == 0) continue;
      table.moves[table.n++] = moves[m];
      longest = std::max(longest, moves[m].row_bytes);
    }
    if (table.n) f(table, longest);
  }
}

}  // namespace

void merge_rows_cuda(const MergeMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch,
                     int64_t* position, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  invert(index, count, batch, position, stream);
  tables(moves, n_moves, [&](const Table<MergeMove>& table, int64_t longest) {
    dispatch_group(longest, [&](auto g) {
      constexpr int G = decltype(g)::value;
      launch("merge_rows", merge_kernel<G>, blocks_for(batch, Group<G>::kRows), stream, table, position, batch);
    });
  });
}

void split_rows_cuda(const SplitMove* moves, int64_t n_moves, const int64_t* index, int64_t count, int64_t batch,
                     int64_t* position, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  invert(index, count, batch, position, stream);
  for (int64_t m = 0; m < n_moves; ++m) {
    // Rows of the padding belong to no row of the batch, and nobody else writes them.
    const int64_t bytes = count * moves[m].row_bytes;
    if (bytes == 0) continue;
    cuda_check(cudaMemsetAsync(moves[m].rows, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
               "split_rows (zero)");
  }
  tables(moves, n_moves, [&](const Table<SplitMove>& table, int64_t longest) {
    dispatch_group(longest, [&](auto g) {
      constexpr int G = decltype(g)::value;
      launch("split_rows", split_kernel<G>, blocks_for(batch, Group<G>::kRows), stream, table, position, batch);
    });
  });
}

}  // namespace adaptcomp
