// The halting step on CUDA: one launch, one group of threads per row (common/cuda.cuh).
//
// Most rows stay active at most steps; such a row must cost one read of its tensors and one flag. Lane 0
// decides, all lanes read, and one vote ends the test; a weighted readout is tested while it is added up.
// Only a row that ends is read a second time, from cache, to be written to the results. The group is a part
// of a warp, a warp or a block by the length of the rows, so that short rows leave no lane idle, and long
// ones have more than 32.
#include "halting/halting.h"

#include "common/cuda.cuh"
#include "confidence/warp.cuh"
#include "convergence/warp.cuh"
#include "halting/packs.cuh"
#include "halting/rows.h"

namespace adaptcomp {
namespace {

// The test of a lane's share of a row.
struct Seen {
  bool finite = true, logits = true;  // whether all elements are finite; whether all are valid logits
  bool left = false;                  // whether an element is not masked

  template <class T>
  __device__ __forceinline__ void see(T x) {
    const bool is = is_finite(x);
    finite &= is;
    logits &= is || is_masked(x);
    left |= is;
  }
};

template <int G, class T>
__device__ __forceinline__ Seen see_share(const T* x, int64_t n, int lane) {
  Seen seen;
  dispatch_elements<T>(access_bytes(address(x) | static_cast<uintptr_t>(n * static_cast<int64_t>(sizeof(T)))),
                       [&](auto elements) {
                         constexpr int E = decltype(elements)::value;
                         const auto* __restrict__ packs = reinterpret_cast<const Pack<T, E>*>(x);
#pragma unroll 4
                         for (int64_t k = lane; k < n / E; k += G) {
                           const Pack<T, E> pack = packs[k];
#pragma unroll
                           for (int e = 0; e < E; ++e) seen.see(pack.v[e]);
                         }
                       });
  return seen;
}

// output += weight * x; returns the test of this lane's share of x.
template <int G, class T>
__device__ __forceinline__ Seen accumulate_share(compute_t<T>* output, compute_t<T> weight, const T* x,
                                                 int64_t n, int lane) {
  using C = compute_t<T>;
  Seen seen;
  const uintptr_t bits =
      address(x) | scaled<T>(output) | static_cast<uintptr_t>(n * static_cast<int64_t>(sizeof(T)));
  dispatch_elements<T>(access_bytes(bits), [&](auto elements) {
    constexpr int E = decltype(elements)::value;
    const auto* __restrict__ packs = reinterpret_cast<const Pack<T, E>*>(x);
    auto* __restrict__ outputs = reinterpret_cast<Pack<C, E>*>(output);
#pragma unroll 2
    for (int64_t k = lane; k < n / E; k += G) {
      const Pack<T, E> pack = packs[k];
      Pack<C, E> sum = outputs[k];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (weight != 0) accumulate(sum.v[e], weight, pack.v[e]);
        seen.see(pack.v[e]);
      }
      outputs[k] = sum;
    }
  });
  return seen;
}

template <int G>
__device__ void copy_result(const Leaf& leaf, int64_t i, int64_t r, int lane) {
  const int64_t bytes = leaf.row_elements * size_of(leaf.dtype);
  move_row<G>(static_cast<char*>(leaf.result) + r * bytes, bytes_of(leaf.block, i, bytes), bytes, lane);
}

// The decision for row i, in lane 0. No other lane may call `decide`, because it updates the row's carry.
template <class S, int G>
__device__ __forceinline__ Decision<S> decision(const HaltStep& a, int64_t i, int64_t r, int lane) {
  Decision<S> v{S(0), S(0), false, true};
  if (G >= 32 && a.policy == Policy::confidence && a.readout.row_elements > kClassesPerThread) {
    if (lane < 32) {
      device_dispatch(a.readout.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t n = a.readout.row_elements;
        const auto confidence =
            confidence_warp(row_of<T>(a.readout.block, i, n), n, static_cast<Measure>(a.parameter));
        v.halt = S(confidence) >= S(a.threshold);
      });
    }
  } else if (G >= 32 && remembers(a.policy) && a.policy != Policy::argmax &&
             a.readout.row_elements > kElementsPerThread) {
    if (lane < 32) {
      device_dispatch(a.readout.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t n = a.readout.row_elements;
        const T* now = row_of<T>(a.readout.block, i, n);
        T* last = reinterpret_cast<T*>(static_cast<char*>(a.memory) + r * a.memory_row);
        const bool same = stands_still_warp(now, last, n, criterion_of(a.policy), a.threshold);
        for (int64_t k = lane; k < n; k += 32) last[k] = now[k];  // each lane those that it has read
        if (lane == 0) v.halt = is_patient(a, r, same);
      });
    }
  } else if (lane == 0) {
    v = decide<S>(a, i, r);
  }
  return v;
}

