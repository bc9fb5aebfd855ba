// The index of a compaction on CUDA, in one launch.
//
// A block works on a tile of rows and needs two more numbers: those of active rows before the tile, and in
// all. It counts them itself. Passing counts between blocks, or a second launch, would read less and cost
// more: a flag is one byte, one access counts 16 of them, and a batch of a million rows is a megabyte that
// every block reads from cache.
#include "common/cuda.cuh"
#include "halting/halting.h"

namespace adaptcomp {
namespace {

constexpr int kFlags = 16;  // per thread, in one access
constexpr int kTile = kFlags * kThreads;

static_assert(kRunning == 0 && (kPadding & 7) && (kHalted & 7) && (kMaxSteps & 7) && (kNonFinite & 7) &&
                  (kRejected & 7),
              "a row goes on where the three low bits of its flag are zero");

using Flags = Pack<uint32_t, kFlags / 4>;

// The flags of the rows from `first` on; after the last row they are padding.
__device__ __forceinline__ Flags load_flags(const int8_t* flag, int64_t first, int64_t rows) {
  if (first + kFlags <= rows && address(flag) % sizeof(Flags) == 0)
    return *reinterpret_cast<const Flags*>(flag + first);
  Flags flags{};
#pragma unroll
  for (int e = 0; e < kFlags; ++e) {
    const int8_t f = first + e < rows ? flag[first + e] : static_cast<int8_t>(kPadding);
    flags.v[e / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(f)) << (8 * (e % 4));
  }
  return flags;
}

__device__ __forceinline__ bool goes_on(const Flags& flags, int e) {
  return ((flags.v[e / 4] >> (8 * (e % 4))) & 7u) == 0;
}

__device__ __forceinline__ int count(const Flags& flags) {
  int ended = 0;
#pragma unroll
  for (int w = 0; w < kFlags / 4; ++w)
    ended += __popc((flags.v[w] | flags.v[w] >> 1 | flags.v[w] >> 2) & 0x01010101u);
  return kFlags - ended;
}

// Returns the sum of x over the threads of the block before this one, and in `total` over all.
__device__ __forceinline__ int sum_before(int x, int& total) {
  __shared__ int of_warp[kThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int before = 0, sum = x;  // over the lanes that the tree has joined so far
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_xor_sync(~0u, sum, d);
    if (lane & d) before += other;
    sum += other;
  }
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before += total;
    total += of_warp[w];
  }
  return before;
}

__global__ void __launch_bounds__(kThreads) plan_packing_kernel(const __grid_constant__ PackingPlan a) {
  using Block = Group<kThreads>;
  __shared__ int16_t
      rank[kTile];  // number of active rows before each row of the tile; -1 for a row that has ended
  __shared__ int16_t going[kTile];  // the active rows of the tile, in order

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  int64_t before = 0, running = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x * int64_t{kFlags}; i < a.rows; i += kTile) {
    const int n = count(load_flags(a.flag, i, a.rows));
    running += n;
    if (i < begin) before += n;
  }
  before = Block::broadcast(Block::sum(before));
  running = Block::broadcast(Block::sum(running));
  if (running == 0) {
    for (int64_t j = Block::lane() + static_cast<int64_t>(blockIdx.x) * kThreads; j < a.size;
         j += static_cast<int64_t>(gridDim.x) * kThreads) {
      a.index[j] = -1;
      a.next[j] = -1;
    }
  }

  const int first = static_cast<int>(threadIdx.x) * kFlags;
  const Flags own = load_flags(a.flag, begin + first, a.rows);
  int of_tile;
  int r = sum_before(count(own), of_tile);
#pragma unroll
  for (int e = 0; e < kFlags; ++e) {
    const bool on = goes_on(own, e);
    rank[first + e] = static_cast<int16_t>(on ? r : -1);
    if (on) going[r++] = static_cast<int16_t>(first + e);
  }
  __syncthreads();

  const int tile = static_cast<int>(a.rows - begin < kTile ? a.rows - begin : kTile);
  for (int t = Block::lane(); t < tile; t += kThreads)
    a.place[begin + t] = rank[t] < 0 || before + rank[t] >= a.size ? -1 : before + rank[t];
  if (of_tile == 0) return;
  // Row k of the new block, and every padding row that is a copy of it.
  const int64_t copies = (a.size + running - 1) / running;
  for (int64_t c = Block::lane(); c < of_tile * copies; c += kThreads) {
    const int64_t lap = c / of_tile, t = c - lap * of_tile, j = before + t + lap * running;
    if (j >= a.size) continue;
    const int64_t i = begin + going[t];
    a.index[j] = i;
    a.next[j] = lap == 0 ? a.row[i] : -1;
  }
}

}  // namespace

void plan_packing_cuda(const PackingPlan& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("plan_packing", plan_packing_kernel, blocks_for(a.rows, kTile), stream, a);
}

}  // namespace adaptcomp
