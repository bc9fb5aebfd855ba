// The linear layer on CUDA: one thread computes each element. It serves rows whose bits must not depend on
// their batch; a matrix product that is bound by arithmetic is several times as fast in cuBLAS.
#include <cmath>

#include "common/cuda.cuh"
#include "linear/linear.h"

namespace adaptcomp {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ Linear a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t i = at / a.columns, j = at % a.columns;
  if (i >= a.rows) return;
  const C *x = static_cast<const C*>(a.x) + i * a.inner,
          *weight = static_cast<const C*>(a.weight) + j * a.column;
  C sum = a.bias ? static_cast<const C*>(a.bias)[j] : C(0);
  for (int64_t k = 0; k < a.inner; ++k) sum = std::fma(x[k], weight[k * a.row], sum);
  static_cast<C*>(a.out)[at] = sum;
}

}  // namespace

void linear_cuda(const Linear& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = blocks_for(a.rows * a.columns, kThreads);
  launch("linear", a.wide ? linear_kernel<double> : linear_kernel<float>, blocks, stream, a);
}

}  // namespace adaptcomp
