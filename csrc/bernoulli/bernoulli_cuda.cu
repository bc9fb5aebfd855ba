// Sampled halting on CUDA: one thread per row. A row is a handful of scalars, so that the launch dominates
// the time.
#include "bernoulli/bernoulli.h"

#include "common/cuda.cuh"

namespace adaptcomp {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) bernoulli_step_kernel(const __grid_constant__ BernoulliStep a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) bernoulli_step_row<S>(a, i);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    bernoulli_step_backward_kernel(const __grid_constant__ BernoulliStepBackward a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) bernoulli_step_backward_row<S>(a, i);
}

__global__ void __launch_bounds__(kThreads) uniform_kernel(const __grid_constant__ UniformDraws a) {
  const int64_t i = Group<1>::row();
  if (i < a.rows) uniform_row(a, i);
}

}  // namespace

void bernoulli_step_cuda(const BernoulliStep& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("bernoulli_step", a.wide ? bernoulli_step_kernel<double> : bernoulli_step_kernel<float>,
         blocks_for(a.rows, kThreads), stream, a);
}

void bernoulli_step_backward_cuda(const BernoulliStepBackward& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("bernoulli_step_backward",
         a.wide ? bernoulli_step_backward_kernel<double> : bernoulli_step_backward_kernel<float>,
         blocks_for(a.rows, kThreads), stream, a);
}

void uniform_cuda(const UniformDraws& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  launch("uniform", uniform_kernel, blocks_for(a.rows, kThreads), stream, a);
}

}  // namespace adaptcomp
