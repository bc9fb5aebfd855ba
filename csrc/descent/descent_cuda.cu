// The step of a descent on CUDA: one launch, one group of threads per row (common/cuda.cuh).
//
// All lanes test the point and add up the gradient's norm, lane 0 judges, and all compute the next point. The
// distribution of elements over lanes depends on a row's length only, so that its norm has the same bits at
// any place. Neighbouring lanes read and write neighbouring elements; one lane computes a block of four
// elements of noise.
#include "descent/descent.h"

#include "common/cuda.cuh"
#include "common/scalars.h"
#include "descent/rows.h"

namespace adaptcomp {
namespace {

template <class T>
__device__ T* row_at(void* base, int64_t row, int64_t n) {
  return base ? static_cast<T*>(base) + row * n : nullptr;
}
template <class T>
__device__ const T* row_at(const void* base, int64_t row, int64_t n) {
  return base ? static_cast<const T*>(base) + row * n : nullptr;
}
template <class C>
__device__ C number_of(const PerRow& numbers, int64_t r) {
  return numbers.data ? static_cast<const C*>(numbers.data)[numbers.each ? r : 0]
                      : static_cast<C>(numbers.value);
}

// The norm of a row, in every lane, in double, where no finite gradient overflows.
template <int G, class T>
__device__ double norm_of(const T* x, int64_t n, bool mine) {
  double sum = 0;
  if (mine) {
    for (int64_t k = Group<G>::lane(); k < n; k += G) {
      const double v = static_cast<double>(load(x[k]));
      sum += v * v;
    }
  }
  return sqrt(Group<G>::broadcast(Group<G>::sum(sum)));
}

// The constants of a row's next point.
template <class C>
struct Proposal {
  C factor, momentum, step;
};

// Computes one element of the next point. `before` and `velocity` may be null; `noise` is sigma eta.
template <class T, class C>
__device__ void propose(const DescentRule& rule, const Proposal<C>& how, const T* y, const T* g,
                        const C* before, C* velocity, bool noisy, C noise, T* next, int64_t k) {
  C m = how.factor * load(g[k]);
  if (before) m = how.momentum * before[k] + m;
  const C from = noisy ? load(y[k]) + noise : C(load(y[k]));
  store(next[k], clamped(rule, from - how.step * m));
  if (velocity) velocity[k] = m;
}

template <class T, int G>
__global__ void __launch_bounds__(kThreads)
    descent_step_kernel(const __grid_constant__ DescentStep a, int64_t* running) {
  using C = compute_t<T>;
  using Row = Group<G>;
  const DescentRule& rule = a.rule;
  const int64_t n = a.elements, i = Row::row();
  const int lane = Row::lane();
  const int64_t r = i < a.rows ? a.row[i] : -1;
  const bool live = r >= 0;
  const T* point = row_at<T>(a.point, i, n);
  const T* gradient = row_at<T>(a.gradient, i, n);

  bool finite = true;
  if (live)
    for (int64_t k = lane; k < n; k += G) finite &= is_finite(point[k]);
  C value = C(0), energy = C(0);
  if (live) {
    value = load_scalar<C>(a.value, a.value_dtype, i);
    energy = static_cast<const C*>(a.energy)[r];
    finite &= is_finite(value);
  }
  finite = !Row::any(!finite);
  const double norm = rule.on_gradient && gradient ? norm_of<G>(gradient, n, live) : 0.0;
  Verdict verdict{false, kRunning};
  if (live)
    verdict = judge<double>(rule, a.step, static_cast<double>(energy), static_cast<double>(value), finite,
                            norm, a.moving && a.moving[r]);
  const bool goes_on = live && verdict.status == kRunning;

  // Every lane has read the state that lane 0 writes from here on.
  if (live && (verdict.accept || a.step == 0)) {
    T* y = row_at<T>(a.y, r, n);
    T* kept = gradient ? row_at<T>(a.kept, r, n) : nullptr;
    for (int64_t k = lane; k < n; k += G) {
      y[k] = point[k];
      if (kept) kept[k] = gradient[k];
    }
  }
  const T* y = verdict.accept ? point : row_at<T>(a.y, r, n);
  const T* g = verdict.accept ? gradient : row_at<T>(a.kept, r, n);
  C step = C(0);
  if (goes_on) {
    step = number_of<C>(a.step_size, r);
    if (a.scale) step *= static_cast<const C*>(a.scale)[r] * (verdict.accept ? C(1) : C(rule.backtracking));
  }
  C* velocity = live ? row_at<C>(a.velocity, r, n) : nullptr;
  const C* before = verdict.accept && a.step > 0 ? velocity : nullptr;
  bool moves = false;
  if (goes_on && before)
    for (int64_t k = lane; k < n; k += G) moves |= before[k] != C(0);
  moves = Row::any(moves);
  const double length = rule.clip > 0 && a.next ? norm_of<G>(g, n, goes_on) : 0.0;

  if (lane == 0 && i < a.rows) {
    if (a.flag) a.flag[i] = live ? verdict.status : int8_t(-1);
    if (a.accepted) a.accepted[i] = live && verdict.accept;
    if (live && (verdict.accept || a.step == 0)) static_cast<C*>(a.energy)[r] = value;
    if (goes_on && a.moving) a.moving[r] = moves;
    if (goes_on && a.scale && !verdict.accept) static_cast<C*>(a.scale)[r] *= C(rule.backtracking);
    if (live && !goes_on) {
      a.steps[r] = a.step;
      a.status[r] = verdict.status;
      a.row[i] = -1;
    }
  }
  if (i < a.rows && a.next) {
    T* next = row_at<T>(a.next, i, n);
    if (!goes_on) {
      for (int64_t k = lane; k < n; k += G) next[k] = point[k];
    } else {
      const Proposal<C> how{rule.clip > 0 ? C(clip_factor<double>(rule, length)) : C(1), C(rule.momentum),
                            step};
      if (!rule.noisy) {
        for (int64_t k = lane; k < n; k += G)
          propose(rule, how, y, g, before, velocity, false, C(0), next, k);
      } else {
        const C sigma = number_of<C>(a.sigma, r);
        const auto sample = static_cast<uint64_t>(a.sample ? a.sample[r] : r);
        for (int64_t block = lane; 4 * block < n; block += G) {
          C four[4];
          normals<C>(rule, sample, a.step + 1, block, four);
          for (int64_t e = 0; e < 4 && 4 * block + e < n; ++e)
            propose(rule, how, y, g, before, velocity, true, sigma * four[e], next, 4 * block + e);
        }
      }
    }
  }
  const int ended = __syncthreads_count(lane == 0 && live && !goes_on);
  if (threadIdx.x == 0 && ended > 0 && running)
    atomicAdd(reinterpret_cast<unsigned long long*>(running),
              static_cast<unsigned long long>(-static_cast<int64_t>(ended)));
}

template <class T, int G>
__global__ void __launch_bounds__(kThreads) descent_update_kernel(const __grid_constant__ DescentUpdate a) {
  using C = compute_t<T>;
  const int64_t n = a.elements, i = Group<G>::row();
  const bool mine = i < a.rows;
  const T* g = row_at<T>(a.gradient, i, n);
  const double length = a.rule.clip > 0 ? norm_of<G>(g, n, mine) : 0.0;
  if (!mine) return;
  const Proposal<C> how{a.rule.clip > 0 ? C(clip_factor<double>(a.rule, length)) : C(1), C(a.rule.momentum),
                        number_of<C>(a.step_size, i)};
  const C* noise = row_at<C>(a.noise, i, n);
  for (int64_t k = Group<G>::lane(); k < n; k += G)
    propose(a.rule, how, row_at<T>(a.y, i, n), g, row_at<C>(a.velocity, i, n),
            row_at<C>(a.next_velocity, i, n), noise != nullptr, noise ? noise[k] : C(0),
            row_at<T>(a.next, i, n), k);
}

// One thread computes a block of four elements.
template <class C>
__global__ void __launch_bounds__(kThreads) descent_normals_kernel(const __grid_constant__ DescentNormals a) {
  const int64_t blocks = (a.elements + 3) / 4;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t i = at / blocks, block = at % blocks;
  if (i >= a.rows) return;
  C four[4];
  normals<C>(a.rule, static_cast<uint64_t>(a.sample[i]), a.step, block, four);
  for (int64_t e = 0; e < 4 && 4 * block + e < a.elements; ++e)
    static_cast<C*>(a.out)[i * a.elements + 4 * block + e] = four[e];
}

}  // namespace

void descent_step_cuda(const DescentStep& a, int64_t* running, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_group(a.elements * size_of(a.dtype), [&](auto group) {
      constexpr int G = decltype(group)::value;
      launch("descent_step", descent_step_kernel<T, G>, blocks_for(a.rows, Group<G>::kRows), stream, a,
             running);
    });
  });
}

void descent_update_cuda(const DescentUpdate& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_group(a.elements * size_of(a.dtype), [&](auto group) {
      constexpr int G = decltype(group)::value;
      launch("descent_update", descent_update_kernel<T, G>, blocks_for(a.rows, Group<G>::kRows), stream, a);
    });
  });
}

void descent_normals_cuda(const DescentNormals& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = blocks_for(a.rows * ((a.elements + 3) / 4), kThreads);
  launch("descent_normals", a.wide ? descent_normals_kernel<double> : descent_normals_kernel<float>, blocks,
         stream, a);
}

}  // namespace adaptcomp
