// Whether a long readout stands still, by one warp. Lane k % 32 takes element k, and the lanes' sums meet in
// a fixed tree, so that a row has the same bits in every kernel and in any batch.
#pragma once

#include "common/cuda.cuh"
#include "convergence/rows.h"

namespace adaptcomp {

// Up to this number of elements one thread reads the row: a warp would mostly add up its lanes.
constexpr int64_t kElementsPerThread = 64;

template <class C>
__device__ __forceinline__ C warp_sum(C x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
template <class C>
__device__ __forceinline__ C warp_max(C x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// Every lane gets the result.
template <class T>
__device__ bool stands_still_warp(const T* now, const T* last, int64_t n, Criterion criterion,
                                  double tolerance) {
  using C = compute_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (criterion == Criterion::kl) {
    Divergence<C> sums{C(-INFINITY), C(-INFINITY)};
    for (int64_t k = lane; k < n; k += 32) {
      sums.now_max = fmax(sums.now_max, load(now[k]));
      sums.last_max = fmax(sums.last_max, load(last[k]));
    }
    sums.now_max = warp_max(sums.now_max);
    sums.last_max = warp_max(sums.last_max);
    for (int64_t k = lane; k < n; k += 32) sums.add(load(now[k]), load(last[k]));
    sums.now_sum = warp_sum(sums.now_sum);
    sums.last_sum = warp_sum(sums.last_sum);
    sums.dot = warp_sum(sums.dot);
    return sums.value() <= C(tolerance);
  }
  Movement<C> movement;
#pragma unroll 4
  for (int64_t k = lane; k < n; k += 32) movement.add(load(now[k]), load(last[k]));
  movement.change = warp_sum(movement.change);
  movement.size = warp_sum(movement.size);
  return movement.stays(C(tolerance), criterion == Criterion::relative);
}

}  // namespace adaptcomp
