// The adjoint of the halting step on CUDA: one launch, one group of threads per row (common/cuda.cuh), which
// writes every output once.
//
// It is bound by memory, like the forward step. The gradient of a row's weight is a dot product over the row;
// the distribution of its terms over the lanes and the order of the sum depend on the length of the row only,
// so that no row's gradient depends on the batch.
#include "common/cuda.cuh"
#include "halting/halting.h"
#include "halting/packs.cuh"
#include "halting/rows.h"

namespace adaptcomp {
namespace {

// g = [base +] weight * g_out; returns this lane's share of the dot product of g_out and readout. `base` and
// `readout` may be null. Lane and order of every product depend on n, the width of the accesses on the
// addresses.
template <int G, int E, bool Packed, class T>
__device__ __forceinline__ compute_t<T> weighted_share(T* g, const T* base, compute_t<T> weight,
                                                       const compute_t<T>* g_out, const T* readout, int64_t n,
                                                       int lane) {
  using C = compute_t<T>;
  const auto read = [](auto& pack, const auto* from) {
    if constexpr (Packed) {
      pack = *reinterpret_cast<const std::remove_reference_t<decltype(pack)>*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) pack.v[e] = from[e];
    }
  };
  C dot = 0;
  for (int64_t k = int64_t{lane} * E; k < n; k += G * E) {
    Pack<C, E> out;
    Pack<T, E> x, sum;
    read(out, g_out + k);
    if (readout) read(x, readout + k);
    if (base) read(sum, base + k);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const C share = weight * out.v[e];
      if (readout) dot += out.v[e] * weight_slope(x.v[e]);
      store(sum.v[e], base ? load(sum.v[e]) + share : share);
    }
    if constexpr (Packed) {
      *reinterpret_cast<Pack<T, E>*>(g + k) = sum;
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) g[k + e] = sum.v[e];
    }
  }
  return dot;
}

template <int G, class T>
__device__ __forceinline__ compute_t<T> weighted_row(T* g, const T* base, compute_t<T> weight,
                                                     const compute_t<T>* g_out, const T* readout, int64_t n,
                                                     int lane) {
  constexpr int E = 16 / sizeof(T);
  if (n % E != 0) return weighted_share<G, 1, true>(g, base, weight, g_out, readout, n, lane);
  const bool packed = access_bytes(address(g) | address(base) | address(readout) | scaled<T>(g_out)) == 16;
  return packed ? weighted_share<G, E, true>(g, base, weight, g_out, readout, n, lane)
                : weighted_share<G, E, false>(g, base, weight, g_out, readout, n, lane);
}

// g = base + g_out
template <int G, class T>
__device__ __forceinline__ void add_row(T* g, const T* base, const T* g_out, int64_t n, int lane) {
  const uintptr_t bits = address(g) | address(base) | address(g_out) |
                         static_cast<uintptr_t>(n * static_cast<int64_t>(sizeof(T)));
  dispatch_elements<T>(access_bytes(bits), [&](auto elements) {
    constexpr int E = decltype(elements)::value;
    for (int64_t k = lane; k < n / E; k += G) {
      Pack<T, E> sum = reinterpret_cast<const Pack<T, E>*>(base)[k];
      const Pack<T, E> out = reinterpret_cast<const Pack<T, E>*>(g_out)[k];
#pragma unroll
      for (int e = 0; e < E; ++e) store(sum.v[e], load(sum.v[e]) + load(out.v[e]));
      reinterpret_cast<Pack<T, E>*>(g)[k] = sum;
    }
  });
}

template <class S, int G>
__global__ void __launch_bounds__(kThreads, 4) halt_backward_kernel(const __grid_constant__ HaltBackward a) {
  using Row = Group<G>;
  const int lane = Row::lane();
  const int64_t i = Row::row();
  const bool inside = i < a.rows;
  const int8_t flag = inside ? a.flag[i] : static_cast<int8_t>(kPadding);
  const bool ended = flag == kHalted || flag == kMaxSteps;
  const bool live = ended || flag == kRunning;
  const int64_t r = live ? a.row[i] : -1;
  const int64_t place = flag == kRunning ? (a.place ? a.place[i] : i) : -1;
  const int64_t n = a.readout_elements;
  const bool has_output = n > 0 && a.g_output && (a.weight ? live : ended);
  // If the readout is the first leaf, its share is added to the leaf's gradient, which is written once.
  const bool merge = has_output && !a.g_readout;

  const auto leaf_source = [&](const LeafGrad& leaf) {
    const int64_t bytes = leaf.row_elements * size_of(leaf.dtype);
    return ended        ? bytes_of(leaf.g_result, r, bytes)
           : place >= 0 ? bytes_of(leaf.g_packed, place, bytes)
                        : nullptr;
  };
  for (int64_t l = merge ? 1 : 0; l < a.n_leaves && inside; ++l) {
    const LeafGrad& leaf = a.leaves[l];
    const int64_t bytes = leaf.row_elements * size_of(leaf.dtype);
    move_row<G>(static_cast<char*>(leaf.g_block) + i * bytes, leaf_source(leaf), bytes, lane);
  }
  if (lane == 0 && inside) {
    for (int64_t s = 0; s < a.n_sums; ++s)
      static_cast<S*>(a.sums[s].g_increment)[i] = live ? static_cast<const S*>(a.sums[s].g_total)[r] : S(0);
  }
  S g_weight = 0;
  if (n > 0)
    device_dispatch(a.readout_dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using C = compute_t<T>;
      T* g = row_of<T>(merge ? a.leaves[0].g_block : a.g_readout, i, n);
      const T* base = merge ? reinterpret_cast<const T*>(leaf_source(a.leaves[0])) : nullptr;
      C dot = 0;
      if (has_output && a.weight) {
        dot = weighted_row<G>(g, base, static_cast<C>(static_cast<const S*>(a.weight)[i]),
                              row_of<C>(a.g_output, r, n), a.readout ? row_of<T>(a.readout, i, n) : nullptr,
                              n, lane);
      } else if (has_output && base) {
        add_row<G>(g, base, row_of<T>(a.g_output, r, n), n, lane);
      } else if (inside && (merge || a.g_readout)) {
        move_row<G>(g, has_output ? row_of<T>(a.g_output, r, n) : nullptr,
                    n * static_cast<int64_t>(sizeof(T)), lane);
      }
      if (a.readout && a.weight) g_weight = static_cast<S>(Row::sum(dot));
    });
  if (lane == 0 && inside) {
    if (a.g_weight) static_cast<S*>(a.g_weight)[i] = g_weight;
    if (a.logits) act_backward_row<S>(a, i, r, place, live, g_weight);
  }
}

}  // namespace

void halt_backward_cuda(const HaltBackward& a, int64_t device, void* stream) {
  const DeviceGuard guard(device);
  int64_t widest = a.readout_elements * size_of(a.readout_dtype);
  for (int64_t l = 0; l < a.n_leaves; ++l)
    widest = std::max(widest, a.leaves[l].row_elements * size_of(a.leaves[l].dtype));
  dispatch_group(widest, [&](auto group) {
    constexpr int G = decltype(group)::value;
    launch("halt_backward", a.wide ? halt_backward_kernel<double, G> : halt_backward_kernel<float, G>,
           blocks_for(a.rows, Group<G>::kRows), stream, a);
  });
}

}  // namespace adaptcomp
