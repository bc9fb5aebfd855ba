// Convergence on CUDA: a thread per row for short readouts, a warp per row for longer ones.
#include "convergence/convergence.h"

#include "common/cuda.cuh"
#include "convergence/warp.cuh"

namespace adaptcomp {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    convergence_thread_kernel(const __grid_constant__ ConvergenceStep a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) convergence_step_row<T>(a, i);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    convergence_warp_kernel(const __grid_constant__ ConvergenceStep a) {
  const int64_t i = Group<32>::row();
  if (i >= a.rows) return;
  const int64_t at = i * a.elements;
  const bool same = stands_still_warp(static_cast<const T*>(a.now) + at, static_cast<const T*>(a.last) + at,
                                      a.elements, a.criterion, a.tolerance);
  if (Group<32>::lane() == 0) a.next[i] = count_still(a.still[i], same);
}

}  // namespace

void convergence_step_cuda(const ConvergenceStep& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.elements <= kElementsPerThread) {
      launch("convergence_step", convergence_thread_kernel<T>, blocks_for(a.rows, kThreads), stream, a);
    } else {
      launch("convergence_step", convergence_warp_kernel<T>, blocks_for(a.rows, Group<32>::kRows), stream, a);
    }
  });
}

}  // namespace adaptcomp
