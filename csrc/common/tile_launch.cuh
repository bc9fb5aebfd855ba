// The launches of kernels on tiles of rows: the layout of a launch, the packing of matrices before it, and
// the sum of the blocks' parts of a gradient after it.
#pragma once

#include <algorithm>

#include "common/tiles.cuh"

namespace adaptcomp {

// The layout of a launch; `shared` and `scratch` are in bytes.
struct TilePlan {
  int slots;        // slots per block; 0: one row does not fit
  unsigned staged;  // bit i: part i of what the rows share is in shared memory
  int64_t shared, scratch, blocks;

  AC_HD bool has(int part) const { return (staged >> part & 1) != 0; }
};

// What a block needs in a layout, in bytes: shared memory; of the scratch, its own sums over rows and the
// states of the rows in its slots.
struct BlockNeeds {
  int64_t shared, sums, states;
};

// The layout of a launch of `kernel` for the current device; without slots if a row does not fit. needs(plan)
// measures a block, size(plan) the scratch. The parts from `first` on are staged as they fit. A kernel with
// sums gets at most two blocks per multiprocessor.
template <class Kernel, class Needs, class Size>
TilePlan plan_tile(Kernel* kernel, int64_t rows, int64_t device, int first, int parts, const Needs& needs,
                   const Size& size) {
  constexpr int64_t kMostSums = int64_t{256} << 20, kMostStates = int64_t{1} << 30;  // bytes, of all blocks
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, which, static_cast<int>(device)), "cudaDeviceGetAttribute");
    return static_cast<int64_t>(value);
  };
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                units = attribute(cudaDevAttrMultiProcessorCount);
  TilePlan plan{};
  // So many slots that one block per multiprocessor holds all rows, if they fit.
  for (plan.slots = 1; plan.slots < kWarp && plan.slots < blocks_for(rows, units);) plan.slots *= 2;
  while (plan.slots > 0 && needs(plan).shared > most) plan.slots /= 2;
  if (plan.slots == 0) return plan;
  // Fewer slots, where the states of more would leave multiprocessors without a block.
  while (plan.slots > 0 &&
         needs(plan).states >
             kMostStates / (plan.slots > 1 ? std::min(units, blocks_for(rows, plan.slots)) : 1))
    plan.slots /= 2;
  if (plan.slots == 0) return plan;
  for (int part = first; part < parts; ++part) {
    plan.staged |= 1u << part;
    if (needs(plan).shared > most) plan.staged &= ~(1u << part);
  }
  plan.shared = needs(plan).shared;
  // Always the maximum, because another thread may launch the same kernel with more.
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
      "cudaFuncSetAttribute");
  int resident = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads,
                                                           static_cast<size_t>(plan.shared)),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  plan.blocks = std::min(blocks_for(rows, plan.slots), units * std::max(resident, 1));
  const BlockNeeds block = needs(plan);
  if (block.sums > 0)
    plan.blocks = std::min({plan.blocks, 2 * units, std::max<int64_t>(kMostSums / block.sums, 1)});
  if (block.states > 0) plan.blocks = std::min(plan.blocks, kMostStates / block.states);
  plan.scratch = size(plan);
  return plan;
}

// Packs a matrix: to[k, j] = from[k row + j column], or its symmetric part.
struct Packing {
  void* to;
  const void* from;
  int64_t inner, columns, stride, row, column;
  bool symmetric;
};
// The destination of one parameter's sums; `offset` is in elements of a block's sums.
struct SumOf {
  void* to;
  int64_t offset, rows, columns, stride;
  bool symmetric;
};
template <class T>
struct ListOf {
  static constexpr int64_t kMost = 8;
  int64_t count = 0;
  T item[kMost];
  void add(const T& one) { item[count++] = one; }
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ ListOf<Packing> packings, unsigned long long* __restrict__ next) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread == 0) *next = 0;
  for (int64_t p = 0; p < packings.count; ++p) {
    const Packing& a = packings.item[p];
    const auto* from = static_cast<const C*>(a.from);
    for (int64_t i = thread; i < a.inner * a.stride; i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int64_t k = i / a.stride, j = i % a.stride;
      C x = j < a.columns ? from[k * a.row + j * a.column] : C(0);
      if (a.symmetric && j < a.columns) x = C(0.5) * (x + from[j * a.row + k * a.column]);
      static_cast<C*>(a.to)[i] = x;
    }
  }
}

// Adds up the blocks' sums, in the order of the blocks.
template <class C>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ ListOf<SumOf> sums, const C* __restrict__ partial, int64_t size,
               int64_t blocks) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t p = 0; p < sums.count; ++p) {
    const SumOf& a = sums.item[p];
    const auto total = [&](int64_t i, int64_t j) {
      const C* from = partial + a.offset + i * a.stride + j;
      C sum = 0;
#pragma unroll 4
      for (int64_t block = 0; block < blocks; ++block) sum += from[block * size];
      return sum;
    };
    for (int64_t at = thread; at < a.rows * a.columns; at += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int64_t i = at / a.columns, j = at % a.columns;
      static_cast<C*>(a.to)[at] = a.symmetric ? C(0.5) * (total(i, j) + total(j, i)) : total(i, j);
    }
  }
}

// Enough blocks for `items` elements that are read and written once.
inline int64_t few_blocks(int64_t items) { return std::min<int64_t>(blocks_for(items, kThreads), 2048); }

// Packs the matrices, and sets the counter of the rows that have been taken to zero.
template <class C>
void launch_pack(const ListOf<Packing>& packings, unsigned long long* next, void* stream) {
  int64_t most = 1;
  for (int64_t p = 0; p < packings.count; ++p)
    most = std::max(most, packings.item[p].inner * packings.item[p].stride);
  launch("pack", pack_kernel<C>, few_blocks(most), stream, packings, next);
}

}  // namespace adaptcomp
