// The confidence of a row of many classes, by one warp. Lane c % 32 takes class c, and the lanes' sums meet
// in a fixed tree, so that a row has the same bits in every kernel and in any batch.
#pragma once

#include "common/cuda.cuh"
#include "confidence/rows.h"

namespace adaptcomp {

// Up to this number of classes one thread runs confidence_row: a warp would mostly add up its lanes.
constexpr int64_t kClassesPerThread = 64;

template <class T>
__device__ compute_t<T> confidence_warp(const T* logits, int64_t classes, Measure measure) {
  using C = compute_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ConfidenceSums<C> s{-INFINITY, -INFINITY, C(0), C(0)};
#pragma unroll 4
  for (int64_t c = lane; c < classes; c += 32) {
    const C x = load(logits[c]);
    s.second = fmax(s.second, fmin(s.first, x));
    s.first = fmax(s.first, x);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const C first = __shfl_xor_sync(~0u, s.first, d), second = __shfl_xor_sync(~0u, s.second, d);
    s.second = fmax(fmax(s.second, second), fmin(s.first, first));
    s.first = fmax(s.first, first);
  }
#pragma unroll 4
  for (int64_t c = lane; c < classes; c += 32) {
    const C x = load(logits[c]) - s.first, e = exp_nonpositive(x);
    s.sum += e;
    if (e > 0) s.weighted += e * x;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    s.sum += __shfl_xor_sync(~0u, s.sum, d);
    s.weighted += __shfl_xor_sync(~0u, s.weighted, d);
  }
  return confidence_of(s, classes, measure);
}

}  // namespace adaptcomp
