// PonderNet on CUDA: one thread per row. A row is a handful of scalars, so that the launch dominates the
// time.
#include "pondernet/pondernet.h"

#include "common/cuda.cuh"

namespace adaptcomp {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) pondernet_step_kernel(const __grid_constant__ PonderNetStep a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) pondernet_step_row<S>(a, i);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    pondernet_step_backward_kernel(const __grid_constant__ PonderNetStepBackward a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) pondernet_step_backward_row<S>(a, i);
}

}  // namespace

void pondernet_step_cuda(const PonderNetStep& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("pondernet_step", a.wide ? pondernet_step_kernel<double> : pondernet_step_kernel<float>,
         blocks_for(a.rows, kThreads), stream, a);
}

void pondernet_step_backward_cuda(const PonderNetStepBackward& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("pondernet_step_backward",
         a.wide ? pondernet_step_backward_kernel<double> : pondernet_step_backward_kernel<float>,
         blocks_for(a.rows, kThreads), stream, a);
}

}  // namespace adaptcomp
