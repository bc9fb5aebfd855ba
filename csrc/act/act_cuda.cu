// ACT on CUDA: one thread per row. A row is a handful of scalars, so that the launch dominates the time.
#include "act/act.h"

#include "common/cuda.cuh"

namespace adaptcomp {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) act_step_kernel(const __grid_constant__ ActStep a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) act_step_row<S>(a, i);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    act_step_backward_kernel(const __grid_constant__ ActStepBackward a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) act_step_backward_row<S>(a, i);
}

}  // namespace

void act_step_cuda(const ActStep& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("act_step", a.wide ? act_step_kernel<double> : act_step_kernel<float>, blocks_for(a.rows, kThreads),
         stream, a);
}

void act_step_backward_cuda(const ActStepBackward& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("act_step_backward", a.wide ? act_step_backward_kernel<double> : act_step_backward_kernel<float>,
         blocks_for(a.rows, kThreads), stream, a);
}

}  // namespace adaptcomp
