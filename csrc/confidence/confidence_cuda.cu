// Confidence on CUDA: a thread per row for few classes, where neighbouring rows share cache lines; a warp per
// row for more.
#include "confidence/confidence.h"

#include "common/cuda.cuh"
#include "confidence/warp.cuh"

namespace adaptcomp {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) confidence_thread_kernel(const __grid_constant__ Confidence a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) confidence_block_row<T>(a, i);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) confidence_warp_kernel(const __grid_constant__ Confidence a) {
  const int64_t i = Group<32>::row();
  if (i >= a.rows) return;
  const compute_t<T> confidence =
      confidence_warp(static_cast<const T*>(a.logits) + i * a.classes, a.classes, a.measure);
  if (Group<32>::lane() == 0) static_cast<compute_t<T>*>(a.confidence)[i] = confidence;
}

}  // namespace

void confidence_cuda(const Confidence& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.classes <= kClassesPerThread) {
      launch("confidence", confidence_thread_kernel<T>, blocks_for(a.rows, kThreads), stream, a);
    } else {
      launch("confidence", confidence_warp_kernel<T>, blocks_for(a.rows, Group<32>::kRows), stream, a);
    }
  });
}

}  // namespace adaptcomp