template <class S, int G>
__global__ void __launch_bounds__(kThreads, 4)
    halt_step_kernel(const __grid_constant__ HaltStep a, int64_t* running) {
  using Row = Group<G>;
  const int lane = Row::lane();
  const int64_t i = Row::row();
  const int64_t r = i < a.rows ? a.row[i] : -1;
  const bool weighted = is_weighted(a);
  const bool separate_readout = a.readout.block && (a.n_leaves == 0 || a.readout.block != a.leaves[0].block);

  Decision<S> v{S(0), S(0), false, true};
  if (r >= 0) v = decision<S, G>(a, i, r, lane);
  const S weight = Row::broadcast(v.weight);
  const bool halt = Row::broadcast(static_cast<int>(v.halt)) != 0;

  bool finite = lane != 0 || v.finite;
  bool left = true;  // whether a class of the logits is not masked
  const auto test = [&](const Seen& seen, const Leaf& leaf, bool masked) {
    finite &= masked ? seen.logits : seen.finite;
    if (masked) left = seen.left || leaf.row_elements == 0;
  };
  if (r >= 0) {
    const bool masked = may_mask(weight);
    int64_t first = separate_readout && !weighted ? -1 : 0;  // -1: the readout
    if (weighted) {
      const int64_t n = a.readout.row_elements;
      device_dispatch(a.readout.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        test(
            accumulate_share<G>(row_of<compute_t<T>>(a.readout.result, r, n),
                                static_cast<compute_t<T>>(weight), row_of<T>(a.readout.block, i, n), n, lane),
            a.readout, masked && (separate_readout || a.read_leaf == 0));
      });
      // It is already tested, unless the readout is only the beginning of the first leaf.
      if (!separate_readout && a.n_leaves > 0 && a.leaves[0].row_elements == n &&
          a.leaves[0].dtype == a.readout.dtype)
        first = 1;
    }
    for (int64_t l = first; l < a.n_leaves; ++l) {
      if (separate_readout && l >= 0 && l == a.read_leaf) continue;  // tested as the readout
      const Leaf& leaf = l < 0 ? a.readout : a.leaves[l];
      device_dispatch(leaf.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        test(see_share<G>(row_of<T>(leaf.block, i, leaf.row_elements), leaf.row_elements, lane), leaf,
             masked && (l < 0 || l == a.read_leaf));
      });
    }
  }
  finite = !Row::any(!finite);
  if (separate_readout || a.read_leaf >= 0) finite = Row::any(left) && finite;

  const int64_t step = r < 0 ? 0 : step_of(a, i);
  const Status flag = r < 0 ? kPadding : outcome(halt, finite, step, a.min_steps, a.max_steps);
  const bool ended = flag != kPadding && flag != kRunning;
  if (lane == 0 && i < a.rows) {
    a.flag[i] = flag;
    if (r < 0) pass_carry<S>(a, i);
    for (int64_t s = 0; s < a.n_sums && r >= 0 && flag != kNonFinite; ++s)
      static_cast<S*>(a.sums[s].total)[r] +=
          a.sums[s].increment ? static_cast<const S*>(a.sums[s].increment)[i] : v.cost;
  }
  if (ended) {
    if (lane == 0) {
      if (a.retire) a.row[i] = -1;  // every lane has read it before the vote above
      a.steps[r] = step;
      a.status[r] = flag;
    }
    for (int64_t l = !weighted && a.readout.block ? -1 : 0; l < a.n_leaves; ++l)
      copy_result<G>(l < 0 ? a.readout : a.leaves[l], i, r, lane);
  }
  const int rows_ended = __syncthreads_count(lane == 0 && ended);
  if (threadIdx.x == 0 && rows_ended > 0 && running)
    atomicAdd(reinterpret_cast<unsigned long long*>(running),
              static_cast<unsigned long long>(-static_cast<int64_t>(rows_ended)));
}

}  // namespace

void halt_step_cuda(const HaltStep& a, int64_t* running, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  int64_t widest = a.readout.block ? a.readout.row_elements * size_of(a.readout.dtype) : 0;
  for (int64_t l = 0; l < a.n_leaves; ++l)
    widest = std::max(widest, a.leaves[l].row_elements * size_of(a.leaves[l].dtype));
  dispatch_group(widest, [&](auto group) {
    constexpr int G = decltype(group)::value;
    launch("halt_step", a.wide ? halt_step_kernel<double, G> : halt_step_kernel<float, G>,
           blocks_for(a.rows, Group<G>::kRows), stream, a, running);
  });
}

}  // namespace adaptcomp
